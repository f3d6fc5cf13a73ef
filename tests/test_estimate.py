"""The estimator against the module itself: parameters, FLOPs, bytes that autograd keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.worldmodel import estimate, flow, transformer
from selfflow.worldmodel.activations import activation_bytes
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.cost import flops, forward_flops, length, linears, parameters, step_flops
from selfflow.worldmodel.estimate import EstimateConfig
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.objective import Student, losses
from selfflow.worldmodel.plan import Cluster, memory, speed
from selfflow.worldmodel.train_config import ModelSize, TrainConfig

SIZES = {"tiny": None, "small": None, "base": None, "selfflow_675m": 675e6, "selfflow_625m": 625e6}
FAMILIES = {
    "sit": ModelSize(96, 4, 4, 4.0),
    "flux": ModelSize(96, 4, 4, 4.0, "flux", 1, "rope"),
}


def recipe(family: str = "sit", **changes) -> TrainConfig:
    """A run small enough to be measured."""
    layout = Layout(height=64, width=80, patch=8, chunk=6)
    return TrainConfig(**{"model": FAMILIES[family], "layout": layout, "batch": 2} | changes)


def inputs(config: TrainConfig) -> Inputs:
    tokens = {
        m.name: torch.randn(config.batch, m.length, m.channels)
        for m in config.transformer.modalities
    }
    mask = {m.name: torch.ones(config.batch, m.length, 1) for m in config.transformer.targets}
    return Inputs(tokens, {}, mask)


def pair(config: TrainConfig) -> tuple[Student, Student]:
    """Student and teacher, with no zero weights."""
    student, average = Student(config.transformer), Student(config.transformer)
    for module in (student, average):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    student.backbone.activation_checkpointing = config.activation_checkpointing
    return student, average.requires_grad_(False)


def loss(config: TrainConfig, student: Student, average: Student) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return losses(student, average, inputs(config), config, random)["loss"]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_module(size):
    config = compose(TrainConfig, "train", [f"model={size}"])
    with torch.device("meta"):
        student = Student(config.transformer)
    count = parameters(config.transformer)
    assert count.total == sum(p.numel() for p in student.parameters())
    assert count.backbone == sum(p.numel() for p in student.backbone.parameters())
    assert count.projector == sum(p.numel() for p in student.projector.parameters())
    own = sum(p.numel() for p in student.backbone.inputs["context"].parameters())
    assert count.modalities["context"] == own
    blocks = [sum(p.numel() for p in block.parameters()) for block in student.backbone.blocks]
    assert count.largest_block == pytest.approx(max(blocks), rel=1e-3)  # without q and k norms
    if SIZES[size]:
        assert count.backbone == pytest.approx(SIZES[size], rel=0.02)


def test_three_layers_of_projector_are_counted():
    config = recipe().transformer
    student = Student(config, aim=40, layers=3)
    assert parameters(config, 3, 40).projector == sum(
        p.numel() for p in student.projector.parameters()
    )


@pytest.mark.parametrize("attention", ["full", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_every_pass_are_counted_exactly(family, attention):
    config = recipe(family, attention=attention)
    student, average = pair(config)
    model, given = config.transformer, inputs(config)
    seen = flow.draw(given.tokens, model, config.noise, torch.Generator().manual_seed(0))
    aim = flow.teacher_view(seen, given.tokens, model)
    block = config.blocks[1]

    def count(run) -> float:
        # on a CPU only the plain attention of bf16 is made of products that the counter knows
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            with FlopCounterMode(display=False) as counter:
                run()
            return counter.get_total_flops() / config.batch

    cost, rows = flops(config), config.aligned
    assert count(lambda: student(seen, {}, None, rows)) == cost.forward
    teacher = count(lambda: average(aim, {}, block, rows, raw=True))
    assert teacher == pytest.approx(cost.teacher, rel=0.02)
    assert count(lambda: student(seen, {}, 1, rows)) == cost.forward + cost.projector
    own = replace(config, objective="diffusion_forcing")
    seen = flow.draw(given.tokens, model, own.noise, torch.Generator().manual_seed(0))
    assert count(lambda: student(seen, {}, None, rows)) == forward_flops(model, None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["vanilla", "self_flow"])
def test_flops_of_a_step(objective, checkpointing):
    config = recipe(objective=objective, activation_checkpointing=checkpointing, attention="full")
    student, average = pair(config)
    with FlopCounterMode(display=False) as counter:
        loss(config, student, average).backward()
    expected = step_flops(config) + checkpointing * config.batch * flops(config).blocks
    # data, times and groups need no gradient; `training` counts it, as 3 x forward does everywhere
    first = [x for x in linears(config.transformer) if x.block == 0 and x.inputs != 96]
    expected -= config.batch * sum(x.flops for x in first)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


def test_prefix_attention_is_cheaper_by_what_conditions_do_not_see():
    full, prefix = (recipe(attention=a).transformer for a in ("full", "prefix"))
    pairs = full.prefix_length * full.target_length
    saved = 4 * pairs * full.hidden * full.depth
    row = 2 * full.hidden * 6 * full.hidden * full.depth  # the modulation of all conditions ...
    saved += 2 * 3 * full.hidden * 6 * full.depth * full.prefix_length  # ... is not spread, ...
    picked = 2 * 3 * full.hidden  # ... but picked once
    assert forward_flops(full) - forward_flops(prefix) == saved - row - picked


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("attention", ["full", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes(family, attention, precision, checkpointing, monkeypatch):
    """bf16 on a CPU keeps attention's probabilities; fp32 runs the fused kernel."""
    config = recipe(
        family, attention=attention, precision=precision, activation_checkpointing=checkpointing
    )
    student, average = pair(config)
    weights = {p.shape for p in student.parameters()}
    weights |= {shape[::-1] for shape in weights}  # autocast's copies are transposed
    own = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.shape not in weights:
            kept[place] = tensor
        return tensor

    def checkpoint(layer, *arguments, **options):
        for leaf in tree_leaves(arguments):  # kept by the checkpoint itself, not by autograd
            if isinstance(leaf, torch.Tensor):
                keep(leaf)
        return real(layer, *arguments, **options)

    real = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", checkpoint)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(config, student, average)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) / config.batch
    estimated = activation_bytes(config, "cpu").saved(checkpointing)
    assert estimated == pytest.approx(measured, rel=0.04)


