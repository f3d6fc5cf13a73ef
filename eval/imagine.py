"""python eval/imagine.py checkpoint=outputs/pretrain episode=data/open_drawer_place:3

Imagines how an episode goes on: from its frames up to `start`, its instruction and, with
actions=given, its actions, the world model predicts the video; with actions=predicted the actions
too. Long futures are made of windows: each sees the last imagined frame of the one before, and
proprioception at the start only. Writes to `out`: imagined.mp4 and imagined.png (real | imagined),
actions.png (real and predicted actions), imagined.json (what was asked; PSNR by frame). Every key
is explained in configs/imagine.yaml.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import ACTION_NAMES, UserError
from selfflow.eval.chart import Line, Panel, save_chart
from selfflow.eval.results import write_json
from selfflow.eval.video import Film, captioned, contact_sheet
from selfflow.eval.video_metrics import psnr
from selfflow.eval.world import Imagined, Windows, World, imagine, load_world
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import load
from selfflow.worldmodel.dream import Sampling
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.parallel import place

ACTIONS = ("given", "predicted")
FPS = 4.0  # of the film: one frame stands for `stride` control steps, over a second of RT-1
GAP = 8  # pixels beside each frame
SHOWN_WIDTH = 320  # of a frame in film and sheet, at least


@dataclass(frozen=True)
class ImagineConfig:
    """Every key of configs/imagine.yaml, which explains them."""

    checkpoint: str
    episode: str
    out: str
    start: int
    horizon: int | None
    actions: str
    instruction: str | None
    steps: int
    sampler: str
    guidance: float
    shift: float
    seed: int
    device: str
    threads: int

    @property
    def sampling(self) -> Sampling:
        """How. Raises ValueError."""
        return Sampling(self.sampler, self.steps, self.shift, self.guidance)

    @property
    def where(self) -> tuple[str, int]:
        """The data's path, and the episode's number. Raises UserError."""
        path, colon, number = self.episode.rpartition(":")
        if not colon or not number.isdecimal():
            raise UserError(f"episode={self.episode}: give a path and a number, as data/store:3")
        return path, int(number)

    def __post_init__(self) -> None:
        if self.sampling.steps and self.start < 0:
            raise ValueError(f"start={self.start}: must be 0 or more")
        if self.threads < 0 or (self.horizon is not None and self.horizon < 1):
            raise ValueError(
                f"horizon={self.horizon} must be 1 or more, threads={self.threads} 0 or more"
            )


def check(config: ImagineConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    one_of("actions", config.actions, ACTIONS)
    path, number = config.where
    source = open_source(path)
    if number >= len(source):
        raise UserError(f"episode={config.episode}: {path} has episodes 0..{len(source) - 1}")
    with user_errors():
        load(config.checkpoint, "worldmodel")
        assert place("none", config.device)


def main(config: ImagineConfig) -> dict[str, Any]:
    """Imagines, writes, prints; returns what imagined.json holds."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with user_errors():
        device = place("none", config.device).device
    world = load_world(config.checkpoint, device=str(device))
    path, number = config.where
    source = open_source(path)
    windows = Windows(source, world.layout)
    horizon = _horizon(config, world, source.length(number))
    console = Console() if Console().is_terminal else Console(width=120)
    with console.status(f"imagining {horizon} windows of {config.steps} steps"):
        seen = imagine(
            world,
            windows,
            [(number, config.start)],
            horizon,
            config.sampling,
            config.seed,
            config.actions,
            config.instruction,
        )
    told = instructions(config, source, seen.frames.shape[1], world.layout)
    result = {"episode": config.episode, "start": config.start, "actions": config.actions}
    result |= {"checkpoint": str(world.path), "instruction": told[1:]}
    asked = ("steps", "sampler", "guidance", "shift", "seed")
    result |= {key: getattr(config, key) for key in asked} | quality(seen)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    frames = side_by_side(seen, told, config.start, world.layout.stride)
    with Film(folder / "imagined.mp4", FPS) as film:
        for frame in frames:
            film.add(frame)
    contact_sheet(frames, folder / "imagined.png", columns=3)
    if config.actions == "predicted":
        save_chart(action_panels(seen, world, config.start), folder / "actions.png", columns=4)
    else:
        (folder / "actions.png").unlink(missing_ok=True)  # of another run
    write_json(folder / "imagined.json", result)
    _report(console, world, path, result, folder)
    return result


