"""A world-model checkpoint, ready to be asked what comes next.

    world = load_world("outputs/pretrain")
    windows = Windows(open_source("data/open_drawer_place"), world.layout)
    seen = imagine(world, windows, [(3, 0)], horizon=8, sampling=Sampling(), seed=0)

B windows, T frames, N predicted frames, S windows in a row, K actions, L tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.normalize import denormalize_action, from_json
from selfflow.datasets.spec import ACTION_DIM, UserError
from selfflow.datasets.text import recorded_encoder
from selfflow.datasets.windows import Batch, Loader, Place
from selfflow.worldmodel.batches import Reader, user_errors, window
from selfflow.worldmodel.checkpoint import fill, load, parts_of
from selfflow.worldmodel.codec import make_codec
from selfflow.worldmodel.dream import Sampling, dream
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.transformer import ModelConfig, VideoActionTransformer
from selfflow.worldmodel.video_codec import Codec


@dataclass(frozen=True)
class World:
    """The moving-average model of a checkpoint and what turns episodes into its tokens."""

    name: str
    path: Path
    model: VideoActionTransformer
    reader: Reader
    trained_on: tuple[str, ...]  # the paths, as the training was given them

    @property
    def layout(self) -> Layout:
        """What a window holds."""
        return self.reader.layout

    @property
    def codec(self) -> Codec:
        """Frames <-> tokens."""
        assert self.reader.codec is not None  # None is for latents that are read from a file
        return self.reader.codec

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def saw(self, folder: str) -> bool:
        """Whether training read that very path, so that nothing of it is held out."""
        paths = (spec.rpartition("@")[0] or spec for spec in self.trained_on)
        return Path(folder).resolve() in {Path(p).resolve() for p in paths}


def load_world(path: str | Path, name: str | None = None, device: str = "cpu") -> World:
    """From a run or checkpoint folder of worldmodel/train.py. Raises UserError."""
    with user_errors():
        given = load(path, "worldmodel")
        with parts_of(given.path):
            layout = Layout.from_dict(given.config["layout"])
            robots = Robots(*(tuple(given.config["embodiments"][k]) for k in ("names", "rates")))
            model = VideoActionTransformer(ModelConfig.from_dict(given.config["model"]))
            fill(model, given.part("backbone"), str(given.path))
            codec = make_codec(layout.codec, layout.height, layout.width, layout.patch, device)
        text = recorded_encoder(given.config["text_encoder"], given.path / "text.safetensors")
        reader = Reader(layout, robots, from_json(given.statistics), codec, text)
        trained_on = tuple(given.config.get("provenance", {}).get("data", ()))
    model = model.eval().requires_grad_(False).to(device)
    return World(name or Path(path).name, given.path, model, reader, trained_on)


class Windows(Loader):
    """Windows of one source by episode and step, instead of by chance."""

    def __init__(self, source: EpisodeSource, layout: Layout) -> None:
        super().__init__([source], window(layout))
        self.source = source

    def at(self, places: Sequence[tuple[int, int]]) -> Batch:
        """The windows of these (episode, step)."""
        return self.load([Place(0, episode, t) for episode, t in places])


@dataclass(frozen=True)
class Imagined:
    """Predictions beside what happened; the frames of one window follow those of the one before."""

    shown: UInt8[np.ndarray, "B H W 3"]  # the last frame given
    frames: UInt8[np.ndarray, "B N H W 3"]
    real: UInt8[np.ndarray, "B N H W 3"]
    real_valid: Bool[np.ndarray, "B N"]  # the episode went on so long
    actions: Float32[np.ndarray, "B S K 7"]  # physical units; the real ones where they were given
    real_actions: Float32[np.ndarray, "B S K 7"]
    action_valid: Bool[np.ndarray, "B S K"]


def imagine(
    world: World,
    windows: Windows,
    places: Sequence[tuple[int, int]],
    horizon: int,
    sampling: Sampling,
    seed: int,
    actions: str = "given",
    instruction: str | None = None,
) -> Imagined:
    """`horizon` windows in a row from each place (episode, step), each seeing the last one's end.

    The model is shown the frames at the start, and afterwards only what it imagined, as pixels.
    Proprioception is known at the start alone; later it is marked absent. `actions` are the
    episode's own (given) or sampled with the frames (predicted). The instruction is the episode's
    own at each window's step unless one is given.
    """
    layout = world.layout
    if not layout.future:
        raise UserError(f"checkpoint {world.path} predicts no frames (layout.future=0)")
    generator = torch.Generator().manual_seed(seed)
    step, future = layout.future * layout.stride, slice(layout.context, None)
    ends = {episode: windows.source.length(episode) - 1 for episode, _ in places}
    batch, frames, parts = None, None, []
    for i in range(horizon):
        real = windows.at([(episode, min(t + i * step, ends[episode])) for episode, t in places])
        told = [instruction or own for own in real.instruction]
        batch = replace(_after(batch, frames, real, layout.context), instruction=told)
        frames, chunk = _predict(world, batch, sampling, generator, actions == "given")
        happened = real.frames[:, future], real.frame_valid[:, future]
        parts.append((frames, *happened, chunk, real.actions, real.action_valid))
    shown = windows.at(places).frames[:, layout.context - 1]
    frames, real_frames, real_valid = (np.concatenate([p[k] for p in parts], 1) for k in range(3))
    chunks, real_chunks, known = (np.stack([p[k] for p in parts], 1) for k in range(3, 6))
    return Imagined(shown, frames, real_frames, real_valid, chunks, real_chunks, known)


def _after(before: Batch | None, frames: np.ndarray | None, real: Batch, context: int) -> Batch:
    """The next window's batch: it sees the imagined frames, no proprioception, no real future."""
    if before is None or frames is None:
        return real
    seen = np.concatenate([before.frames[:, :context], frames], 1)[:, -context:]
    valid = np.concatenate([before.frame_valid[:, :context], np.ones(frames.shape[:2], bool)], 1)
    hidden = np.zeros_like(real.frames[:, context:])
    return replace(
        real,
        frames=np.concatenate([seen, hidden], 1),
        frame_valid=np.concatenate([valid[:, -context:], real.frame_valid[:, context:]], 1),
        proprio_valid=np.zeros_like(real.proprio_valid),
    )


def _predict(
    world: World, batch: Batch, sampling: Sampling, generator: torch.Generator, given: bool
) -> tuple[UInt8[np.ndarray, "B T H W 3"], Float32[np.ndarray, "B K 7"]]:
    """The window's future frames and actions in physical units."""
    model = world.model.config
    inputs = world.reader.tokens(batch, world.device)
    conditions = {m.name: inputs.tokens[m.name] for m in model.conditions}
    known = {m.name for m in model.conditions} | ({"action"} if given else set())
    valid = {name: x for name, x in inputs.valid.items() if name in known}
    action = {"action": inputs.tokens["action"]} if given else None
    found = dream(world.model, conditions, valid, sampling, generator, action)
    frames = world.codec.decode(found["video"]).cpu().numpy()[:, -world.layout.future :]
    return frames, batch.actions if given else physical(world, found["action"], batch.embodiment)


def physical(
    world: World, tokens: Tensor, embodiments: Sequence[str]
) -> Float32[np.ndarray, "B K 7"]:
    """Action tokens in the robots' units; nan for a robot without statistics."""
    scaled = tokens[..., :ACTION_DIM].float().cpu().numpy()
    rows = []
    for row, name in zip(scaled, embodiments, strict=True):
        own = world.reader.statistics.get(name)
        rows.append(np.full_like(row, np.nan) if own is None else denormalize_action(row, own))
    return np.stack(rows)
