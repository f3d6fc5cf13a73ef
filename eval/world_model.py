"""python eval/world_model.py checkpoint=outputs/pretrain data=[data/open_drawer_place_heldout]

Measures world models on held-out episodes: imagined frames against real ones (PSNR, SSIM, LPIPS,
FVD), actions sampled for real observations against those taken (open loop), a linear probe of what
the features hold, and, with parts=[loss], the flow loss. Several checkpoints are compared on the
same windows, with the same noise:

    python eval/world_model.py checkpoint=[outputs/self_flow,outputs/vanilla] data=[data/heldout]

Fresh demonstrations: eval/record_demos.py seed=90000 out=data/heldout. Writes results.json,
results.md, video.png and probe.png to `out`. All intervals are 95 %, by resampling episodes;
differences are to the first checkpoint and paired. Every key: configs/world_model.yaml.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.eval import world_tables as tables
from selfflow.eval.held_loss import held_losses
from selfflow.eval.imagine import ACTIONS
from selfflow.eval.open_loop import Plan, action_errors, plan_for, video_scores
from selfflow.eval.probe import ProbeConfig, Row, probe, random_world, true_state
from selfflow.eval.results import write_json
from selfflow.eval.video_metrics import Lpips, torchmetrics_images, video_net
from selfflow.eval.world import World, load_world
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import load
from selfflow.worldmodel.dream import Sampling
from selfflow.worldmodel.parallel import place

PARTS = ("video", "actions", "probe", "loss")
Held = list[tuple[EpisodeSource, range]]  # sources and their held-out episodes


@dataclass(frozen=True)
class WorldModelConfig:
    """Every key of configs/world_model.yaml, which explains them."""

    checkpoint: Any
    names: list[str] | None
    data: Any
    out: str
    holdout: float
    parts: list[str]
    starts: int
    horizon: int
    actions: str
    steps: int
    sampler: str
    guidance: float
    shift: float
    lpips: str | None
    fvd: str | None
    frames: int
    folds: int
    taus: list[float]
    random: bool
    bootstrap: int
    batch: int
    device: str
    threads: int
    seed: int

    def __post_init__(self) -> None:
        assert self.sampling
        least = {"starts": 1, "horizon": 1, "frames": 1, "bootstrap": 2, "batch": 1, "folds": 2}
        for key, low in (least | {"threads": 0, "seed": 0}).items():
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)}: must be {low} or more")
        if not 0 < self.holdout <= 1 or not all(0 <= tau <= 1 for tau in self.taus):
            raise ValueError(f"holdout={self.holdout} and taus={self.taus}: shares of 1")

    @property
    def sampling(self) -> Sampling:
        """How noise becomes data. Raises ValueError."""
        return Sampling(self.sampler, self.steps, self.shift, self.guidance)

    @property
    def checkpoints(self) -> list[str]:
        """One or several, as a list."""
        given = self.checkpoint
        return [given] if isinstance(given, str) else [str(path) for path in given]

    @property
    def paths(self) -> list[str]:
        """Of the data: one or several, as a list."""
        return [self.data] if isinstance(self.data, str) else [str(path) for path in self.data]

    @property
    def labels(self) -> list[str]:
        """A distinct name each. Raises UserError."""
        paths = self.checkpoints
        names = self.names or [Path(path).name for path in paths]
        names = names if len(set(names)) == len(names) or self.names else paths
        if len(names) != len(paths) or len(set(names)) != len(names):
            raise UserError(f"names={names}: give one, each another, for each of {paths}")
        return names

    @property
    def probing(self) -> ProbeConfig:
        """The probe's own keys."""
        taus = tuple(self.taus)
        return ProbeConfig(self.frames, self.folds, taus, self.bootstrap, self.batch, self.seed)