def instructions(
    config: ImagineConfig, source: EpisodeSource, frames: int, layout: Layout
) -> list[str]:
    """What the model was told, for the shown frame and each imagined one: a window's instruction
    is the episode's own where the window begins."""
    _, number = config.where
    own, step = source.signals(number).instruction, layout.future * layout.stride
    begins = [config.start + max(i - 1, 0) // layout.future * step for i in range(frames + 1)]
    return [config.instruction or own[min(t, len(own) - 1)] for t in begins]


def quality(seen: Imagined) -> dict[str, Any]:
    """PSNR (dB) of each imagined frame, and of the last shown frame in its place."""
    real, frames = torch.from_numpy(seen.real[0]), torch.from_numpy(seen.frames[0])
    still = torch.from_numpy(seen.shown[0])[None].expand(real.shape)
    known = seen.real_valid[0].tolist()
    pairs = {"psnr": psnr(frames, real), "psnr_of_standing_still": psnr(still, real)}
    return {
        name: [round(float(v), 2) if ok else None for v, ok in zip(values, known, strict=True)]
        for name, values in pairs.items()
    }


def side_by_side(
    seen: Imagined, instruction: list[str], start: int, stride: int
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Real | imagined, captioned, beginning with the frame that was shown."""
    real = [seen.shown[0], *seen.real[0]]
    imagined = [seen.shown[0], *seen.frames[0]]
    known = [True, *seen.real_valid[0]]
    out = []
    for i, (left, right) in enumerate(zip(real, imagined, strict=True)):
        left = left if known[i] else np.full_like(left, 24)  # the episode is over
        pair = [_enlarged(left), _enlarged(right)]
        gap = np.full((pair[0].shape[0], GAP, 3), 24, np.uint8)
        picture = np.concatenate([pair[0], gap, pair[1], gap], 1)
        what = "real | imagined" if i else "shown"
        out.append(captioned(picture, f"{instruction[i]}   ({what})", start + i * stride, False))
    return out


def action_panels(seen: Imagined, world: World, start: int) -> list[Panel]:
    """A panel a dimension: the real actions, and of each window those up to the next."""
    layout = world.layout
    step = layout.future * layout.stride
    used = min(step, layout.chunk)
    windows = seen.actions.shape[1]
    at = [start + w * step + k for w in range(windows) for k in range(used)]
    panels = []
    for d, name in enumerate(ACTION_NAMES):
        known = seen.action_valid[0, :, :used]
        real = np.where(known, seen.real_actions[0, :, :used, d], np.nan).ravel()
        guess = seen.actions[0, :, :used, d].ravel()
        lines = [Line("real", at, real.tolist()), Line("predicted", at, guess.tolist())]
        panels.append(Panel(name, "control step", lines))
    return panels


def _horizon(config: ImagineConfig, world: World, length: int) -> int:
    """Windows that the episode still has, or as many as were asked for."""
    step = world.layout.future * world.layout.stride
    if step == 0:
        raise UserError(f"checkpoint={config.checkpoint}: predicts no frames (layout.future=0)")
    if config.start >= length - 1:
        raise UserError(f"start={config.start}: the episode has steps 0..{length - 1}")
    return config.horizon or max(1, (length - 1 - config.start) // step)


def _enlarged(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    factor = max(1, -(-SHOWN_WIDTH // image.shape[1]))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _report(
    console: Console, world: World, path: str, result: dict[str, Any], folder: Path
) -> None:
    """A line on the numbers, one on what they are not, one on where the files lie."""
    names = ("psnr", "psnr_of_standing_still")
    means = [np.mean([v for v in result[name] if v is not None]) for name in names]
    console.print(
        f"PSNR {means[0]:.1f} dB over {len(result['psnr'])} frames; "
        f"the shown frame kept as it is: {means[1]:.1f} dB",
        highlight=False,
    )
    if world.saw(path):
        console.print(f"{path} is training data of this checkpoint: it may know the episode")
    console.print(f"Film, contact sheet and numbers: {folder}", soft_wrap=True)


if __name__ == "__main__":
    launch(ImagineConfig, main, "imagine", check=check)
