"""What pretraining, fine-tuning and evaluation share: from sources of episodes to tokens.

B batch, T frames, L tokens, K actions, C channels.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfflow.datasets.normalize import (
    FEATURES,
    Statistics,
    fit,
    from_json,
    normalize_action,
    proprio_features,
    statistics_for,
)
from selfflow.datasets.normalize import load as read_statistics
from selfflow.datasets.spec import ACTION_DIM, ACTION_NAMES, EMBODIMENTS, UserError
from selfflow.datasets.text import ENCODER as HASHED
from selfflow.datasets.text import TextEncoder, save_table, unknown
from selfflow.datasets.windows import Batch, Mixture, WindowSpec
from selfflow.worldmodel.checkpoint import FORMAT, last, load
from selfflow.worldmodel.codec import make_codec
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.latents import LatentStore
from selfflow.worldmodel.layout import Extra, Layout, Robots, split_frames
from selfflow.worldmodel.loop import LoopConfig
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.parallel import World
from selfflow.worldmodel.run_folder import Amounts
from selfflow.worldmodel.transformer import Tokens
from selfflow.worldmodel.video_codec import Codec

LOOKED_AT = 2000  # episodes a source whose instructions are read before a run


@dataclass(frozen=True)
class Inputs:
    """A batch as tokens: all clean tokens, their validity, and the targets' loss mask."""

    tokens: Tokens
    valid: Tokens
    mask: Tokens

    def to(self, device: torch.device) -> "Inputs":
        """All of it on the device."""
        parts = (self.tokens, self.valid, self.mask)
        return Inputs(*({k: v.to(device) for k, v in part.items()} for part in parts))

    def all_valid(self, model: ModelConfig) -> Tensor:
        """Bool (B, L): which tokens of the whole sequence are real, not null and not beyond the
        episode's end."""
        some = next(iter(self.tokens.values()))
        parts = []
        for m in model.modalities:
            real = torch.ones(len(some), m.length, dtype=torch.bool, device=some.device)
            real = self.valid.get(m.name, real)
            parts.append(real & self.mask[m.name].any(-1) if m.name in self.mask else real)
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Reader:
    """Turns batches in physical units into normalised tokens."""

    layout: Layout
    robots: Robots
    statistics: dict[str, Statistics]
    codec: Codec | None  # None where `latents` are read
    text: TextEncoder
    extra: dict[str, Extra] = field(default_factory=dict)
    latents: LatentStore | None = None  # encoded beforehand: frames are not looked at

    def tokens(self, batch: Batch, device: torch.device | None = None) -> Inputs:
        """The batch on the device; frames are encoded there."""
        layout, device = self.layout, device or torch.device("cpu")
        context, video, frame_valid = self._pictures(batch, device)
        proprio, actions = normalised(batch, self.statistics)
        tokens, valid = layout.condition_tokens(
            context,
            frame_valid,
            torch.from_numpy(self.text.embed(batch.instruction)),
            self.robots.tokens(batch.embodiment),
            torch.from_numpy(proprio),
            torch.from_numpy(batch.proprio_valid),
        )
        action, action_valid, action_mask = layout.action_tokens(
            torch.from_numpy(actions),
            torch.from_numpy(batch.action_valid),
            torch.from_numpy(batch.terminate),
            torch.from_numpy(batch.terminate_valid),
        )
        tokens["action"], valid["action"], mask = action, action_valid, {"action": action_mask}
        if video is not None:
            tokens["video"], shown = video, layout.video_valid(frame_valid)
            valid["video"], mask["video"] = torch.ones_like(shown), shown[..., None].float()
        for name, e in self.extra.items():
            tokens[name] = torch.from_numpy(batch.extra[e.key]) * e.scale
            valid[name] = torch.from_numpy(batch.extra_valid[e.key])
            mask[name] = valid[name][..., None].float()
        return Inputs(tokens, valid, mask).to(device)

    def _pictures(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """Context tokens, video tokens if any are to be predicted, and validity of the frames."""
        if self.latents is not None:
            return self.latents.tokens(batch.ids, self.layout)
        frames = torch.from_numpy(batch.frames).to(device)
        assert self.codec is not None
        shown, coming = split_frames(frames, self.layout)
        context = self.codec.encode(shown).unflatten(0, (len(frames), -1)).flatten(1, 2)
        video = self.codec.encode(coming) if self.layout.future else None
        return context, video, torch.from_numpy(batch.frame_valid)


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts, in order."""
    if parts == 1:
        return [batch]
    size = len(batch.ids) // parts
    cut = [slice(i * size, (i + 1) * size) for i in range(parts)]

    def of(value: Any, rows: slice) -> Any:
        return {k: v[rows] for k, v in value.items()} if isinstance(value, dict) else value[rows]

    return [
        Batch(**{f.name: of(getattr(batch, f.name), rows) for f in fields(batch)}) for rows in cut
    ]


def normalised(batch: Batch, statistics: dict[str, Statistics]) -> tuple[np.ndarray, np.ndarray]:
    """Proprioception features (B, 10) and actions (B, K, 7), each by its own embodiment."""
    names = np.array(batch.embodiment)
    proprio = np.zeros((len(names), FEATURES), np.float32)
    actions = np.zeros_like(batch.actions)
    for name in set(batch.embodiment):
        rows, own = names == name, statistics.get(name)
        proprio[rows] = proprio_features(batch.proprio[rows], own)
        if own is not None:
            actions[rows] = normalize_action(batch.actions[rows], own)
    return proprio, actions


@contextmanager
def user_errors() -> Iterator[None]:
    """worldmodel's own one-line errors as the entry points' UserError."""
    try:
        yield
    except RunError as e:
        raise UserError(str(e)) from e


def autocast(config: LoopConfig, device: torch.device) -> AbstractContextManager:
    """bf16 matrix products, or plain fp32."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def embodiments(sources: list[Any], known: Robots | None = None) -> Robots:
    """The one-hot's order: `known` (the project's own by default), then what else the data hold."""
    own = Robots(tuple(EMBODIMENTS), tuple(e.control_hz for e in EMBODIMENTS.values()))
    rates = {s.embodiment.name: s.embodiment.control_hz for s in sources}
    return (known or own).extended(rates)


def amounts(sources: list[Any]) -> Amounts:
    """Episodes and steps of every source, by which a resumed run knows its data again."""
    total: Amounts = {}
    for s in sources:
        episodes, steps = total.get(s.name, [0, 0])
        steps += sum(s.length(i) for i in range(len(s)))
        total[s.name] = [episodes + len(s), steps]
    return total


def prepare(
    config: LoopConfig, sources: list[Any], weights: list[float], spec: WindowSpec
) -> tuple[Mixture, dict[str, Statistics]]:
    """The mixture, and statistics of the run that goes on, of the file, or of the data.

    Draws a sample of every source, so that what is wrong with one is said before `out` exists.
    """
    for s in sources:
        print(f"data: {s.name}, {s.embodiment.name}, {len(s)} episodes, {s.skipped} skipped")
    mixture = Mixture(sources, weights, spec, config.seed)
    mixture.try_all()
    resumed = last(Path(config.out))
    if resumed is None and config.statistics is None:
        return mixture, fit(sources)
    where = str(resumed or config.statistics)
    given = from_json(load(resumed).statistics) if resumed else read_statistics(where)
    return mixture, statistics_for(sources, given, where)


def readable(text: TextEncoder, sources: list[Any]) -> list[str]:
    """The instructions of the data, each once, read from at most LOOKED_AT episodes a source.

    Raises UserError, before any work, if there are some that the encoder cannot read. Hashed words
    read anything, so nothing is looked at for them.
    """
    if text.name == HASHED:
        return []
    found: dict[str, None] = {}
    for source in sources:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int))
        for i in chosen:
            found |= dict.fromkeys(source.signals(int(i)).instruction)
    if complaint := unknown(text, found):
        raise UserError(complaint)
    return list(found)


