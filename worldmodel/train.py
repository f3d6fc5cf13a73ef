"""python worldmodel/train.py model=tiny data=[data/open_drawer_place@0.7,path/to/bridge@0.3]

Pretrains the video-action transformer with Self-Flow: given an instruction, the robot and what it
sees now, predict future frames and the next actions. On a laptop: `... steps=200 batch=16
minutes=5`; on eight GPUs: `torchrun --nproc-per-node 8 worldmodel/train.py experiment=rt1_675m
data=...`. Every key is explained in configs/train.yaml. Stop it as you like: the same command goes
on, to the same losses.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfflow.configs.entry import launch
from selfflow.datasets.episodes import Measures
from selfflow.datasets.loading import prefetch
from selfflow.datasets.normalize import Statistics, to_json
from selfflow.datasets.source import open_sources
from selfflow.datasets.text import text_encoder
from selfflow.datasets.windows import WindowSpec
from selfflow.worldmodel.batches import (
    LOOKED_AT,
    Reader,
    amounts,
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
from selfflow.worldmodel.checkpoint import last, load
from selfflow.worldmodel.cost import length, step_flops
from selfflow.worldmodel.dry_run import rehearse
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.import_checkpoint import check_fit, transfer
from selfflow.worldmodel.latents import LatentStore
from selfflow.worldmodel.loop import State, generator, start
from selfflow.worldmodel.objective import Student, external_aim, losses
from selfflow.worldmodel.repa import Teacher
from selfflow.worldmodel.run_folder import check_run, open_run
from selfflow.worldmodel.train_config import TrainConfig
from selfflow.worldmodel.video_codec import Codec
from selfflow.worldmodel.world_teacher import make_teacher


def check(config: TrainConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    with user_errors():
        if config.dry_run:
            return
        check_run(config)
        text = text_encoder(config.text, config.text_path)
        if config.init is not None and last(Path(config.out)) is None:
            given = load(place(config.init))
            theirs = given.config.get("text_encoder", text.name)  # an image model reads none
            if theirs != text.name:
                raise RunError(
                    f"init={config.init} reads text by {theirs}, this run by {text.name}: "
                    "choose the same text="
                )
            check_fit(given, config.transformer)


def main(config: TrainConfig) -> None:
    """Trains until `steps` or `minutes` are over, or a signal says stop."""
    if config.dry_run:
        with user_errors():
            reading = partial(read_with, config, latents=None)
            rehearse(config, request(config), reading)
        return
    with user_errors(), start(config) as world:
        sources, weights = open_sources(config.sources)
        check_measured(config, sources)
        latents = open_latents(config, sources)
        mixture, statistics = prepare(config, sources, weights, request(config, latents))
        codec = None if latents else codec_of(config.layout, world.device)
        reader = read_with(config, sources, statistics, codec, latents)
        texts = readable(reader.text, sources)
        student, external = build(config, world.device)
        state = State(student, config, world)
        meta = describe("worldmodel", config, config.transformer, reader)
        meta |= {"text_dropout": config.text_dropout}
        per_step = step_flops(config)
        with open_run(config, state, "pretrain", amounts(sources), per_step) as run:
            keep_texts(run.path, reader.text, texts, world)
            wanted, share = range(state.step, config.steps), world.share(config.batch)
            whose = (world.rank, world.size, config.workers, config.sources)
            coming = prefetch(mixture, wanted, share, *whose)
            for step, batch in run.batches(coming):
                for micro, part in enumerate(split(batch, config.accumulate)):
                    inputs = reader.tokens(part, world.device)
                    aim = external_aim(external, part, config) if external else None
                    random = generator(config.seed, step, world.rank, micro)
                    state.backward(losses(state.model, state.average, inputs, config, random, aim))
                values = state.update(config.batch, batch.ids)
                values |= epochs(mixture, state.step * config.batch)
                run.log(config.batch, tokens=config.batch * length(config.transformer), **values)
                if run.due():
                    run.save(meta, to_json(statistics))
            run.save(meta, to_json(statistics))
            run.finish()


def build(config: TrainConfig, device: torch.device) -> tuple[Student, Teacher | None]:
    """The student, initialised from `init`, and the external teacher if there is one."""
    size, external = (config.layout.height, config.layout.width), None
    if config.teacher:
        external = make_teacher(config.teacher, config.teacher_at, size, device)
    aim = external.width if external else None
    student = Student(config.transformer, aim, config.projector_layers)
    if config.init is not None and last(Path(config.out)) is None:  # a resumed run has its own
        given = load(place(config.init))
        print(f"init: {given.path}, {transfer(given, student.backbone)}")
    return student, external


def place(init: str) -> str:
    """Where weights to start from lie; `imagenet` is what worldmodel/import_checkpoint.py makes."""
    return "checkpoints/imagenet" if init == "imagenet" else init


def open_latents(config: TrainConfig, sources: list[Any]) -> LatentStore | None:
    """The frames encoded beforehand, if the config names them: all of these sources'."""
    if config.latents is None:
        return None
    store = LatentStore(config.latents)
    store.check(config.layout)
    for source in sources:
        store.check_source(source.name, [source.length(i) for i in range(len(source))])
    return store


def check_measured(config: TrainConfig, sources: list[Any]) -> None:
    """Raises RunError for an added modality that no source measures: it would train on nothing."""
    for name, e in config.extra.items():
        looked_at = [(s, i) for s in sources for i in range(min(len(s), LOOKED_AT))]
        if not any(
            isinstance(s, Measures) and s.measured(i, e.key) is not None for s, i in looked_at
        ):
            raise RunError(f"extra.{name}: no source of the data measures key={e.key}")


def request(config: TrainConfig, latents: LatentStore | None = None) -> WindowSpec:
    """What a training window must hold."""
    extra = {e.key: (e.length, e.channels) for e in config.extra.values()}
    every = latents.header.every if latents else 1
    pictures = latents is None or config.teacher is not None  # an external teacher sees pixels
    return window(
        config.layout, augment=config.augment, extra=extra, pictures=pictures, every=every
    )


def read_with(
    config: TrainConfig,
    sources: list[Any],
    statistics: dict[str, Statistics],
    codec: Codec | None,
    latents: LatentStore | None,
) -> Reader:
    """How batches become tokens in this run."""
    robots, text = embodiments(sources), text_encoder(config.text, config.text_path)
    return Reader(config.layout, robots, statistics, codec, text, config.extra, latents)


if __name__ == "__main__":
    launch(TrainConfig, main, "train", check=check)