def check(config: WorldModelConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    for part in config.parts:
        one_of("parts", part, PARTS)
    one_of("actions", config.actions, ACTIONS)
    assert config.labels
    held = held_out(config)
    if "video" in config.parts:
        torchmetrics_images()
        Lpips(config.lpips)
        video_net(config.fvd)
    if "probe" in config.parts:
        count = sum(len(episodes) for _, episodes in held)
        if count < config.folds:
            raise UserError(f"folds={config.folds}: data have {count} episodes; give more, or less")
        for source, episodes in held:
            true_state(source, episodes[0])
    with user_errors():
        for path in config.checkpoints:
            load(path, "worldmodel")
        assert place("none", config.device)


def main(config: WorldModelConfig) -> dict[str, Any]:
    """Measures, writes, prints; returns what results.json holds."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with user_errors():
        device = str(place("none", config.device).device)
    console = Console() if Console().is_terminal else Console(width=160)
    held = held_out(config)
    worlds = [
        load_world(path, name, device)
        for path, name in zip(config.checkpoints, config.labels, strict=True)
    ]
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    sections = measured(config, worlds, held, folder, console)
    notes = remarks(config, worlds, held)
    result = {
        "config": asdict(config) | {"checkpoint": [str(w.path) for w in worlds]},
        "episodes": {source.name: [*episodes] for source, episodes in held},
        "notes": notes,
        **{section.key: section.content() for section in sections},
    }
    write_json(folder / "results.json", result)
    tables.write_markdown(folder / "results.md", sections, notes)
    for section in sections:
        if section.printed:
            console.print(section.table())
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"Tables, numbers and plots: {folder}", soft_wrap=True)
    return result


def measured(
    config: WorldModelConfig, worlds: list[World], held: Held, folder: Path, console: Console
) -> list[tables.Section]:
    """The parts' tables, in order; their plots go to the folder."""
    sections: list[tables.Section] = []
    count = sum(len(episodes) for _, episodes in held)
    resampling = (count, config.bootstrap, config.seed)
    plan = Plan(config.starts, config.horizon, config.sampling, config.batch, config.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        if "video" in config.parts:
            nets = Lpips(config.lpips), video_net(config.fvd)
            scores = [
                video_scores(w, plan_for(w, held, plan), config.actions, nets, progress)
                for w in worlds
            ]
            sections.append(tables.video(scores, *resampling))
            tables.plot_video(folder / "video.png", scores, *resampling)
        if "actions" in config.parts:
            errors = [action_errors(w, plan_for(w, held, plan), progress) for w in worlds]
            sections.append(tables.actions(errors, *resampling))
        if "loss" in config.parts:
            losses = [held_losses(w, plan_for(w, held, plan), progress) for w in worlds]
            sections.append(tables.loss(losses, *resampling))
        if "probe" in config.parts:
            probed = [*worlds, *(_random(worlds, config.seed) if config.random else [])]
            rows: list[Row] = []
            for world in progress.track(probed, description="probe"):
                rows += probe(world, held, config.probing)
            sections += tables.probe(rows, [w.name for w in worlds])
            tables.plot_probe(folder / "probe.png", rows)
    return sections


def held_out(config: WorldModelConfig) -> Held:
    """The last share of each source's episodes. Raises UserError."""
    sources, _ = open_sources(config.paths)
    held = []
    for source in sources:
        count = max(1, round(config.holdout * len(source)))
        held.append((source, range(len(source) - count, len(source))))
    if sum(len(episodes) for _, episodes in held) < 2:
        raise UserError("data: a single episode gives no interval; give two or more")
    return held


def remarks(config: WorldModelConfig, worlds: Sequence[World], held: Held) -> list[str]:
    """What a reader of the numbers must know."""
    notes = [
        f"{sum(len(e) for _, e in held)} episodes; intervals are 95 %, by resampling episodes; "
        f"sampler {config.sampler}, {config.steps} steps, guidance {config.guidance:g}, "
        f"shift {config.shift:g}; actions {config.actions} while imagining."
    ]
    if "video" in config.parts:
        notes.append(
            "PSNR (dB) and SSIM: more is better; LPIPS and FVD: less. 'frame kept' is the last "
            "shown frame in place of every imagined one: what a model has to beat."
        )
    for world in worlds:
        for path in config.paths:
            if world.saw(path.rpartition("@")[0] or path):
                notes.append(f"{world.name} was trained on {path}: these numbers are not held out.")
    if "loss" in config.parts:
        notes.append("Loss: every target token of a window at one time, whatever the objective.")
    if "probe" in config.parts:
        notes.append(
            "Probe: proprioception and actions were hidden from the model and the instruction kept "
            "constant; block 0 are the codec's tokens. R² is 1 for a perfect reading, 0 for the "
            "mean of all."
        )
    return notes


def _random(worlds: list[World], seed: int) -> list[World]:
    """One with random weights for each distinct model."""
    distinct = {world.model.config: world for world in reversed(worlds)}
    return [random_world(world, seed) for world in reversed(distinct.values())]


if __name__ == "__main__":
    launch(WorldModelConfig, main, "world_model", check=check)
