"""python policies/finetune.py model=tiny init=outputs/pretrain data=data/open_drawer_place

Makes a policy: the pretrained backbone's first blocks read the conditions, and an action head is
trained with them by flow matching. `init=null` starts from nothing; `train=head`, `last` or `lora`
train less than everything. On a laptop: `... steps=200 batch=16 minutes=5`. Every key is explained
in configs/finetune.yaml. Stop it as you like: the same command goes on, to the same losses.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfflow.configs.entry import launch
from selfflow.datasets.compatibility import settle
from selfflow.datasets.loading import prefetch
from selfflow.datasets.normalize import Statistics, from_json, to_json
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import EMBODIMENTS, task_named
from selfflow.datasets.text import text_encoder
from selfflow.policies import lora
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.policies.head import PolicyModel, head_loss
from selfflow.policies.selection import Selection
from selfflow.policies.student import build, check_init, usable
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
from selfflow.worldmodel.checkpoint import last, load
from selfflow.worldmodel.loop import State, generator, start
from selfflow.worldmodel.objective import losses
from selfflow.worldmodel.run_folder import check_run, open_run
from selfflow.worldmodel.transformer import Tokens


def check(config: FinetuneConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    with user_errors():
        check_run(config)
        if config.train == "lora":
            lora.check()
        if config.select_minutes and "simpler_rollout" in config.select_command:
            for task in config.select_tasks:
                task_named(task)
        if config.init is not None:
            check_init(config, load(config.init))


def main(config: FinetuneConfig) -> None:
    """Trains until `steps` or `minutes` are over, or a signal says stop."""
    with user_errors(), start(config) as world:
        sources, weights = open_sources(config.sources)
        seen = config.layout if config.keep_self_flow else replace(config.layout, future=0)
        changes = {"shift": config.shift, "augment": config.augment}
        spec = window(seen, only_with_actions=True, **changes)
        mixture, statistics = prepare(config, sources, weights, spec)
        statistics = scaling(config, statistics)
        student, known = build(config)
        text = text_encoder(config.text, config.text_path)
        robots, codec = embodiments(sources, known), codec_of(seen, world.device)
        reader, texts = Reader(seen, robots, statistics, codec, text), readable(text, sources)
        state = State(student, config, world)
        meta = policy_config(config, reader) | origins(sources)
        made = meta, to_json(statistics), partial(usable, config=config)
        with (
            open_run(config, state, "finetune", amounts(sources)) as run,
            selection(config, run.path, world.main) as chosen,
        ):
            keep_texts(run.path, text, texts, world)
            wanted, share = range(state.step, config.steps), world.share(config.batch)
            whose = (world.rank, world.size, config.workers, config.sources)
            coming = prefetch(mixture, wanted, share, *whose)
            for step, batch in run.batches(coming):
                for micro, part in enumerate(split(batch, config.accumulate)):
                    inputs = reader.tokens(part)
                    random = generator(config.seed, step, world.rank, micro)
                    state.backward(policy_losses(state, inputs, config, random, world.device))
                values = state.update(config.batch, batch.ids)
                values |= epochs(mixture, state.step * config.batch) | chosen.step()
                run.log(config.batch, None, **values)
                if run.due():
                    run.save(*made)
                if config.select_minutes and any(world.any(chosen.error is not None)):
                    break
            run.save(*made)
            run.finish()
            chosen.finish(complete=state.step == config.steps)


def selection(config: FinetuneConfig, run: Path, main: bool) -> Selection:
    """Of the run's checkpoints; only one process does it."""
    minutes = config.select_minutes if main else 0.0
    how = config.select_command, config.select_tasks, config.select_episodes
    return Selection(run, minutes, *how)


def scaling(config: FinetuneConfig, data: dict[str, Statistics]) -> dict[str, Statistics]:
    """The data's statistics, or those of `init` if the user wants them, both compared; a run that
    goes on keeps its own. Raises UserError where they differ and `scale_by` does not say which."""
    if config.init is None or last(Path(config.out)) is not None:
        return data
    given = from_json(load(config.init).statistics)
    return settle(data, given, config.scale_by, config.init)


def policy_config(config: FinetuneConfig, reader: Reader) -> dict[str, Any]:
    """A policy checkpoint's config.json."""
    meta = describe("policy", config, config.backbone, reader)
    decision = {"steps": config.sampling_steps, "execute": config.execute}
    meta |= {"head": config.head.to_dict(), "decision": decision, "layout": asdict(config.layout)}
    meta |= {"text_dropout": config.text_dropout}
    return meta | ({"read_block": config.read_block} if config.whole else {})


def origins(sources: list[Any]) -> dict[str, Any]:
    """What a policy's users must know of its data: the embodiments that the project does not know,
    by name, and the benchmark's photographs that were shown."""
    found = {source.embodiment.name: source.embodiment for source in sources}
    own = {name: asdict(robot) for name, robot in found.items() if name not in EMBODIMENTS}
    shown = {name for source in sources for name in getattr(source, "photographs", ())}
    return {"robots": own, "photographs": sorted(shown)}


def policy_losses(
    state: State[PolicyModel],
    inputs: Inputs,
    config: FinetuneConfig,
    random: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    """`loss`: that of flow matching the action chunks, augmented, for `draws` draws of the noise;
    with keep_self_flow its sum with the pretraining's, whose terms are told too."""
    plain, inputs = inputs.to(device), augment(inputs, config, random).to(device)
    actions, weight = inputs.tokens["action"], inputs.mask["action"].clone()
    weight[..., -1] *= config.terminate_weight
    shape = config.draws, len(actions)
    noise = torch.randn(*shape, *actions.shape[1:], generator=random).to(device)
    tau = flow.sample_time(shape, random, config.distribution, config.time_shift).to(device)

    def job(model: PolicyModel) -> dict[str, Tensor]:
        with autocast(config, device):
            memory = model.memory(inputs.tokens, inputs.valid)
            loss = head_loss(model.head, actions, weight, memory, noise, tau)
        if not config.keep_self_flow:
            return {"loss": loss}
        kept = losses(model.respond, partial(teach, state.average), plain, config.kept, random)
        both = loss + config.keep_self_flow * kept["loss"]
        return kept | {"loss": both, "policy": loss, "self_flow": kept["loss"]}

    return state.model(job)


def teach(average: nn.Module, *seen: Any, **how: Any) -> tuple[Tokens, Tensor | None]:
    """What the moving average responds."""
    return average(lambda model: model.respond(*seen, **how))


def augment(inputs: Inputs, config: FinetuneConfig, random: torch.Generator) -> Inputs:
    """Brightness and contrast of the frames, absence of proprioception and text, one draw a
    sample."""
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
    valid = flow.dropped(tokens, valid, {"text": config.text_dropout}, random)
    return Inputs(tokens, valid, inputs.mask)


if __name__ == "__main__":
    launch(FinetuneConfig, main, "finetune", check=check)
