"""python policies/value.py init=outputs/policy data=data/open_drawer_place

Trains a value head for best-of-N (policies/judging.py): how much of its subtask a frame shows done.
The target is (t - begin) / (end - begin) of the run of steps that have one instruction, not of the
episode: a policy is after its present instruction only, and all chunks that are compared share it.
The frame is the last that a training window predicts, beyond the subtask's end the target is 1. A
share of the frames (`imagined`) is the world model's own, after the demonstration's actions, so
that the head reads imagined frames as well as real ones. The backbone stays as it is. Writes
value.safetensors and value.json beside the checkpoint `init`, which must keep the whole backbone: a
policy made with keep_backbone or keep_self_flow, or a run of worldmodel/train.py for decode=joint.
Stop it as you like: the same command goes on. Every key is explained in configs/value.yaml.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from selfflow.configs.entry import launch
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.loading import prefetch
from selfflow.datasets.normalize import from_json, statistics_for
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.text import recorded_encoder
from selfflow.datasets.windows import Batch, Loader, Mixture, Place
from selfflow.policies.judging import (
    Eyes,
    ValueHead,
    ValueSizes,
    check_imagines,
    fingerprint,
    save_value,
)
from selfflow.policies.progress import Progress, failed
from selfflow.worldmodel.batches import (
    Reader,
    amounts,
    autocast,
    codec_of,
    epochs,
    split,
    user_errors,
    window,
)
from selfflow.worldmodel.checkpoint import (
    FORMAT,
    Checkpoint,
    fill,
    last,
    load,
    parts_of,
    read_json,
)
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.loop import LoopConfig, State, generator, start
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.run_folder import check_run, open_run
from selfflow.worldmodel.transformer import VideoActionTransformer

MOST = 400  # held-out frames that are looked at


@dataclass(frozen=True)
class ValueConfig(LoopConfig):
    """Every key of configs/value.yaml, which explains them."""

    out: str = "outputs/value"
    init: str = ""
    heldout: list[str] = field(default_factory=list)
    read_at: float = 0.7
    queries: int = 8
    hidden: int = 256
    imagined: float = 0.5
    imagine_steps: int = 4
    shift: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.imagined <= 1 and 0 <= self.read_at <= 1):
            raise ValueError(
                f"imagined={self.imagined} and read_at={self.read_at} are shares, in 0 .. 1"
            )
        if min(self.queries, self.hidden, self.imagine_steps) < 1 or self.shift < 0:
            raise ValueError("queries, hidden and imagine_steps are at least 1, shift at least 0")
        if self.parallel == "fsdp":
            raise ValueError("parallel=fsdp: a value head is too small to shard; choose none, ddp")


@dataclass(frozen=True)
class Watcher:
    """The frozen backbone, what makes tokens of batches, and which block is read."""

    eyes: Eyes
    reader: Reader
    sizes: ValueSizes

    @property
    def ahead(self) -> int:
        """Control steps from a window's beginning to the frame that is judged."""
        return self.eyes.layout.frame_offsets[-1]

    def features(
        self, batch: Batch, imagined: int, random: torch.Generator
    ) -> Float[Tensor, "B L D"]:
        """Of each window's last frame; the first `imagined` rows' is imagined."""
        device = next(self.eyes.model.parameters()).device
        inputs = self.reader.tokens(batch, device)
        conditions = {m.name for m in self.eyes.model.config.conditions}
        tokens = {k: v for k, v in inputs.tokens.items() if k in conditions}
        frames = torch.from_numpy(batch.frames[:, -1]).to(device)
        if imagined:
            first = {k: v[:imagined] for k, v in tokens.items()}
            known = {k: v[:imagined] for k, v in inputs.valid.items() if k != "video"}
            chunks = inputs.tokens["action"][:imagined]
            seen = self.eyes.imagine(first, known, chunks, self.sizes.steps, random)
            frames = torch.cat([seen, frames[imagined:]])
        return self.eyes.features(frames, tokens, self.sizes.block)


