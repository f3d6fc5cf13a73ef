"""What one training window holds, and the tokens that it becomes.

    condition   text · robot 1 x 17 · proprio 1 x 10 · context (frames x rows x columns)
    target      video (frames x rows x columns) · action K x 8 · what the config adds

At control step t the context frames are those of steps t, t - stride, ... (the last one is now),
the future frames those of t + stride, t + 2 stride, ..., and the actions of steps t .. t + K - 1.
A codec that joins four frames into one latent frame encodes the one of step t by itself first, so
its video target begins with that frame: 49 frames are 13 latent frames, as in the paper.
An action token is the normalised 7-D action and `terminate` as -1 or +1. Context frames before an
episode's start, and whatever its data do not have, are replaced by a learned null and take no loss.
Beyond its end the targets go on as if nothing moved any more: the last frame, and actions without
motion that say terminate. They take no loss, but a null in their place would tell the other targets
where the episode ends, which on RT-1 is the answer to `terminate` (its episodes average 43 steps,
so with K = 8 one window in six runs over the end). After a subtask's end its action dimensions take
no loss, but `terminate` does.

B batch, T frames, L tokens, K actions, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from selfflow.worldmodel.codec import CodecConfig, geometry
from selfflow.worldmodel.model_config import Modality
from selfflow.worldmodel.transformer import Tokens

PROPRIO_CHANNELS = 10
TEXT_CHANNELS = {"hash384": 384, "minilm": 384, "table": 384, "use": 512}  # of a text token
ACTION_CHANNELS = 8  # seven action dimensions and terminate
MAX_EMBODIMENTS = 16
ONE = (1, 1, 1)


@dataclass(frozen=True)
class Weighting:
    """Of the targets: share of tokens at the second timestep (R_M), and weight in the loss."""

    video_mask: float = 0.1
    action_mask: float = 0.1
    video: float = 1.0
    action: float = 1.0
    video_answer: str = "velocity"  # or data: what the video's output layer predicts


@dataclass(frozen=True)
class Extra:
    """A target modality that a config adds: `key` names what the data's source measures by step.

    Its tokens are the values of steps t .. t + length - 1, scaled by `scale`.
    """

    key: str
    channels: int
    length: int
    mask_ratio: float = 0.1
    weight: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Layout:
    """Image size in pixels, frames, and chunk length; the defaults are the tiny layout."""

    height: int = 128
    width: int = 160
    patch: int = 16  # cells of the codec a side: pixels, so 8 x 10 = 80 tokens a frame
    context: int = 1  # frames shown, the last at step t
    future: int = 1  # frames to predict
    stride: int = 4  # control steps between frames
    chunk: int = 8  # actions, K
    codec: CodecConfig = field(default_factory=CodecConfig)

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.patch, self.context, self.stride, self.chunk) < 1:
            raise ValueError(f"layout: every size is at least 1, got {self}")
        spatial, temporal, _ = geometry(self.codec)
        cell = self.patch * spatial
        if self.future < 0:
            raise ValueError(f"layout.future={self.future}: must not be negative")
        if self.height % cell or self.width % cell:
            raise ValueError(
                f"layout.height={self.height} and layout.width={self.width} must be multiples of "
                f"{cell} pixels (layout.patch={self.patch}, codec {self.codec.kind}'s {spatial}); "
                f"try {self._cure(spatial)}"
            )
        if self.future % temporal:
            raise ValueError(
                f"layout: future={self.future}: codec {self.codec.kind} joins {temporal} frames; "
                f"choose a multiple of {temporal}"
            )

    def _cure(self, spatial: int) -> str:
        """The usual patch where it divides the picture, else the nearest picture that fits."""
        usual = max(1, 16 // spatial)
        if not (self.height % (usual * spatial) or self.width % (usual * spatial)):
            return f"layout.patch={usual}"
        cell = self.patch * spatial
        near = [max(1, round(pixels / cell)) * cell for pixels in (self.height, self.width)]
        return f"layout.height={near[0]} layout.width={near[1]}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        """Inverse of dataclasses.asdict; older ones name no codec."""
        rest = {k: v for k, v in values.items() if k != "codec"}
        return cls(**rest, codec=CodecConfig(**values.get("codec", {})))

    @property
    def frame_offsets(self) -> tuple[int, ...]:
        """Control steps of all frames relative to t, context first."""
        return tuple(i * self.stride for i in range(1 - self.context, self.future + 1))

    @property
    def first_target(self) -> int:
        """Index of the video target's first frame among them."""
        return self.context if geometry(self.codec)[1] == 1 else self.context - 1

    def grid(self, frames: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of so many frames' tokens."""
        spatial, temporal, _ = geometry(self.codec)
        cell = self.patch * spatial
        return 1 + (frames - 1) // temporal, self.height // cell, self.width // cell

    @property
    def channels(self) -> int:
        """Of a frame's token."""
        return geometry(self.codec)[2] * self.patch**2

    def modalities(
        self,
        weighting: Weighting | None = None,
        text: tuple[int, int] = (1, 384),
        extra: dict[str, Extra] | None = None,
        rope: bool = False,
    ) -> tuple[Modality, ...]:
        """The modalities of the table above; `text` is its tokens and channels.

        With rotary positions the unit of time is a latent frame, which actions share, and text has
        weights of its own in double blocks.
        """
        w, temporal = weighting or Weighting(), geometry(self.codec)[1]
        own = {"stream": "text"} if rope else {}

        def clock(start: float, step: float) -> dict[str, Any]:
            return {"clock": (start, step)} if rope else {}

        now, per_step = clock(1.0 - self.context, 1.0), clock(0.0, 1 / (self.stride * temporal))
        shown = (self.context, *self.grid(1)[1:])  # encoded one by one, whatever the codec joins
        made = [
            _modality("text", text[1], (text[0], 1, 1), "condition", **own),
            _modality("robot", MAX_EMBODIMENTS + 1, ONE, "condition"),
            _modality("proprio", PROPRIO_CHANNELS, ONE, "condition"),
            _modality("context", self.channels, shown, "condition", **now),
        ]
        if self.future:
            grid = self.grid(len(self.frame_offsets) - self.first_target)
            start = clock(1.0 if temporal == 1 else 0.0, 1.0) | {"answer": w.video_answer}
            made.append(_target("video", self.channels, grid, w.video_mask, w.video, start))
        steps = (self.chunk, 1, 1)
        made.append(_target("action", ACTION_CHANNELS, steps, w.action_mask, w.action, per_step))
        for name, e in (extra or {}).items():
            steps = (e.length, 1, 1)
            made.append(_target(name, e.channels, steps, e.mask_ratio, e.weight, per_step))
        return tuple(made)

    def condition_tokens(
        self,
        context: Float[Tensor, "B L C"],
        frame_valid: Bool[Tensor, "B T"],
        text: Float[Tensor, "B N E"],
        robot: Float[Tensor, "B 1 R"],
        proprio: Float[Tensor, "B P"],
        proprio_valid: Bool[Tensor, "B"],
    ) -> tuple[Tokens, Tokens]:
        """Tokens and validity of the conditions; `context` are the encoded context frames."""
        tokens = {"text": text, "robot": robot, "proprio": proprio[:, None], "context": context}
        shown = frame_valid[:, : self.context]
        return tokens, {"proprio": proprio_valid[:, None], "context": self._per_token(shown)}

    def action_tokens(
        self,
        actions: Float[Tensor, "B K 7"],
        action_valid: Bool[Tensor, "B K"],
        terminate: Bool[Tensor, "B K"],
        terminate_valid: Bool[Tensor, "B K"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, K, 8), their validity and loss mask (float).

        `actions` are normalised; those that are not valid should say "no motion". Either all tokens
        of a sample are valid or, where its episode has no actions, none.
        """
        labelled = action_valid | terminate_valid
        real = labelled.any(1, keepdim=True).expand(labelled.shape)
        ends = torch.where(terminate | (real & ~labelled), 1.0, -1.0)[..., None]
        known = action_valid[..., None].expand(actions.shape)
        return (
            torch.cat([actions, ends], -1),
            real,
            torch.cat([known, terminate_valid[..., None]], -1).float(),
        )

    def video_valid(self, frame_valid: Bool[Tensor, "B T"]) -> Bool[Tensor, "B L"]:
        """Which of the video target's tokens take loss: all frames of the latent frame are real."""
        own = frame_valid[:, self.first_target :]
        temporal = geometry(self.codec)[1]
        if temporal > 1:
            joined = own[:, 1:].unflatten(1, (-1, temporal)).all(-1)
            own = torch.cat([own[:, :1], joined], 1)
        return self._per_token(own)

    def _per_token(self, frame_valid: Tensor) -> Tensor:
        _, rows, columns = self.grid(1)
        return frame_valid.repeat_interleave(rows * columns, 1)


def _modality(name: str, channels: int, grid: tuple[int, ...], role: str, **rest: Any) -> Modality:
    return Modality(name, channels, math.prod(grid), role, grid, **rest)  # type: ignore[arg-type]


def _target(
    name: str, channels: int, grid: tuple[int, ...], mask: float, weight: float, rest: dict
) -> Modality:
    return _modality(name, channels, grid, "target", mask_ratio=mask, weight=weight, **rest)


def split_frames(
    frames: UInt8[Tensor, "B T H W 3"], layout: Layout
) -> tuple[UInt8[Tensor, "BT 1 H W 3"], UInt8[Tensor, "B F H W 3"]]:
    """Context frames one by one, and the frames of the video target."""
    context = frames[:, : layout.context].flatten(0, 1)[:, None]
    return context, frames[:, layout.first_target :]


@dataclass(frozen=True)
class Robots:
    """Embodiments in the order of their one-hot, and their control rates in Hz."""

    names: tuple[str, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.rates) or len(set(self.names)) != len(self.names):
            raise ValueError(f"embodiments need distinct names and a rate each: {self}")
        if len(self.names) > MAX_EMBODIMENTS:
            raise ValueError(f"{len(self.names)} embodiments; a model holds {MAX_EMBODIMENTS}")

    def extended(self, others: dict[str, float]) -> "Robots":
        """With the others' names (to rate in Hz) appended where they are new."""
        new = {name: rate for name, rate in others.items() if name not in self.names}
        return Robots((*self.names, *new), (*self.rates, *new.values()))

    def tokens(self, names: Sequence[str]) -> Float[Tensor, "B 1 R"]:
        """One-hot and log2(rate) / 4 of each named robot. An unknown name is a ValueError."""
        index = [self.names.index(name) for name in names]
        token = torch.zeros(len(index), 1, MAX_EMBODIMENTS + 1)
        token[torch.arange(len(index)), 0, index] = 1.0
        token[:, 0, -1] = torch.tensor([math.log2(self.rates[i]) / 4 for i in index])
        return token
