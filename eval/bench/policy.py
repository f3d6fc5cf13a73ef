"""python eval/bench/policy.py   (a minute; with big=true also a 675 M policy, tens of seconds)

What a decision costs, by way of decoding: from an observation to actions. `head` is the bundled
policy, with the backbone's pass over the conditions kept (as it always is) and, for comparison,
made again at every step; `joint` is a whole tiny backbone with random weights, which denoises video
and actions, with attention=prefix (conditions kept) and full; `best of N` imagines what N chunks
lead to on such a backbone, and scores it. Beside the time of few steps stands how far their actions
lie from those of 64 steps from the same noise. The bar is on processor time of one thread, which
other work on the machine disturbs less than it does the clock; on a busy machine both are too high.

Then an ESTIMATE of 675 M on GPUs, by arithmetic and never measured: the FLOPs of worldmodel/cost.py
at 40 % of the card's dense bf16 peak or the time to read the weights once a step, whichever is
longer. Codec, text and kernel launches are not counted, so it is rather a lower bound.
"""

import gc
import itertools
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selfflow.configs.entry import compose, launch
from selfflow.datasets.spec import POSITION, Observation, UserError
from selfflow.eval.parts import BUNDLED
from selfflow.policies.acting import ChunkPolicy
from selfflow.policies.flow_policy import FlowPolicy
from selfflow.policies.head import HeadConfig, PolicyModel
from selfflow.policies.joint_policy import JointPolicy
from selfflow.policies.judging import Eyes, Judge, ValueHead, ValueSizes
from selfflow.policies.quick import quicken
from selfflow.worldmodel.cost import forward_flops, parameters
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.sampler import Velocity, euler
from selfflow.worldmodel.train_config import TrainConfig
from selfflow.worldmodel.transformer import Tokens, VideoActionTransformer

BAR = 15.0  # ms, of the bundled policy as it is
STEPS = (1, 2, 4, 8)
FEW = (*STEPS, 16)
CANDIDATES = (2, 4, 8)
IMAGINE_STEPS, READ_BLOCK = 4, 4  # of best-of-N; as configs/value.yaml has them
EXACT = 64  # steps
HEAD_DEPTH, READ_AT = 3, 0.7  # as configs/finetune.yaml has them
GROUPS = 2  # noise groups: conditions and targets
MFU = 0.4
# dense bf16 peak in FLOP/s with fp32 accumulation, memory in byte/s: makers' data sheets
CUT = ["data=[none]", "experiment=rt1_675m"]  # the mission's size
GPUS = {"RTX 4090": (165e12, 1.01e12), "A100 80 GB": (312e12, 2.04e12), "H100": (989e12, 3.35e12)}


@dataclass(frozen=True)
class BenchConfig:
    """Every key of configs/bench_policy.yaml, which explains them."""

    checkpoint: str | None
    repeats: int
    threads: int
    big: bool


@dataclass(frozen=True)
class Row:
    """What one way took: milliseconds of each decision; and how good its few steps are."""

    what: str
    clock: list[float]
    processor: list[float]
    apart: float | None = None  # mm, root mean square of the position deltas
    bar: float | None = None

    @property
    def verdict(self) -> str:
        """met, MISSED or nothing."""
        if self.bar is None:
            return ""
        return "met" if statistics.median(self.processor) <= self.bar else "MISSED"


@dataclass(frozen=True)
class Way:
    """A way of deciding; `few`: its steps are held against many."""

    what: str
    policy: ChunkPolicy
    few: bool = False


class Forgetful(FlowPolicy):
    """Without the kept pass: the backbone reads the conditions anew at every step."""

    def _field(self, tokens: Tokens, valid: Tokens) -> Velocity:
        return lambda x, t: FlowPolicy._field(self, tokens, valid)(x, t)


def check(config: BenchConfig) -> None:
    """Raises UserError."""
    if config.repeats < 1 or config.threads < 1:
        raise UserError(f"repeats={config.repeats}, threads={config.threads}: must be 1 or more")
    FlowPolicy.load(config.checkpoint or BUNDLED)


def main(config: BenchConfig) -> list[Row]:
    """Measures, prints the tables and returns the first one's rows."""
    torch.set_num_threads(config.threads)
    load = os.getloadavg()[0]
    console = Console() if Console().is_terminal else Console(width=140)
    policy = FlowPolicy.load(config.checkpoint or BUNDLED)
    seen = observations(policy, 8)
    rows = []
    with Console(stderr=True).status("deciding") as status:
        for way in ways(policy):
            status.update(way.what)
            row = timed(way, seen, config.repeats)
            rows.append(replace(row, bar=BAR) if way.policy is policy else row)
            gc.collect()
    console.print(table(rows, config))
    console.print(f"{os.cpu_count()} cores, load at the start {load:.1f}")
    if config.big:
        console.print(big_decision(), highlight=False)
    console.print(estimates())
    return rows


