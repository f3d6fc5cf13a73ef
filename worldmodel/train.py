"""python worldmodel/train.py model=tiny data=[data/open_drawer_place@0.7,path/to/bridge@0.3]

Pretrains the video-action transformer with Self-Flow: given an instruction, the robot and what it
sees now, predict future frames and the next actions. On a laptop: `... steps=200 batch=16
minutes=5`. Every key is explained in configs/train.yaml. Stop it as you like: the same command goes
on, to the same losses.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfflow.configs.entry import launch
from selfflow.datasets.normalize import (
    FEATURES,
    Statistics,
    fit,
    from_json,
    normalize_action,
    proprio_features,
    to_json,
)
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import ACTION_DIM, ACTION_NAMES, EMBODIMENTS, UserError
from selfflow.datasets.text import ENCODER, embed_batch
from selfflow.datasets.windows import Batch, Mixture, WindowSpec, prefetch
from selfflow.worldmodel import flow
from selfflow.worldmodel.checkpoint import FORMAT, RunError, last, load
from selfflow.worldmodel.layers import Projector
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.loop import (
    Amounts,
    LoopConfig,
    State,
    check_run,
    generator,
    open_run,
    start,
)
from selfflow.worldmodel.transformer import ModelConfig, Tokens, VideoActionTransformer


@dataclass(frozen=True)
class ModelSize:
    """A file of configs/model."""

    hidden: int = 192
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Every key of configs/train.yaml, which explains them."""

    out: str = "outputs/pretrain"
    model: ModelSize = field(default_factory=ModelSize)
    layout: Layout = field(default_factory=Layout)
    attention: str = "prefix"
    objective: str = "self_flow"
    distribution: str = "uniform"
    time_shift: float = 1.0
    context_noise: float = 0.0
    video_mask: float = 0.1
    action_mask: float = 0.1
    video_weight: float = 1.0
    action_weight: float = 1.0
    gamma: float = 0.8
    student_at: float = 0.3
    teacher_at: float = 0.7
    rep_tokens: str = "target"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rep_tokens not in ("target", "all"):
            raise ValueError(f"rep_tokens={self.rep_tokens}: choose target or all")
        if self.noise.objective == "self_flow" and self.blocks[0] >= self.blocks[1]:
            raise ValueError(
                f"student block {self.blocks[0]} must lie below teacher {self.blocks[1]}"
            )

    @property
    def noise(self) -> flow.Schedule:
        """Timesteps and objective."""
        return flow.Schedule(self.objective, self.distribution, self.time_shift, self.context_noise)

    @property
    def transformer(self) -> ModelConfig:
        """The model's full description."""
        modalities = self.layout.modalities(
            self.video_mask, self.action_mask, self.video_weight, self.action_weight
        )
        return ModelConfig(**asdict(self.model), attention=self.attention, modalities=modalities)

    @property
    def blocks(self) -> tuple[int, int]:
        """Student's and teacher's block, 1-based."""
        return self.transformer.block_at(self.student_at), self.transformer.block_at(
            self.teacher_at
        )


