"""Best of N: the world model imagines what each chunk leads to, a value head says how far that is.

The value head reads one frame, real or imagined alike: the backbone is shown it as a policy's
condition, with the instruction and the robot but without proprioception, which of an imagined
moment nobody knows. It says how much of the subtask is done: 0 at its beginning, 1 at its end. It
lies beside the checkpoint whose backbone it reads (policies/value.py trains it):

    value.safetensors   its weights
    value.json          its sizes, which backbone it reads, how well it did on held-out episodes

B batch, N candidate chunks, K actions, L tokens, C channels, D width.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from selfflow.datasets.spec import UserError
from selfflow.policies.decoding import TERMINATE
from selfflow.worldmodel.checkpoint import (
    Checkpoint,
    CheckpointError,
    Weights,
    fill,
    parts_of,
    read_json,
    write_json,
)
from selfflow.worldmodel.dream import Sampling, dream
from selfflow.worldmodel.layout import PROPRIO_CHANNELS, Layout
from selfflow.worldmodel.transformer import Prefix, Tokens, Valid, VideoActionTransformer
from selfflow.worldmodel.video_codec import Codec

WEIGHTS, ABOUT = "value.safetensors", "value.json"
FORMAT = 1  # of value.json


@dataclass(frozen=True)
class ValueSizes:
    """Of the head, and what it was trained on."""

    width: int  # of the features
    block: int  # whose features they are, 1-based
    queries: int
    hidden: int
    steps: int  # of the solver that imagined frames are made with

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1:
            raise ValueError(f"value head: every size is at least 1, got {self}")


class ValueHead(nn.Module):
    """Pools a frame's features by learned queries; an MLP turns them into a logit."""

    def __init__(self, sizes: ValueSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.queries = nn.Parameter(torch.randn(sizes.queries, sizes.width))
        self.mlp = nn.Sequential(
            nn.Linear(sizes.queries * sizes.width, sizes.hidden),
            nn.SiLU(),
            nn.Linear(sizes.hidden, 1),
        )

    def forward(self, features: Float[Tensor, "B L D"]) -> Float[Tensor, "B"]:
        """The logit of the share that is done."""
        x = F.layer_norm(features.float(), features.shape[-1:], eps=1e-6)
        weight = (x @ self.queries.T * self.sizes.width**-0.5).softmax(1)
        return self.mlp((weight.transpose(1, 2) @ x).flatten(1))[:, 0]


@dataclass(frozen=True)
class Eyes:
    """A whole backbone that imagines frames and looks at frames."""

    model: VideoActionTransformer
    layout: Layout
    codec: Codec

    def imagine(
        self,
        tokens: Tokens,
        valid: Tokens,
        chunks: Float[Tensor, "B K C"],
        steps: int,
        generator: Generator,
        alike: bool = False,
    ) -> UInt8[Tensor, "B H W 3"]:
        """The last future frame if these normalised actions were executed now.

        `alike`: all rows are one situation. Its conditions are then read once where
        attention=prefix, and all rows start from the same noise, so that what differs between them
        is the actions' doing.
        """
        sampled = [m for m in self.model.config.targets if m.name != "action"]
        model, noise = (Sharing(self.model), {}) if alike else (self.model, None)
        if noise is not None:
            for m in sampled:
                one = torch.randn(1, m.length, m.channels, generator=generator)
                noise[m.name] = one.expand(len(chunks), -1, -1)
        how = Sampling(steps=steps)
        found = dream(model, tokens, valid, how, generator, {"action": chunks}, noise=noise)
        return self.codec.decode(found["video"])[:, -1]

    def features(
        self, frames: UInt8[Tensor, "B H W 3"], tokens: Tokens, block: int
    ) -> Float[Tensor, "B L D"]:
        """Of a frame as the only thing seen, with the text and robot of `tokens`."""
        size, now = len(frames), self.codec.encode(frames[:, None])
        length = now.shape[1] * self.layout.context
        context = now.new_zeros(size, length, now.shape[2])
        context[:, -now.shape[1] :] = now
        shown = torch.zeros(size, length, dtype=torch.bool, device=now.device)
        shown[:, -now.shape[1] :] = True
        hidden = now.new_zeros(size, 1, PROPRIO_CHANNELS)
        seen = {
            "text": tokens["text"],
            "robot": tokens["robot"],
            "proprio": hidden,
            "context": context,
        }
        valid = {"proprio": hidden[..., 0].bool(), "context": shown}
        return self.model.condition_features(seen, now.new_zeros(size), valid, block)


class Sharing:
    """A model for rows whose conditions are all the same: they are read once."""

    def __init__(self, model: VideoActionTransformer) -> None:
        self._model, self.config = model, model.config
        self.forward, self.decode = model.forward, model.decode

    def prefix(self, tokens: Tokens, tau: Tensor, valid: Valid) -> Prefix:
        """Of the first row, for every row."""
        first = {name: x[:1] for name, x in tokens.items()}
        known = {name: x[:1] for name, x in (valid or {}).items()}
        one, size = self._model.prefix(first, tau[:1], known), len(tau)
        kept = (
            (k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in one.keys_values
        )
        return Prefix(tuple(kept), one.features)


def repeated(tokens: Tokens, count: int) -> Tokens:
    """The one row, so often; nothing is copied."""
    return {name: x.expand(count, *x.shape[1:]) for name, x in tokens.items()}


@dataclass(frozen=True)
class Judge:
    """Chooses among chunks by what they lead to."""

    eyes: Eyes
    head: ValueHead

    @torch.no_grad()
    def best(
        self,
        tokens: Tokens,
        valid: Tokens,
        chunks: Float[Tensor, "N K C"],
        generator: Generator,
    ) -> int:
        """The row of `chunks` (normalised) whose imagined end is worth most, here (batch 1)."""
        count = len(chunks)
        clean = chunks.clone()
        clean[..., TERMINATE] = torch.where(clean[..., TERMINATE] > 0, 1.0, -1.0)  # as in the data
        tokens, valid = repeated(tokens, count), repeated(valid, count)
        steps = self.head.sizes.steps
        frames = self.eyes.imagine(tokens, valid, clean, steps, generator, alike=True)
        return int(self.worth(frames, tokens).argmax())

    @torch.no_grad()
    def worth(self, frames: UInt8[Tensor, "B H W 3"], tokens: Tokens) -> Float[Tensor, "B"]:
        """The logit of the share done in each frame."""
        return self.head(self.eyes.features(frames, tokens, self.head.sizes.block))


def check_imagines(given: Checkpoint, key: str) -> None:
    """Raises UserError unless the checkpoint keeps a backbone that predicts frames after actions;
    `key` is what needs it."""
    with parts_of(given.path):
        targets = {m["name"] for m in given.config["model"]["modalities"] if m["role"] == "target"}
    if not {"video", "action"} <= targets:
        raise UserError(
            f"{key}: checkpoint {given.path} cannot imagine frames, it holds only what reads "
            "conditions; make the policy with keep_self_flow, or train=head keep_backbone=true"
        )


def fingerprint(path: Path) -> str:
    """Of the weights of the checkpoint in this folder."""
    with open(path / "model.safetensors", "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def save_value(folder: Path, sizes: ValueSizes, weights: Weights, about: dict[str, Any]) -> None:
    """Puts a value head beside the checkpoint that it reads, in place of one that is there."""
    draft = folder / (WEIGHTS + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, draft)
    (folder / ABOUT).unlink(missing_ok=True)  # of another head: without it this one is refused
    draft.replace(folder / WEIGHTS)
    own = {"format": FORMAT, "sizes": asdict(sizes), "backbone": fingerprint(folder)}
    write_json(folder / ABOUT, about | own)  # its own: `about` is a checkpoint's too


def load_judge(given: Checkpoint, eyes: Eyes, best_of: int) -> Judge:
    """With the value head beside the checkpoint. Raises UserError if there is none or it reads
    another backbone, CheckpointError if it is damaged."""
    path, key = given.path, f"best_of={best_of}"
    check_imagines(given, key)
    if not ((path / WEIGHTS).is_file() and (path / ABOUT).is_file()):
        raise UserError(
            f"{key}: no {WEIGHTS} with {ABOUT} in {path}; train a value head with "
            f"policies/value.py init={path} data=..., or leave best_of=1"
        )
    about = read_json(path / ABOUT)
    if about.get("format") != FORMAT:
        raise UserError(f"{path / ABOUT}: format is {about.get('format')}, not {FORMAT}")
    if about.get("backbone") != fingerprint(path):
        raise UserError(
            f"{key}: {path / WEIGHTS} reads a backbone of other weights; train one for these with "
            f"policies/value.py init={path} data=..., or leave best_of=1"
        )
    with parts_of(path):
        head = ValueHead(ValueSizes(**about["sizes"]))
    try:
        fill(head, load_file(path / WEIGHTS), str(path / WEIGHTS))
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path / WEIGHTS}: cannot be read ({e})") from e
    return Judge(eyes, head.eval().requires_grad_(False))
