"""What fixes an ablation: every key of configs/ablation.yaml, the arms, and what is checked."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfflow.configs.entry import one_of
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError, check_seeds, task_named


@dataclass(frozen=True)
class Arm:
    """One way to make a policy."""

    objective: str | None  # of the pretraining; None: there is none
    attention: str = "prefix"
    kept: bool = False  # whether fine-tuning keeps the pretraining's loss

    @property
    def pretraining(self) -> str:
        """Name of its pretraining, which arms that differ in fine-tuning only share."""
        return f"{self.objective}_full" if self.attention == "full" else str(self.objective)


# In this order, so that what the question is about is answered first.
ARMS = {
    "vanilla": Arm("vanilla"),
    "self_flow": Arm("self_flow"),
    "scratch": Arm(None),
    "self_flow_kept": Arm("self_flow", kept=True),
    "repa": Arm("repa"),
    "dual": Arm("dual"),
    "self_flow_full": Arm("self_flow", "full"),
    "self_flow_full_kept": Arm("self_flow", "full", kept=True),
}
REFERENCE = "vanilla"
MAIN = "main"  # the size that is rolled out too: that of the key `model`
# figures that the plan cannot do without
SECONDS = [*dict.fromkeys(arm.objective for arm in ARMS.values() if arm.objective)]
SECONDS += ["finetune", "finetune_kept", "episode", "curve", "video"]
SPREAD = ("success", "probe", "loss", "psnr")


@dataclass(frozen=True)
class AblationConfig:
    """Every key of configs/ablation.yaml, which explains them."""

    task: str
    data: Any
    heldout: str
    out: str
    records: str
    document: str
    trainings: int
    only: list[str]
    seeds: list[int]
    minutes: float
    plan: bool
    model: str
    pretrain_steps: int
    curve_points: int
    finetune_steps: int
    fractions: list[float]
    kept_weight: float
    episodes: int
    seed: int
    sizes: dict[str, Any]
    size_arms: list[str]
    pretrain: list[str]
    finetune: list[str]
    curve: list[str]
    video: list[str]
    rollout: list[str]
    processes: int
    threads: int
    workers: int
    seconds: dict[str, float]
    spread: dict[str, float]
    rate: float

    def __post_init__(self) -> None:
        least = {"trainings": 1, "episodes": 1, "curve_points": 2}
        least |= {"processes": 1, "threads": 1, "workers": 1}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)}: must be {low} or more")
        if self.pretrain_steps % self.curve_points:
            raise ValueError(
                f"pretrain_steps={self.pretrain_steps}: must be a multiple of "
                f"curve_points={self.curve_points}"
            )
        steps = [self.finetune_steps * share for share in self.fractions]
        if not steps or sorted(self.fractions)[-1] != 1 or min(steps) <= 0:
            raise ValueError(f"fractions={self.fractions}: shares of 1, the last of them 1")
        if any(abs(s - round(s)) > 1e-6 for s in steps):
            raise ValueError(
                f"fractions={self.fractions} of finetune_steps={self.finetune_steps}: must be "
                "whole steps"
            )
        if self.minutes < 0 or not 0 < self.rate < 1 or self.kept_weight <= 0:
            raise ValueError("minutes must not be negative, rate in 0 .. 1, kept_weight positive")

    @property
    def paths(self) -> list[str]:
        """Of the data: one or several, as a list."""
        return [self.data] if isinstance(self.data, str) else [str(path) for path in self.data]

    @property
    def points(self) -> list[int]:
        """Steps of the pretraining at which it is measured."""
        every = self.pretrain_steps // self.curve_points
        return list(range(every, self.pretrain_steps + 1, every))

    @property
    def marks(self) -> list[int]:
        """Steps of the fine-tuning at which it is rolled out."""
        return sorted(round(self.finetune_steps * share) for share in self.fractions)

    @property
    def save_every(self) -> int:
        """Of the fine-tuning, so that a checkpoint lies at every mark."""
        return math.gcd(*self.marks)


def check(config: AblationConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    check_plan(config)
    if config.plan:
        return
    open_sources(config.paths)
    if not Path(config.heldout).is_dir():
        raise UserError(
            f"heldout={config.heldout}: no such folder; record it from seeds that training has not "
            f"seen: python eval/record_demos.py task={config.task} episodes=60 seed=90000 "
            f"out={config.heldout}"
        )
    if both := sorted(recorded(config.paths) & recorded([config.heldout])):
        raise UserError(
            f"heldout={config.heldout}: {len(both)} of its episodes are in data too, such as seed "
            f"{both[0][1]} of {both[0][0]}; record it from other seeds"
        )


def recorded(paths: list[str]) -> set[tuple[str, int]]:
    """Task and seed of every episode that says them. Raises UserError."""
    sources, _ = open_sources(paths)
    told = [source.metadata(i) for source in sources for i in range(len(source))]
    return {(str(m["task"]), int(m["seed"])) for m in told if {"task", "seed"} <= m.keys()}


def check_plan(config: AblationConfig) -> None:
    """Raises UserError for arms, seeds, sizes and figures that make no plan."""
    for arm in config.only:
        one_of("only", arm, [*ARMS, *config.sizes])
    for arm in config.size_arms:
        one_of("size_arms", arm, [name for name in ARMS if ARMS[name].objective])
    if REFERENCE not in config.size_arms and config.sizes:
        raise UserError(f"size_arms: must name {REFERENCE}, which the others are to reach")
    if bad := [seed for seed in config.seeds if not 0 <= seed < config.trainings]:
        raise UserError(
            f"seeds={bad}: choose of 0 .. {config.trainings - 1}, the planned trainings"
        )
    if bad := [name for name in config.sizes if name in (MAIN, *ARMS)]:
        raise UserError(f"sizes.{bad[0]}: {MAIN} and the arms are names already; choose another")
    for key, needed in {"seconds": SECONDS, "spread": SPREAD}.items():
        if missing := [name for name in needed if name not in getattr(config, key)]:
            raise UserError(f"{key}.{missing[0]}=... is required: the plan is made with it")
    task_named(config.task)
    check_seeds(config.seed, config.episodes, "test")
