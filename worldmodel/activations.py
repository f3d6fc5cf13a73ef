"""Bytes that one sample's forward pass keeps for its backward pass, counted tensor by tensor.

Weights are fp32 and matrix products bf16 (precision=bf16, autocast) or fp32. Counted: what autograd
saves of the blocks, the modalities' projections, the projector and the losses. Not counted: weights
and their bf16 copies (plan.py has them), what an operation needs only while it runs.
On CUDA autocast widens addcmul and the norms to fp32, and attention is fused; a CPU keeps them
in bf16, and up to layers.SHORT its attention keeps all probabilities.

D width, M hidden width of the MLP, H heads, L tokens, S tokens attended to, C channels.
"""

from dataclasses import dataclass

from selfflow.worldmodel.cost import STUDENT_GROUPS, aligned_tokens, length, passes, spread_tokens
from selfflow.worldmodel.layers import SHORT
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.train_config import TrainConfig

FULL = 4  # bytes of an fp32 number


@dataclass(frozen=True)
class Numbers:
    """Bytes an element."""

    low: int  # of matrix products
    wide: int  # of modulations and branch outputs, where they meet the residual stream
    cuda: bool


def numbers(precision: str, device: str) -> Numbers:
    """For precision bf16 or fp32 on cuda or cpu."""
    low, cuda = (2 if precision == "bf16" else FULL), device == "cuda"
    return Numbers(low, FULL if cuda else low, cuda)


@dataclass(frozen=True)
class Activations:
    """Bytes a sample."""

    blocks: dict[str, int]  # by kind, without checkpointing
    ends: dict[str, int]  # before and behind the blocks
    inputs: int  # of all blocks: what checkpointing keeps of them
    largest: int  # block, which checkpointing brings back one at a time
    batch: int  # the tokens themselves: clean, noised, velocity, the teacher's

    def saved(self, checkpointing: bool) -> int:
        """What autograd keeps until the backward pass."""
        blocks = self.inputs if checkpointing else sum(self.blocks.values())
        return blocks + sum(self.ends.values())

    def total(self, checkpointing: bool) -> int:
        """`saved` and the batch."""
        return self.saved(checkpointing) + self.batch


def activation_bytes(config: TrainConfig, device: str = "cuda") -> Activations:
    """Of one sample in this run."""
    model, n = config.transformer, numbers(config.precision, device)
    groups = None if config.noise.times == "own" else STUDENT_GROUPS
    kinds: dict[str, int] = {}
    largest = 0
    for block in range(1, model.depth + 1):
        own = _block(model, block, n, groups)
        largest = max(largest, sum(own.values()))
        for name, size in own.items():
            kinds[name] = kinds.get(name, 0) + size
    tokens = sum(m.length * m.channels for m in model.modalities)
    noised = sum(m.length * m.channels for m in model.targets)
    batch = (tokens + 3 * noised) * FULL
    return Activations(kinds, _ends(config, n), _inputs(model, n), largest, batch)


def _block(model: ModelConfig, block: int, n: Numbers, groups: int | None) -> dict[str, int]:
    """Bytes by kind of tensor."""
    own, width, hidden = length(model), model.hidden, int(model.hidden * model.mlp_ratio)
    flux, double = model.family == "flux", block <= model.double_blocks
    branches = 1 if flux and not double else 2  # single blocks add once to the residual stream
    gates = branches * FULL  # CUDA's fp32 copies
    if not n.cuda or n.low == FULL:
        gates = 0 if flux else 2 * n.low  # those of flux are shared by all blocks: see _ends
    queries = _flux_queries if flux else _sit_queries
    return {
        "residual stream": own * branches * width * FULL,
        "layer norms": own * branches * (width + 2) * FULL,
        "modulation by token": spread_tokens(model, groups) * (branches * n.wide + gates) * width,
        "inputs of products": own * branches * width * n.low,
        "branch outputs": own * branches * width * n.wide,
        # flux: both halves, SiLU of one, their product
        "MLP": own * (4 if flux else 2) * hidden * n.low,
        "queries, keys, values": sum(queries(model, *pair, n, double) for pair in passes(model)),
        "attention": sum(_attention(model, *pair, n, double) for pair in passes(model)),
    }


def _plain(own: int, seen: int, n: Numbers) -> bool:
    """Whether layers.attend keeps the probabilities: bf16 on a CPU, few tokens."""
    return not n.cuda and n.low < FULL and own * seen <= SHORT


def _attention(model: ModelConfig, own: int, seen: int, n: Numbers, double: bool) -> int:
    """Probabilities or what stands for them, and the output."""
    output = own * model.hidden * n.low
    if _plain(own, seen, n):
        return own * seen * model.heads * n.low + output
    # the fused kernel keeps its output; flux gives copies of it to the next product
    copies = 2 if model.family == "flux" else 1
    return own * model.heads * FULL + copies * output


def _sit_queries(model: ModelConfig, own: int, seen: int, n: Numbers, double: bool) -> int:
    cell = model.hidden * n.low
    joined = 2 * seen if seen > own else 0  # keys and values of the prefix beside the own ones
    if _plain(own, seen, n):
        return (own + (joined or 2 * own)) * cell
    turned = 2 * own if model.positions == "rope" else 0
    return (3 * own + joined + turned) * cell


def _flux_queries(model: ModelConfig, own: int, seen: int, n: Numbers, double: bool) -> int:
    wide = model.hidden * FULL
    # norms of queries and keys: what goes in, and on a CPU also what comes out before the scale
    norms = own * wide * 2 * ((n.low < FULL) + (not n.cuda)) + 2 * own * model.heads * FULL
    # all three as they come from the product: a single block's are one tensor with the MLP's
    stored = 3 * own if not double or n.low == FULL else 0
    values = seen if double or seen > own or _plain(own, seen, n) else 0
    return norms + (stored + own + seen + values) * model.hidden * n.low


def _inputs(model: ModelConfig, n: Numbers) -> int:
    """All blocks' residual streams, and the keys and values of the prefix, for targets to see.

    Those are views, of which the whole tensor stays.
    """
    width, hidden = model.hidden, int(model.hidden * model.mlp_ratio)
    doubles, streams = model.double_blocks, model.depth * length(model) * width * FULL
    if model.attention == "full":
        return streams
    stored = {"sit": model.depth * 3 * width, "flux": 0}[model.family]
    if model.family == "flux":
        stored = 2 * width * doubles + (4 * width + 2 * hidden) * (model.depth - doubles)
    return streams + model.prefix_length * stored * n.low


def _ends(config: TrainConfig, n: Numbers, aim: int | None = None) -> dict[str, int]:
    """Before and behind the blocks."""
    model, targets = config.transformer, config.transformer.target_length
    width, aligned = model.hidden, aligned_tokens(config)
    last = length(model) if model.attention == "full" else targets  # a view of all, if one stream
    between = (config.projector_layers - 1) * 2 * 2 * width  # each before and after its SiLU
    read = sum(m.length * m.channels for m in model.modalities)
    written = sum(m.length * m.channels for m in model.targets)
    return {
        "projections in": read * n.low,
        "projections out": (last + targets) * width * FULL + targets * width * (n.wide + n.low),
        "shared modulation": 15 * length(model) * width * n.low if model.family == "flux" else 0,
        "losses": written * FULL,
        "projector and cosine": aligned * FULL * (width + between + 2 * (aim or width)),
    }
