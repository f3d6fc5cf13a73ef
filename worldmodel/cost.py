"""What a model costs to run, as arithmetic: its parameters and its FLOPs.

FLOPs are of one sample, and of matrix products only, 2 a multiply-add, as torch.utils.flop_counter
counts them. tests/test_estimate.py holds every figure against the module itself.
D width, L tokens, N tokens that take the representation loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from selfflow.worldmodel.layers import FREQUENCIES
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.train_config import TrainConfig

STUDENT_GROUPS, TEACHER_GROUPS = 3, 2  # (conditions, t, s) and (conditions, min(t, s))
BACKWARD = 2  # gradients of inputs and of weights: a product each for one of the forward pass


@dataclass(frozen=True)
class Linear:
    """A weight matrix with bias, and to how many rows of a sample it is applied."""

    part: str  # time, shared, blocks, final, projector, or a modality's name
    block: int  # 1-based; 0 lies before the blocks, depth + 1 behind them
    inputs: int
    outputs: int
    rows: int

    @property
    def parameters(self) -> int:
        """Of matrix and bias."""
        return (self.inputs + 1) * self.outputs

    @property
    def flops(self) -> int:
        """Forward."""
        return 2 * self.inputs * self.outputs * self.rows


@dataclass(frozen=True)
class Parameters:
    """Counts; `modalities` are each one's own input and output layers and embeddings."""

    blocks: int  # with what they share
    rest: int  # time embedding, labels, final modulation
    modalities: dict[str, int]
    projector: int
    linear: int  # of the backbone's matrices and biases under autocast, which keeps bf16 copies
    largest_block: int

    @property
    def backbone(self) -> int:
        """All but the projector: what a checkpoint's model.safetensors holds."""
        return self.blocks + self.rest + sum(self.modalities.values())

    @property
    def total(self) -> int:
        """What is trained."""
        return self.backbone + self.projector


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: int  # the student, whole
    projector: int  # forward
    teacher: int  # the moving average up to its block; an external teacher is not counted
    blocks: int  # the part of `forward` that activation checkpointing computes again

    @property
    def training(self) -> int:
        """A step's: forward and backward of student and projector, forward of the teacher."""
        return (1 + BACKWARD) * (self.forward + self.projector) + self.teacher


def length(model: ModelConfig) -> int:
    """L: tokens of a sample."""
    return model.prefix_length + model.target_length


def linears(model: ModelConfig, groups: int | None = STUDENT_GROUPS) -> Iterator[Linear]:
    """Every matrix of the backbone. groups: noise groups a sample; None: a time of its own for
    every token."""
    width, last = model.hidden, model.depth + 1
    rows = groups or length(model)
    # prefix: conditions, which share a group, and targets go through a block one after the other
    modulated = groups + len(passes(model)) - 1 if groups else rows
    yield Linear("time", 0, FREQUENCIES, width, rows)
    yield Linear("time", 0, width, width, rows)
    for m in model.modalities:
        yield Linear(m.name, 0, m.channels, width, m.length)
    if model.family == "flux":
        yield Linear("shared", 0, width, 15 * width, rows)
    for block in range(1, last):
        for inputs, outputs, count in _block(model, block, modulated):
            yield Linear("blocks", block, inputs, outputs, count)
    if model.targets:
        yield Linear("final", last, width, 2 * width, groups or model.target_length)
    for m in model.targets:
        yield Linear(m.name, last, width, m.channels, m.length)


def _block(model: ModelConfig, block: int, rows: int) -> list[tuple[int, int, int]]:
    """(inputs, outputs, rows) of one block's matrices."""
    width, hidden, every = model.hidden, int(model.hidden * model.mlp_ratio), length(model)
    if model.family == "sit":
        tokens = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
        return [(width, 6 * width, rows), *((i, o, every) for i, o in tokens)]
    if block > model.double_blocks:
        return [(width, 3 * width + 2 * hidden, every), (width + hidden, width, every)]
    text = sum(m.length for m in model.modalities if m.stream == "text")
    stream = [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)]
    return [(i, o, count) for count in (text, every - text) for i, o in stream]