def check(config: ValueConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    if not config.init:
        raise UserError("init=... is required: the checkpoint whose backbone the head reads")
    with user_errors():
        check_run(config)
        given = load(config.init)
        check_imagines(given, f"init={config.init}")
        check_backbone(config, given)
        if config.heldout:
            sources, _ = open_sources(config.heldout)
            statistics_for(sources, from_json(given.statistics), str(given.path))
            if not shown(sources):
                raise UserError("heldout: all of its episodes are failures; give others")


def check_backbone(config: ValueConfig, given: Checkpoint) -> None:
    """Raises UserError if the run in `out` began on other weights: `init` may be a run folder whose
    last checkpoint is another one by now."""
    before = last(Path(config.out))
    if before and read_json(before / "config.json").get("backbone") != fingerprint(given.path):
        raise UserError(
            f"out={config.out} holds a head for another backbone than init={config.init} has now; "
            "choose another out"
        )


def main(config: ValueConfig) -> None:
    """Trains until `steps` or `minutes` are over, then puts the head beside its checkpoint.

    A signal stops it before that; the same command goes on.
    """
    with user_errors(), start(config) as world:
        sources, weights = open_sources(config.sources)
        given = load(config.init)
        watcher = watch(given, config, world.device)
        statistics_for(sources, watcher.reader.statistics, str(given.path))
        spec = window(watcher.eyes.layout, shift=config.shift, only_with_actions=True)
        mixture = Mixture(sources, weights, spec, config.seed)
        progress = Progress(sources, watcher.ahead)
        mixture.try_all()
        state = State(ValueHead(watcher.sizes), config, world)
        made = about(config, given), given.statistics
        with open_run(config, state, "value", amounts(sources)) as run:
            share, wanted = world.share(config.batch), range(state.step, config.steps)
            whose = (world.rank, world.size, config.workers, config.sources)
            for step, batch in run.batches(prefetch(mixture, wanted, share, *whose)):
                places = mixture.places(step, share, world.rank, world.size)
                done = [x.chunk(config.accumulate) for x in progress.of(places)]
                parts = zip(split(batch, config.accumulate), *done, strict=True)
                for micro, (part, *target) in enumerate(parts):
                    random = generator(config.seed, step, world.rank, micro)
                    state.backward(losses(state, watcher, part, target, config, random))
                values = state.update(config.batch, batch.ids)
                values |= epochs(mixture, state.step * config.batch)
                run.log(config.batch, None, **values)
                if run.due():
                    run.save(*made)
            run.save(*made)
            run.finish()
        if world.main:
            finish(config, given, watcher, state)


def watch(given: Checkpoint, config: ValueConfig, device: torch.device) -> Watcher:
    """The checkpoint's backbone, ready to look. Raises CheckpointError."""
    with parts_of(given.path):
        layout = Layout.from_dict(given.config["layout"])
        sizes = ModelConfig.from_dict(given.config["model"])
        model = VideoActionTransformer(sizes)
        robots = Robots(*(tuple(given.config["embodiments"][k]) for k in ("names", "rates")))
    fill(model, given.part("backbone"), str(given.path))
    model = model.eval().requires_grad_(False).to(device)
    codec = codec_of(layout, device)
    text = recorded_encoder(given.config["text_encoder"], given.path / "text.safetensors")
    return Watcher(
        Eyes(model, layout, codec),
        Reader(layout, robots, from_json(given.statistics), codec, text),
        ValueSizes(
            sizes.hidden,
            sizes.block_at(config.read_at),
            config.queries,
            config.hidden,
            config.imagine_steps,
        ),
    )


def losses(
    state: State[ValueHead],
    watcher: Watcher,
    batch: Batch,
    target: list[Float[Tensor, "B"]],
    config: ValueConfig,
    random: torch.Generator,
) -> dict[str, Tensor]:
    """`loss`: cross entropy of the share done, over episodes that are no failures; `error`: its
    mean absolute error; `failed`: the share of samples that were left out."""
    device = state.world.device
    done, weight = (x.to(device) for x in target)
    with torch.no_grad(), autocast(config, device):
        imagined = round(config.imagined * len(done))
        features = watcher.features(batch, imagined, random).float()
    logits = state.model(features)
    total = weight.sum().clamp(min=1)
    loss = F.binary_cross_entropy_with_logits(logits, done, weight, reduction="sum") / total
    error = ((logits.detach().sigmoid() - done).abs() * weight).sum() / total
    return {"loss": loss, "error": error, "failed": 1 - weight.mean()}


def finish(
    config: ValueConfig, given: Checkpoint, watcher: Watcher, state: State[ValueHead]
) -> None:
    """Measures on held-out episodes, writes the head beside its checkpoint, says so."""
    note = about(config, given) | {"step": state.step}
    if config.heldout:
        note["held_out"] = measured(config, watcher, state.average)
        for kind, found in note["held_out"].items():
            print(f"held out, {kind} frames: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    save_value(given.path, watcher.sizes, state.average.state_dict(), note)
    print(f"value head: {given.path / 'value.safetensors'}; act with best_of=4")


def about(config: ValueConfig, given: Checkpoint) -> dict[str, Any]:
    """What a value head's files say of it."""
    return {
        "format": FORMAT,
        "kind": "value",
        "target": "share of the subtask that is done",
        "init": str(given.path),
        "backbone": fingerprint(given.path),
        "data": config.sources,
        "heldout": config.heldout,
    }


@torch.no_grad()
def measured(
    config: ValueConfig, watcher: Watcher, head: torch.nn.Module
) -> dict[str, dict[str, int | float]]:
    """On frames spread over the held-out episodes, real and imagined: mean absolute error and R² of
    the share done."""
    done, guess = [], {"real": [], "imagined": []}
    random = torch.Generator().manual_seed(config.seed)
    for batch, target in held_out(config, watcher):
        done.append(target)
        for kind, count in (("real", 0), ("imagined", len(target))):
            with autocast(config, next(head.parameters()).device):
                features = watcher.features(batch, count, random).float()
            guess[kind].append(head(features).sigmoid().cpu())
    truth = torch.cat(done)
    return {kind: quality(truth, torch.cat(found)) for kind, found in guess.items()}


def held_out(config: ValueConfig, watcher: Watcher) -> Iterator[tuple[Batch, Tensor]]:
    """At most MOST windows of the held-out episodes that are no failures, evenly spread; says how
    many are."""
    sources, _ = open_sources(config.heldout)
    episodes, progress = shown(sources), Progress(sources, watcher.ahead)
    loader = Loader(sources, window(watcher.eyes.layout))
    if failures := sum(len(source) for source in sources) - len(episodes):
        print(f"held out: {failures} episodes are failures and left out")
    every = [Place(k, i, t) for k, i in episodes for t in range(sources[k].length(i))]
    chosen = np.unique(np.linspace(0, len(every) - 1, min(MOST, len(every))).astype(int))
    size = config.batch
    for first in track(range(0, len(chosen), size), "held-out episodes", transient=True):
        places = [every[n] for n in chosen[first : first + size]]
        yield loader.load(places), progress.of(places)[0]


def shown(sources: Sequence[EpisodeSource]) -> list[tuple[int, int]]:
    """Source and number of every episode that is no failure."""
    return [
        (k, i)
        for k, source in enumerate(sources)
        for i in range(len(source))
        if not failed(source, i)
    ]


def quality(truth: Float[Tensor, "N"], guess: Float[Tensor, "N"]) -> dict[str, int | float]:
    """Rounded; R² is against the mean."""
    spread = (truth - truth.mean()).square().sum().clamp(min=1e-12)
    r2 = 1 - (truth - guess).square().sum() / spread
    error = (truth - guess).abs().mean()
    return {"frames": len(truth), "error": round(float(error), 4), "r2": round(float(r2), 4)}


if __name__ == "__main__":
    launch(ValueConfig, main, "value", check=check)
