"""What one training window holds, and the tokens that it becomes.

    condition   text 1 x 384 · robot 1 x 17 · proprio 1 x 10 · context (frames x rows x columns)
    target      video (frames x rows x columns) · action K x 8

At control step t the context frames are those of steps t, t - stride, ... (the last one is now),
the future frames those of t + stride, t + 2 stride, ..., and the actions of steps t .. t + K - 1.
An action token is the normalised 7-D action and `terminate` as -1 or +1. Steps before an episode's
start or after its end have no frame and no action: such tokens are replaced by a learned null and
take no loss (RT-1 episodes average 43 steps, so with K = 8 one window in six runs over the end).
After a subtask's end its action dimensions take no loss, but `terminate` does.

B batch, T frames, L tokens, K actions, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from selfflow.worldmodel.transformer import Modality, Tokens
from selfflow.worldmodel.video_codec import PatchCodec

TEXT_CHANNELS, PROPRIO_CHANNELS = 384, 10
ACTION_CHANNELS = 8  # seven action dimensions and terminate
MAX_EMBODIMENTS = 16


@dataclass(frozen=True)
class Layout:
    """Image size in pixels, frames, and chunk length; the defaults are the tiny layout."""

    height: int = 128
    width: int = 160
    patch: int = 16  # pixels a side: 8 x 10 = 80 tokens a frame of 768 channels
    context: int = 1  # frames shown, the last at step t
    future: int = 1  # frames to predict
    stride: int = 4  # control steps between frames
    chunk: int = 8  # actions, K

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.patch, self.context, self.stride, self.chunk) < 1:
            raise ValueError(f"layout: every size is at least 1, got {self}")
        if self.future < 0 or self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"layout: patch={self.patch} must divide height={self.height} and "
                f"width={self.width}; future={self.future} must not be negative"
            )

    @property
    def frame_offsets(self) -> tuple[int, ...]:
        """Control steps of all frames relative to t, context first."""
        return tuple(i * self.stride for i in range(1 - self.context, self.future + 1))

    @property
    def codec(self) -> PatchCodec:
        """Frames <-> tokens."""
        return PatchCodec(self.height, self.width, self.patch)

    def modalities(
        self,
        video_mask: float = 0.1,
        action_mask: float = 0.1,
        video_weight: float = 1.0,
        action_weight: float = 1.0,
    ) -> tuple[Modality, ...]:
        """The modalities of the table above; masks are R_M, weights are of the loss."""
        rows, columns, channels = self.codec.latent_shape
        one = (1, 1, 1)

        def video(name: str, frames: int, role: str, mask: float, weight: float) -> Modality:
            grid = (frames, rows, columns)
            return Modality(name, channels, math.prod(grid), role, grid, mask, weight)

        future = (
            (video("video", self.future, "target", video_mask, video_weight),)
            if self.future
            else ()
        )
        return (
            Modality("text", TEXT_CHANNELS, 1, "condition", one),
            Modality("robot", MAX_EMBODIMENTS + 1, 1, "condition", one),
            Modality("proprio", PROPRIO_CHANNELS, 1, "condition", one),
            video("context", self.context, "condition", 0.0, 1.0),
            *future,
            Modality(
                "action",
                ACTION_CHANNELS,
                self.chunk,
                "target",
                (self.chunk, 1, 1),
                action_mask,
                action_weight,
            ),
        )

    def condition_tokens(
        self,
        frames: UInt8[Tensor, "B T H W 3"],
        frame_valid: Bool[Tensor, "B T"],
        text: Float[Tensor, "B 1 C"],
        robot: Float[Tensor, "B 1 R"],
        proprio: Float[Tensor, "B P"],
        proprio_valid: Bool[Tensor, "B"],
    ) -> tuple[Tokens, Tokens]:
        """Tokens and validity of the conditions; only the first `context` frames are read."""
        shown, shown_valid = frames[:, : self.context], frame_valid[:, : self.context]
        tokens = {
            "text": text,
            "robot": robot,
            "proprio": proprio[:, None],
            "context": self.codec.encode(shown),
        }
        return tokens, {"proprio": proprio_valid[:, None], "context": self._per_token(shown_valid)}

    def target_tokens(
        self,
        frames: UInt8[Tensor, "B T H W 3"],
        frame_valid: Bool[Tensor, "B T"],
        actions: Float[Tensor, "B K 7"],
        action_valid: Bool[Tensor, "B K"],
        terminate: Bool[Tensor, "B K"],
        terminate_valid: Bool[Tensor, "B K"],
    ) -> tuple[Tokens, Tokens, Tokens]:
        """Tokens, token validity and loss mask (float, broadcasts to the tokens) of the targets.

        `actions` are normalised; those that are not valid should say "no motion".
        """
        ends = torch.where(terminate, 1.0, -1.0)[..., None]
        tokens = {"action": torch.cat([actions, ends], -1)}
        valid = {"action": action_valid | terminate_valid}
        known = action_valid[..., None].expand(actions.shape)
        masks = {"action": torch.cat([known, terminate_valid[..., None]], -1).float()}
        if self.future:
            tokens["video"] = self.codec.encode(frames[:, self.context :])
            valid["video"] = self._per_token(frame_valid[:, self.context :])
            masks["video"] = valid["video"][..., None].float()
        return tokens, valid, masks

    def _per_token(self, frame_valid: Tensor) -> Tensor:
        rows, columns, _ = self.codec.latent_shape
        return frame_valid.repeat_interleave(rows * columns, 1)


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