def check(config: TrainConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    with user_errors():
        check_run(config)


def main(config: TrainConfig) -> None:
    """Trains until `steps` or `minutes` are over, or a signal says stop."""
    with user_errors():
        device = start(config)
        sources, weights = open_sources(config.sources)
        mixture, statistics = prepare(config, sources, weights, window(config.layout))
        robots = Robots(tuple(EMBODIMENTS), tuple(e.control_hz for e in EMBODIMENTS.values()))
        robots = robots.extended(rates(sources))
        student = Student(config.transformer).to(device)
        state = State(student, config)
        meta = describe("worldmodel", config, config.transformer, config.layout, robots)
        with open_run(config, state, "pretrain", amounts(sources)) as run:
            batches = prefetch(mixture, range(state.step, config.steps), config.batch)
            for step, batch in run.batches(batches):
                inputs = batch_tokens(batch, config.layout, robots, statistics).to(device)
                random = generator(config.seed, step)
                values = losses(student, state.average, inputs, config, random)
                norm = state.update(values["loss"], config.batch, batch.ids)
                run.log(config.batch, **values, grad_norm=norm)
                if run.due():
                    run.save(meta, to_json(statistics))
            run.save(meta, to_json(statistics))
            run.finish()


class Student(nn.Module):
    """What is trained. Its moving average is the teacher and needs no projector, but has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = VideoActionTransformer(config)
        self.projector = Projector(config.hidden)


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


def losses(
    student: Student,
    average: Student,
    inputs: Inputs,
    config: TrainConfig,
    random: torch.Generator,
) -> dict[str, Tensor]:
    """`loss` and its terms for one batch, all with one draw of times, mask and noise."""
    transformer: ModelConfig = config.transformer
    noised = flow.draw(inputs.tokens, transformer, config.noise, random)
    distill = config.objective == "self_flow"
    student_block, teacher_block = config.blocks
    with autocast(config, noised.tau.device):
        velocity, feature = student.backbone.forward_with_feature(
            noised.tokens,
            noised.tau,
            noised.group,
            inputs.valid,
            student_block if distill else None,
        )
        terms = flow.flow_loss(velocity, noised.velocity, inputs.mask)
        loss = torch.stack([m.weight * terms[m.name] for m in transformer.targets]).sum()
        if feature is not None:
            seen = flow.teacher_view(noised, inputs.tokens, transformer)
            with torch.no_grad():
                aim = average.backbone.features(
                    seen.tokens, seen.tau, seen.group, inputs.valid, teacher_block
                )
            first = 0 if config.rep_tokens == "all" else transformer.prefix_length
            terms["rep"] = flow.representation_loss(
                student.projector(feature[:, first:]),
                aim[:, first:],
                all_valid(inputs, transformer)[:, first:],
            )
            terms["cosine"] = 1 - terms["rep"].detach()
            loss = loss + config.gamma * terms["rep"]
    return {"loss": loss} | terms


def all_valid(inputs: Inputs, transformer: ModelConfig) -> Tensor:
    """Bool (B, L): which tokens of the whole sequence are real."""
    size = len(next(iter(inputs.tokens.values())))
    device = next(iter(inputs.tokens.values())).device
    parts = [
        inputs.valid.get(m.name, torch.ones(size, m.length, dtype=torch.bool, device=device))
        for m in transformer.modalities
    ]
    return torch.cat(parts, 1)


# What fine-tuning shares.


@contextmanager
def user_errors() -> Iterator[None]:
    """worldmodel's own one-line errors as the entry points' UserError."""
    try:
        yield
    except RunError as e:
        raise UserError(str(e)) from e


def autocast(config: LoopConfig, device: torch.device) -> torch.autocast:
    """bf16 matrix products, or plain fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def rates(sources: list[Any]) -> dict[str, float]:
    """Control rate of every embodiment in the data."""
    return {s.embodiment.name: s.embodiment.control_hz for s in sources}


def report_data(sources: list[Any]) -> None:
    """One line a source, with what was left out."""
    for s in sources:
        print(f"data: {s.name}, {s.embodiment.name}, {len(s)} episodes, {s.skipped} skipped")


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
    """The mixture, and statistics of the data or of the run that goes on.

    Draws a sample of every source, so that what is wrong with one is said before `out` exists.
    """
    report_data(sources)
    mixture = Mixture(sources, weights, spec, config.seed)
    for source in sources:
        Mixture([source], [1.0], spec, config.seed).batch(0, 1)
    resumed = last(Path(config.out))
    return mixture, from_json(load(resumed).statistics) if resumed else fit(sources)


def window(layout: Layout, shift: int = 0, only_with_actions: bool = False) -> WindowSpec:
    """The layout as the data loader's request."""
    return WindowSpec(
        layout.frame_offsets,
        layout.chunk,
        layout.height,
        layout.width,
        shift=shift,
        only_with_actions=only_with_actions,
    )


def describe(
    kind: str, config: LoopConfig, model: ModelConfig, layout: Layout, robots: Robots
) -> dict[str, Any]:
    """A checkpoint's config.json."""
    some = next(iter(EMBODIMENTS.values()))
    return {
        "format": FORMAT,
        "kind": kind,
        "model": model.to_dict(),
        "layout": asdict(layout),
        "embodiments": asdict(robots),
        "text_encoder": ENCODER,
        "action": {
            "names": list(ACTION_NAMES),
            "dim": ACTION_DIM,
            "frame": some.frame,
            "rotation": some.rotation,
            "gripper": some.gripper,
        },
        "provenance": {"command": shlex.join(sys.argv), "data": config.sources},
    }


def batch_tokens(
    batch: Batch, layout: Layout, robots: Robots, statistics: dict[str, Statistics]
) -> Inputs:
    """A batch in physical units as normalised tokens."""
    frames, frame_valid = torch.from_numpy(batch.frames), torch.from_numpy(batch.frame_valid)
    proprio, actions = normalised(batch, statistics)
    conditions, valid = layout.condition_tokens(
        frames,
        frame_valid,
        torch.from_numpy(embed_batch(batch.instruction)),
        robots.tokens(batch.embodiment),
        torch.from_numpy(proprio),
        torch.from_numpy(batch.proprio_valid),
    )
    targets, target_valid, mask = layout.target_tokens(
        frames,
        frame_valid,
        torch.from_numpy(actions),
        torch.from_numpy(batch.action_valid),
        torch.from_numpy(batch.terminate),
        torch.from_numpy(batch.terminate_valid),
    )
    return Inputs(conditions | targets, valid | target_valid, mask)


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


if __name__ == "__main__":
    launch(TrainConfig, main, "train", check=check)