def projector_linears(model: ModelConfig, layers: int, rows: int, aim: int | None) -> list[Linear]:
    """See layers.Projector; aim is the teacher's width where it is not the model's."""
    sizes = [model.hidden, *[2 * model.hidden] * (layers - 1), aim or model.hidden]
    return [Linear("projector", 0, i, o, rows) for i, o in pairwise(sizes)]


def parameters(model: ModelConfig, projector_layers: int = 2, aim: int | None = None) -> Parameters:
    """Exact counts of train.py's Student."""
    every = list(linears(model))
    sums = {part: sum(x.parameters for x in every if x.part == part) for part in _parts(model)}
    norms = 2 * model.hidden // model.heads  # of queries and keys, a stream
    singles = model.depth - model.double_blocks
    norms *= (2 * model.double_blocks + singles) if model.family == "flux" else 0
    embeddings = 2 * model.hidden  # of a modality: its own, and the stand-in for absent tokens
    projector = projector_linears(model, projector_layers, 0, aim)
    return Parameters(
        sums["blocks"] + sums["shared"] + norms,
        sums["time"] + sums["final"] + model.classes * model.hidden,
        {m.name: sums[m.name] + embeddings for m in model.modalities},
        sum(x.parameters for x in projector),
        sum(x.parameters for x in every if x.part != "time"),
        max(sum(x.parameters for x in every if x.block == n) for n in range(1, model.depth + 1)),
    )


def _parts(model: ModelConfig) -> tuple[str, ...]:
    return ("time", "shared", "blocks", "final", *(m.name for m in model.modalities))


def passes(model: ModelConfig) -> list[tuple[int, int]]:
    """(own tokens, tokens attended to) of every pass through a block."""
    first, every = model.prefix_length, length(model)
    if model.attention == "full":
        return [(every, every)]
    return [(own, seen) for own, seen in ((first, first), (every - first, every)) if own]


def forward_flops(
    model: ModelConfig, groups: int | None = STUDENT_GROUPS, block: int | None = None
) -> int:
    """One pass, or one that stops after `block` (1-based)."""
    last = model.depth + 1 if block is None else block
    matrices = sum(x.flops for x in linears(model, groups) if x.block <= last)
    pairs = sum(own * seen for own, seen in passes(model))
    attention = min(last, model.depth) * 4 * pairs * model.hidden
    return matrices + attention + _spreading(model, groups, last)


def _spreading(model: ModelConfig, groups: int | None, last: int) -> int:
    """The one-hot products that hand a group's modulation to its tokens (layers.spread)."""
    if groups is None:
        return 0
    tokens = spread_tokens(model, groups)
    # beside the targets, prefix attention picks the one row of all conditions
    picked = 1 if tokens < length(model) else 0
    blocks = 15 if model.family == "flux" else 6 * min(last, model.depth)
    final = 2 * model.target_length if last > model.depth else 0
    return 2 * groups * model.hidden * (blocks * tokens + picked + final)


def spread_tokens(model: ModelConfig, groups: int | None) -> int:
    """Tokens that a block's modulation is handed to one by one: not the conditions of prefix
    attention, which share a row, except where flux spreads one modulation for all blocks."""
    shared = groups and model.family == "sit" and len(passes(model)) > 1
    return model.target_length if shared else length(model)


def aligned_tokens(config: TrainConfig) -> int:
    """N: how many tokens of a sample take the representation loss; 0 without one."""
    if config.noise.alignment == "none":
        return 0
    return len(range(length(config.transformer))[config.aligned])


def flops(config: TrainConfig, aim: int | None = None) -> Flops:
    """What one sample costs in this run; aim is an external teacher's width."""
    model = config.transformer
    groups = None if config.noise.times == "own" else STUDENT_GROUPS
    rows = aligned_tokens(config)
    projector = projector_linears(model, config.projector_layers, rows, aim)
    teacher = config.noise.alignment == "ema"
    return Flops(
        forward_flops(model, groups),
        sum(x.flops for x in projector),
        forward_flops(model, TEACHER_GROUPS, config.blocks[1]) if teacher else 0,
        forward_flops(model, groups, model.depth) - forward_flops(model, groups, 0),
    )


def step_flops(config: TrainConfig) -> float:
    """Of one step of the whole batch, all processes together: what MFU is measured by."""
    return float(flops(config).training * config.batch)