def ways(policy: FlowPolicy) -> list[Way]:
    """Every way of deciding that is timed; the policy itself is the first."""
    parts, robot, own = policy.parts, policy.robot, policy.decoding
    chunk = parts.layout.chunk

    def head(**changes: Any) -> FlowPolicy:
        return FlowPolicy(parts, robot, replace(own, **changes))

    made = [Way(f"head as it is, {own.steps} steps", policy)]
    made += [Way(f"head, {n} steps", head(steps=n), few=True) for n in FEW]
    heun = [head(steps=n, solver="heun") for n in FEW]
    made += [Way(f"head, {p.steps} steps of heun", p, few=True) for p in heun]
    for n in STEPS:
        forgetful = Forgetful(parts, robot, replace(own, steps=n))
        made.append(Way(f"head, {n} steps, nothing kept", forgetful))
    ensemble, late = head(execute=1, ensemble=0.01), head(execute=chunk // 2, delay=1)
    made.append(Way(f"head, {own.steps} steps, ensemble of {chunk}", ensemble))
    made.append(Way(f"head, {own.steps} steps, delay=1", late))
    for n in CANDIDATES:
        made.append(Way(f"head, {own.steps} steps, best of {n}", best_of(policy, n)))
    for attention, n in itertools.product(("prefix", "full"), STEPS):
        world = replace(parts, model=random_world(attention), layout=Layout())
        joint = JointPolicy(world, robot, replace(own, decode="joint", steps=n, execute=chunk))
        made.append(Way(f"joint, {n} steps, attention={attention}", joint))
    return made


def random_world(attention: str) -> VideoActionTransformer:
    """The tiny world model of configs/model/tiny.yaml on the default layout."""
    model = VideoActionTransformer(tiny(attention)).eval().requires_grad_(False)
    quicken(model)
    return model


def tiny(attention: str) -> ModelConfig:
    """Of configs/model/tiny.yaml."""
    return ModelConfig(192, 6, 6, 4.0, attention, Layout().modalities())


def best_of(policy: FlowPolicy, count: int) -> FlowPolicy:
    """The policy's sizes on a whole tiny backbone, with a value head; all weights are random."""
    model = PolicyModel(tiny("prefix"), policy.parts.model.head.config, READ_BLOCK)
    model.eval().requires_grad_(False)
    quicken(model.backbone)
    quicken(model.head, copies=True)
    parts = replace(policy.parts, model=model, layout=Layout())
    sizes = ValueSizes(192, READ_BLOCK, queries=8, hidden=256, steps=IMAGINE_STEPS)
    judge = Judge(Eyes(model.backbone, Layout(), parts.codec), ValueHead(sizes))
    return FlowPolicy(parts, policy.robot, replace(policy.decoding, best_of=count), judge=judge)


def observations(policy: FlowPolicy, count: int) -> list[Observation]:
    """What the policy sees at every 8th step as it acts in the twin."""
    from selfflow.datasets.spec import task_named
    from selfflow.envs.twin import make_mujoco

    env = make_mujoco(task_named("open_drawer_place"), "mild")
    seen, _ = env.reset(seed=100_000)
    policy.reset(0)
    kept = [seen]
    while len(kept) < count:
        for _ in range(8 // policy.execute):
            for action in policy.act(seen).actions:
                seen = env.step(action)[0]
        kept.append(seen)
    env.close()
    return kept


def timed(way: Way, seen: list[Observation], repeats: int) -> Row:
    """Decisions on these observations in turn, one episode."""
    policy = way.policy
    policy.reset(0)
    clock, processor = [], []
    for n in range(-2, repeats):
        began = time.perf_counter(), time.process_time()
        policy.act(seen[n % len(seen)])
        if n >= 0:
            clock.append(1e3 * (time.perf_counter() - began[0]))
            processor.append(1e3 * (time.process_time() - began[1]))
    return Row(way.what, clock, processor, apart(policy, seen) if way.few else None)


def apart(policy: ChunkPolicy, seen: list[Observation]) -> float:
    """Root mean square difference, mm, of the position deltas of whole chunks from those of EXACT
    steps of the same solver from the same noise."""
    chunk = policy.parts.layout.chunk
    deltas = []
    for steps in (policy.steps, EXACT):
        how = replace(policy.decoding, steps=steps, execute=chunk)
        one = FlowPolicy(policy.parts, policy.robot, how)
        found = []
        for seed, observation in enumerate(seen):
            one.reset(seed)
            found.append(one.act(observation).actions[:, POSITION])
        deltas.append(np.stack(found))
    return 1e3 * float(np.sqrt(np.mean((deltas[0] - deltas[1]) ** 2)))


def table(rows: list[Row], config: BenchConfig) -> Table:
    """Medians; the clock's 95th percentile and the least processor time beside."""
    title = f"one decision, {config.threads} thread(s), n = {config.repeats}"
    out = Table(title=title, title_justify="left")
    columns = ("clock, ms", "p95", "processor, ms", "least", f"from {EXACT} steps, mm", "bar")
    for name in ("way", *columns):
        out.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        clock, processor = statistics.median(row.clock), statistics.median(row.processor)
        far = "" if row.apart is None else f"{row.apart:.2f}"
        bar = "" if row.bar is None else f"≤ {row.bar:g}: {row.verdict}"
        times = clock, np.percentile(row.clock, 95), processor, min(row.processor)
        out.add_row(row.what, *(f"{ms:.1f}" for ms in times), far, bar)
    return out


def head_of(model: ModelConfig, chunk: int) -> HeadConfig:
    """As policies/finetune.py makes it."""
    width = model.hidden
    return HeadConfig(width, HEAD_DEPTH, model.heads, model.mlp_ratio, chunk, 8, width)


def head_flops(head: HeadConfig, memory: int) -> tuple[int, int]:
    """Of reading so many memory tokens, once a decision, and of one step. Modulations are kept."""
    d, k, blocks = head.hidden, head.chunk, head.depth
    read = blocks * 2 * memory * head.memory * 2 * d
    matrices = (4 + 2) * d * d + 2 * d * int(d * head.mlp_ratio)  # attention, looking, MLP
    step = blocks * (2 * k * matrices + 4 * k * (k + memory) * d)
    return read, step + 2 * 2 * k * head.channels * d


@dataclass(frozen=True)
class Work:
    """What a decision computes: once, and in every step; weights in bf16."""

    name: str
    once: int  # FLOPs
    step: int
    bytes_once: int
    bytes_step: int

    def seconds(self, steps: int, peak: float, bandwidth: float) -> float:
        """On a card: arithmetic or reading the weights, whichever takes longer."""
        once = max(self.once / (MFU * peak), self.bytes_once / bandwidth)
        return once + steps * max(self.step / (MFU * peak), self.bytes_step / bandwidth)


def work_of(config: TrainConfig) -> list[Work]:
    """Of `head` and `joint` with the model and layout of a pretraining run."""
    model = config.transformer
    encoder = model.encoder(model.block_at(READ_AT))
    head = head_of(model, config.layout.chunk)
    read, step = head_flops(head, model.prefix_length)
    with torch.device("meta"):
        weights = sum(p.numel() for p in PolicyModel(encoder, head).head.parameters())
    reading = parameters(encoder).backbone
    prefix, full = (
        forward_flops(replace(model, attention=attention), GROUPS)
        for attention in ("prefix", "full")
    )
    kept, every = forward_flops(model.encoder(model.depth), 1), 2 * parameters(model).backbone
    return [
        Work("head", forward_flops(encoder, 1) + read, step, 2 * reading, 2 * weights),
        Work("joint, attention=prefix", kept, prefix - kept, every, every),
        Work("joint, attention=full", 0, full, 0, every),
    ]


def estimates() -> Table:
    """Of the mission's size on each card."""
    title = "ESTIMATE of a 675 M decision on a GPU, ms: arithmetic, not measured"
    out = Table(title=title, title_justify="left")
    for name in ("way", "steps", "TFLOP", *GPUS):
        out.add_column(name, justify="left" if name == "way" else "right")
    for work in work_of(compose(TrainConfig, "train", CUT)):
        for steps in (1, 8) if work.name == "head" else (1, 20, 50):
            total = (work.once + steps * work.step) / 1e12
            cells = [f"{1e3 * work.seconds(steps, *card):.3g}" for card in GPUS.values()]
            out.add_row(work.name, str(steps), f"{total:.3g}", *cells)
    return out


@torch.no_grad()
def big_decision(steps: int = 8) -> str:
    """One decision of the head on a 675 M backbone's first blocks, random weights, fp32."""
    config = compose(TrainConfig, "train", CUT)
    model = config.transformer
    encoder = model.encoder(model.block_at(READ_AT))
    policy = PolicyModel(encoder, head_of(model, config.layout.chunk)).eval().requires_grad_(False)
    tokens = {m.name: torch.randn(1, m.length, m.channels) for m in encoder.modalities}
    began = time.perf_counter(), time.process_time()
    memory = policy.head.read(policy.memory(tokens, {}))
    kept = time.process_time() - began[1]

    def velocity(x: Tensor, t: float) -> Tensor:
        return policy.head(x, policy.head.modulations(torch.tensor([t])), memory)

    euler(velocity, torch.randn(1, config.layout.chunk, policy.head.config.channels), steps)
    taken, busy = time.perf_counter() - began[0], time.process_time() - began[1]
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    return (
        f"675 M, head, measured once: {taken:.2f} s a decision; of the processor {busy:.2f} s, of "
        f"which {kept:.2f} s for {encoder.prefix_length} condition tokens, the rest for {steps} "
        f"steps; {encoder.depth} of {model.depth} blocks and head, {millions:.0f} M parameters, "
        f"random, fp32, {torch.get_num_threads()} thread(s); image codec and text not counted"
    )


if __name__ == "__main__":
    launch(BenchConfig, main, "bench_policy", check)
