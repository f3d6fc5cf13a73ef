"""python policies/finetune.py model=tiny init=outputs/pretrain data=data/open_drawer_place

Makes a policy: the pretrained backbone's first blocks read the conditions, and an action head is
trained with them by flow matching. `init=null` starts from nothing. On a laptop: `... steps=200
batch=16 minutes=5`. Every key is explained in configs/finetune.yaml. Stop it as you like: the same
command goes on, to the same losses.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfflow.configs.entry import launch
from selfflow.datasets.augment import Augment
from selfflow.datasets.compatibility import settle
from selfflow.datasets.loading import prefetch
from selfflow.datasets.normalize import Statistics, from_json, to_json
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.text import text_encoder
from selfflow.policies.head import HeadConfig, PolicyModel
from selfflow.worldmodel import flow
from selfflow.worldmodel.batches import (
    Inputs,
    Reader,
    amounts,
    autocast,
    codec_of,
    describe,
    embodiments,
    epochs,
    keep_texts,
    prepare,
    readable,
    split,
    user_errors,
    window,
)
from selfflow.worldmodel.checkpoint import Checkpoint, fill, last, load, parts_of
from selfflow.worldmodel.codec import resolved
from selfflow.worldmodel.layout import ACTION_CHANNELS, TEXT_CHANNELS, Layout, Robots
from selfflow.worldmodel.loop import LoopConfig, State, generator, start
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.run_folder import check_run, open_run
from selfflow.worldmodel.train_config import ModelSize


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """Every key of configs/finetune.yaml, which explains them."""

    out: str = "outputs/policy"
    init: str | None = None
    scale_by: str | None = None
    text: str = "hash384"
    text_path: str | None = None
    model: ModelSize = field(default_factory=ModelSize)
    layout: Layout = field(default_factory=lambda: Layout(future=0))
    read_at: float = 0.7
    head_depth: int = 3
    draws: int = 4
    distribution: str = "uniform"
    time_shift: float = 1.0
    terminate_weight: float = 1.0
    shift: int = 4
    augment: Augment = field(default_factory=Augment)
    jitter: float = 0.0
    proprio_dropout: float = 0.0
    sampling_steps: int = 8
    execute: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout.future:
            raise ValueError("layout.future: a policy predicts no frames; leave it at 0")
        if min(self.draws, self.head_depth, self.sampling_steps) < 1 or self.shift < 0:
            raise ValueError(
                "draws, head_depth and sampling_steps are at least 1, shift at least 0"
            )
        if not 1 <= self.execute <= self.layout.chunk:
            raise ValueError(
                f"execute={self.execute}: choose 1 .. layout.chunk={self.layout.chunk}"
            )
        if not 0 <= self.proprio_dropout < 1 or not 0 <= self.jitter < 1:
            raise ValueError("proprio_dropout and jitter lie in 0 .. 1")
        if self.scale_by not in (None, "data", "init"):
            raise ValueError(f"scale_by={self.scale_by}: choose data or init, or leave it out")
        if self.scale_by == "init" and self.init is None:
            raise ValueError("scale_by=init: there is no init; leave it out")
        if self.text not in TEXT_CHANNELS:
            raise ValueError(f"text={self.text}: choose one of {', '.join(TEXT_CHANNELS)}")
        if not 0 <= self.read_at <= 1:
            raise ValueError(f"read_at={self.read_at}: a share of the depth, in 0 .. 1")
        if self.jitter and self.layout.codec.kind != "patch":
            raise ValueError(
                f"jitter={self.jitter} changes pixels, not latents of "
                f"codec.kind={self.layout.codec.kind}; leave it at 0"
            )
        flow.Schedule(distribution=self.distribution, shift=self.time_shift)
        _ = self.encoder, self.head  # which check the model

    @property
    def encoder(self) -> ModelConfig:
        """The backbone's part that reads the conditions."""
        modalities = self.layout.modalities(
            text=(1, TEXT_CHANNELS[self.text]), rope=self.model.positions == "rope"
        )
        whole = ModelConfig(**asdict(self.model), attention="prefix", modalities=modalities)
        return whole.encoder(whole.block_at(self.read_at))

    @property
    def head(self) -> HeadConfig:
        """The action head, as wide as the backbone."""
        m = self.model
        return HeadConfig(
            m.hidden,
            self.head_depth,
            m.heads,
            m.mlp_ratio,
            self.layout.chunk,
            ACTION_CHANNELS,
            m.hidden,
        )