def test_memory_of_a_gpu():
    config = recipe(batch=8)
    count = parameters(config.transformer).total
    alone = memory(config, 1, "none", False)
    assert (alone.weights, alone.optimiser) == (4 * count, 8 * count)
    shards = memory(config, 8, "fsdp", False)
    assert shards.weights == -(-alone.weights // 8)
    assert shards.average + shards.gradients == 2 * shards.weights
    buckets = memory(config, 8, "ddp", False)
    assert buckets.peak(1) - alone.peak(1) == alone.gradients  # there before the backward pass
    kept = memory(config, 1, "none", True)
    assert kept.activations_each < alone.activations_each / 4
    fits = alone.largest(10**9)
    assert alone.peak(fits) <= 10**9 < alone.peak(fits + 1)
    assert alone.largest(alone.fixed) == 0
    with pytest.raises(ValueError, match="choose one of none, ddp, fsdp"):
        memory(config, 1, "zero", False)


def test_speed():
    config = recipe(batch=8, steps=1000)
    cluster = Cluster(gpus=2, mfu=0.5, peak=1e12)
    runs = speed(config, cluster, False)
    assert runs.seconds == pytest.approx(step_flops(config) / 1e12)
    assert runs.hours == pytest.approx(1000 * runs.seconds / 3600)
    assert runs.tokens == pytest.approx(8 * length(config.transformer) / runs.seconds)
    assert speed(config, cluster, True).seconds > runs.seconds


def test_the_command_prints_the_mission_recipe(capsys):
    config = compose(EstimateConfig, "estimate", ["model=selfflow_675m", "gpus=8"])
    estimate.main(config)
    text = capsys.readouterr().out
    assert "tokens per sample: 4489 (text 1, robot 1, proprio 1, context 320, video 4160" in text
    assert "100000 steps: " in text
    assert "674,303,672" in text
    own = compose(EstimateConfig, "estimate", ["~experiment", "batch=16"])
    assert length(own.transformer) == 171


@pytest.mark.parametrize("override", ["gpus=0", "gpus=7", "mfu=0", "gpu_memory=-1", "reserve=1"])
def test_impossible_clusters_are_refused(override):
    with pytest.raises(UserError):
        compose(EstimateConfig, "estimate", [override])
