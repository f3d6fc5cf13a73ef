"""A world model beside recorded episodes: imagined frames, and actions for what was really seen.

B windows, N frames, S windows in a row, K actions, F features of a clip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from rich.progress import Progress

from selfflow.datasets.episodes import EpisodeSource
from selfflow.eval.video_metrics import Lpips, VideoNet, clip_features, psnr, ssim
from selfflow.eval.world import Imagined, Windows, World, imagine
from selfflow.worldmodel.dream import Sampling

Places = list[tuple[int, int]]  # (episode, step)


@dataclass(frozen=True)
class Plan:
    """What is imagined for every episode."""

    starts: int
    horizon: int
    sampling: Sampling
    batch: int
    seed: int


@dataclass(frozen=True)
class Chosen:
    """The windows of a plan: (windows of a source, places, episodes numbered through all)."""

    plan: Plan
    parts: list[tuple[Windows, Places, list[int]]]

    def __len__(self) -> int:
        return sum(len(places) for _, places, _ in self.parts)

    def batches(self) -> Iterator[tuple[int, Windows, Places, list[int]]]:
        """Some windows at a time, with a number that seeds their noise."""
        number, size = 0, self.plan.batch
        for windows, places, episodes in self.parts:
            for i in range(0, len(places), size):
                yield number, windows, places[i : i + size], episodes[i : i + size]
                number += 1


@dataclass(frozen=True)
class VideoScores:
    """Of every imagined frame, by metric (B, N), and of every clip its features."""

    name: str  # of the checkpoint, or what stands in for one
    episode: Int[np.ndarray, "B"]
    frames: dict[str, Float[np.ndarray, "B N"]]  # nan where the episode was over
    fvd: str  # the metric's name
    features: Float[np.ndarray, "B F"]
    real_features: Float[np.ndarray, "B F"]


@dataclass(frozen=True)
class ActionErrors:
    """|predicted - real| in physical units, nan where there is no real action."""

    name: str
    episode: Int[np.ndarray, "B"]
    errors: Float[np.ndarray, "B K 7"]
    still: Float[np.ndarray, "B K 7"]  # of no motion, the gripper kept as it was measured


def plan_for(
    world: World, held: Sequence[tuple[EpisodeSource, Sequence[int]]], plan: Plan
) -> Chosen:
    """Starts spread evenly over each episode as far as all imagined frames exist."""
    ahead = plan.horizon * world.layout.future * world.layout.stride
    parts, first = [], 0
    for source, episodes in held:
        places, numbers = [], []
        for number, i in enumerate(episodes, start=first):
            last = max(0, source.length(i) - 1 - ahead)
            steps = np.unique(np.linspace(0, last, plan.starts).round().astype(int))
            places += [(i, int(t)) for t in steps]
            numbers += [number] * len(steps)
        parts.append((Windows(source, world.layout), places, numbers))
        first += len(episodes)
    return Chosen(plan, parts)


def video_scores(
    world: World, chosen: Chosen, actions: str, nets: tuple[Lpips, VideoNet], progress: Progress
) -> list[VideoScores]:
    """Of the model, and of keeping the last shown frame, which is what it has to beat."""
    plan, (lpips, net) = chosen.plan, nets
    task = progress.add_task(f"{world.name}: video", total=len(chosen))
    names = (world.name, "frame kept")
    scores = {name: _Gathered() for name in names}
    for number, windows, places, episodes in chosen.batches():
        seed = plan.seed + number
        seen = imagine(world, windows, places, plan.horizon, plan.sampling, seed, actions)
        still = np.broadcast_to(seen.shown[:, None], seen.real.shape).copy()
        real = clip_features(net, _clips(seen, seen.real))
        for name, frames in zip(names, (seen.frames, still), strict=True):
            own = scores[name]
            own.frames.append(_by_frame(frames, seen, lpips))
            own.features.append(clip_features(net, _clips(seen, frames)))
            own.real_features.append(real)
            own.episode += episodes
        progress.advance(task, len(places))
    return [scores[name].joined(name, net.name) for name in names]


def action_errors(world: World, chosen: Chosen, progress: Progress) -> ActionErrors:
    """Of one window from each start, actions sampled together with the frames."""
    plan = chosen.plan
    task = progress.add_task(f"{world.name}: actions", total=len(chosen))
    errors, still, numbers = [], [], []
    for number, windows, places, episodes in chosen.batches():
        seed = plan.seed + number
        seen = imagine(world, windows, places, 1, plan.sampling, seed, "predicted")
        real, known = seen.real_actions[:, 0], seen.action_valid[:, 0, :, None]
        proprio = windows.at(places).proprio
        rest = np.zeros_like(real)
        rest[..., -1] = proprio[:, -1:]
        errors.append(np.where(known, np.abs(seen.actions[:, 0] - real), np.nan))
        still.append(np.where(known, np.abs(rest - real), np.nan))
        numbers += episodes
        progress.advance(task, len(places))
    return ActionErrors(
        world.name, np.array(numbers), np.concatenate(errors), np.concatenate(still)
    )


class _Gathered:
    """Lists of what batches gave."""

    def __init__(self) -> None:
        self.episode: list[int] = []
        self.frames: list[dict[str, np.ndarray]] = []
        self.features: list[np.ndarray] = []
        self.real_features: list[np.ndarray] = []

    def joined(self, name: str, fvd: str) -> VideoScores:
        frames = {k: np.concatenate([f[k] for f in self.frames]) for k in self.frames[0]}
        features = np.concatenate(self.features), np.concatenate(self.real_features)
        return VideoScores(name, np.array(self.episode), frames, fvd, *features)


def _by_frame(
    frames: UInt8[np.ndarray, "B N H W 3"], seen: Imagined, lpips: Lpips
) -> dict[str, Float[np.ndarray, "B N"]]:
    one, real = (torch.from_numpy(x).flatten(0, 1) for x in (frames, seen.real))
    found = {"psnr": psnr(one, real), "ssim": ssim(one, real), lpips.name: lpips(one, real)}
    shape = frames.shape[:2]
    return {
        name: np.where(seen.real_valid, values.double().numpy().reshape(shape), np.nan)
        for name, values in found.items()
    }


def _clips(seen: Imagined, frames: UInt8[np.ndarray, "B N H W 3"]) -> torch.Tensor:
    """With the shown frame first, so that motion into the imagined part counts."""
    return torch.from_numpy(np.concatenate([seen.shown[:, None], frames], 1))