def keep_texts(run: Path, text: TextEncoder, texts: list[str], world: World) -> None:
    """Puts the vectors of the data's instructions into the run folder, whence every checkpoint
    takes them: whoever loads one needs no encoder to read those."""
    if world.main and text.name != HASHED:
        save_table(run / "text.safetensors", text, texts)


def codec_of(layout: Layout, device: torch.device | str = "cpu") -> Codec:
    """The layout's codec with its weights. Raises RunError if they are not there."""
    return make_codec(layout.codec, layout.height, layout.width, layout.patch, device)


def window(layout: Layout, **rest: Any) -> WindowSpec:
    """The layout as the data loader's request; `rest` are WindowSpec's own fields."""
    return WindowSpec(
        layout.frame_offsets,
        layout.chunk,
        layout.height,
        layout.width,
        **rest,
    )


def epochs(mixture: Mixture, samples: int) -> dict[str, float]:
    """How often each source has been gone through, as a line of the log has it."""
    return {f"epoch/{name}": value for name, value in mixture.epochs(samples).items()}


def describe(kind: str, config: LoopConfig, model: ModelConfig, reader: Reader) -> dict[str, Any]:
    """A checkpoint's config.json."""
    some = next(iter(EMBODIMENTS.values()))
    return {
        "format": FORMAT,
        "kind": kind,
        "model": model.to_dict(),
        "layout": asdict(reader.layout),
        "embodiments": asdict(reader.robots),
        "text_encoder": reader.text.name,
        "action": {
            "names": list(ACTION_NAMES),
            "dim": ACTION_DIM,
            "frame": some.frame,
            "rotation": some.rotation,
            "gripper": some.gripper,
        },
        "provenance": {"command": shlex.join(sys.argv), "data": config.sources},
    }