def check(config: FinetuneConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    with user_errors():
        check_run(config)
        if config.init is not None:
            check_init(config, load(config.init))


def main(config: FinetuneConfig) -> None:
    """Trains until `steps` or `minutes` are over, or a signal says stop."""
    with user_errors(), start(config) as world:
        sources, weights = open_sources(config.sources)
        changes = {"shift": config.shift, "augment": config.augment}
        spec = window(config.layout, only_with_actions=True, **changes)
        mixture, statistics = prepare(config, sources, weights, spec)
        statistics = scaling(config, statistics)
        student, known = build(config)
        layout, text = config.layout, text_encoder(config.text, config.text_path)
        robots, codec = embodiments(sources, known), codec_of(layout, world.device)
        reader, texts = Reader(layout, robots, statistics, codec, text), readable(text, sources)
        state = State(student, config, world)
        meta = policy_config(config, reader) | {"robots": own_robots(sources)}
        with open_run(config, state, "finetune", amounts(sources)) as run:
            keep_texts(run.path, text, texts, world)
            wanted, share = range(state.step, config.steps), world.share(config.batch)
            whose = (world.rank, world.size, config.workers, config.sources)
            coming = prefetch(mixture, wanted, share, *whose)
            for step, batch in run.batches(coming):
                for micro, part in enumerate(split(batch, config.accumulate)):
                    inputs = reader.tokens(part)
                    random = generator(config.seed, step, world.rank, micro)
                    loss = policy_loss(state.model, inputs, config, random, world.device)
                    state.backward({"loss": loss})
                values = state.update(config.batch, batch.ids)
                values |= epochs(mixture, state.step * config.batch)
                run.log(config.batch, None, **values)
                if run.due():
                    run.save(meta, to_json(statistics))
            run.save(meta, to_json(statistics))
            run.finish()


def scaling(config: FinetuneConfig, data: dict[str, Statistics]) -> dict[str, Statistics]:
    """The data's statistics, or those of `init` if the user wants them, both compared; a run that
    goes on keeps its own. Raises UserError where they differ and `scale_by` does not say which."""
    if config.init is None or last(Path(config.out)) is not None:
        return data
    given = from_json(load(config.init).statistics)
    return settle(data, given, config.scale_by, config.init)


def build(config: FinetuneConfig) -> tuple[PolicyModel, Robots | None]:
    """Backbone part and head, filled from `init`, and the embodiments that `init` knows."""
    student = PolicyModel(config.encoder, config.head)
    if config.init is None:
        return student, None
    with user_errors():
        given = load(config.init)
        check_init(config, given)
        wanted = student.backbone.state_dict()
        have = given.part("backbone")
        fill(student.backbone, {k: have[k] for k in wanted if k in have}, str(given.path))
        if given.config["kind"] == "policy":
            fill(student.head, given.part("head"), str(given.path))
        with parts_of(given.path):
            robots = Robots(*(tuple(v) for v in given.config["embodiments"].values()))
    left = len(have) - len(wanted)
    print(f"init: {given.path}, {len(wanted)} tensors of the backbone taken, {left} not needed")
    return student, robots


def check_init(config: FinetuneConfig, given: Checkpoint) -> None:
    """Raises UserError if the backbone to start from is of another shape or reads other texts or
    latents, CheckpointError if it is damaged."""
    with parts_of(given.path):
        theirs = ModelConfig.from_dict(given.config["model"])
    block = config.encoder.depth
    if theirs.depth < block:
        raise UserError(f"init={config.init} has {theirs.depth} blocks, read_at needs {block}")
    part, mine = (
        replace(theirs.encoder(block), attention="prefix").to_dict(),
        config.encoder.to_dict(),
    )
    differ = [f"{k} (init {part[k]}, here {mine[k]})" for k in mine if part[k] != mine[k]]
    if differ:
        raise UserError(
            f"init={config.init} is another model: {', '.join(differ)}; "
            "give the model= and layout. of the pretraining"
        )
    with parts_of(given.path):
        reads, codec = given.config["text_encoder"], Layout.from_dict(given.config["layout"]).codec
    text = text_encoder(config.text, config.text_path).name
    if reads != text:
        raise UserError(f"init={config.init} reads {reads} vectors, text={config.text} is {text}")
    own = config.layout.codec
    if (codec.kind, resolved(codec)) != (own.kind, resolved(own)):
        raise UserError(
            f"init={config.init} has codec.kind={codec.kind}, scale={resolved(codec).scale}; "
            f"here it is {own.kind}, {resolved(own).scale}"
        )


def policy_config(config: FinetuneConfig, reader: Reader) -> dict[str, Any]:
    """A policy checkpoint's config.json."""
    meta = describe("policy", config, config.encoder, reader)
    decision = {"steps": config.sampling_steps, "execute": config.execute}
    return meta | {"head": config.head.to_dict(), "decision": decision}


def own_robots(sources: list[Any]) -> dict[str, Any]:
    """By name the embodiments of the data that the project itself does not know: whoever loads the
    policy gets them from the checkpoint."""
    found = {source.embodiment.name: source.embodiment for source in sources}
    return {name: asdict(robot) for name, robot in found.items() if name not in EMBODIMENTS}


def policy_loss(
    student: nn.Module,
    inputs: Inputs,
    config: FinetuneConfig,
    random: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Flow-matching loss of the action chunks, augmented, for `draws` draws of the noise."""
    inputs = augment(inputs, config, random).to(device)
    actions, weight = inputs.tokens["action"], inputs.mask["action"].clone()
    weight[..., -1] *= config.terminate_weight
    size = len(actions)
    noise = torch.randn(config.draws, *actions.shape, generator=random).to(device)
    tau = flow.sample_time((config.draws, size), random, config.distribution, config.time_shift).to(
        device
    )
    with autocast(config, device):
        return student(inputs.tokens, inputs.valid, actions, weight, (noise, tau))


def augment(inputs: Inputs, config: FinetuneConfig, random: torch.Generator) -> Inputs:
    """Brightness and contrast of the frames, absence of proprioception, one draw a sample."""
    tokens, valid = dict(inputs.tokens), dict(inputs.valid)
    size = len(tokens["context"])
    if config.jitter:
        bright, contrast = (2 * torch.rand(2, size, 1, 1, generator=random) - 1) * config.jitter
        frames = tokens["context"]
        mean = frames.mean((1, 2), keepdim=True)
        tokens["context"] = ((frames - mean) * (1 + contrast) + mean + bright).clamp(-1, 1)
    if config.proprio_dropout:
        kept = torch.rand(size, 1, generator=random) >= config.proprio_dropout
        valid["proprio"] = valid["proprio"] & kept
    return Inputs(tokens, valid, inputs.mask)


if __name__ == "__main__":
    launch(FinetuneConfig, main, "finetune", check=check)
