"""python eval/bench/model.py only=adaln

Three savings of the model, each timed against doing without it, both sides in the same run:

- adaln: adaLN once a noise group, against eval/bench/per_token.py, the published per-token model,
  with the same weights; a forward of 675 M on 4 x 256 tokens.
- training: the same within our own model: forward and backward of `tiny`, one time a group against
  one a token.
- prefix: 6 actions in 10 Euler steps against a kept condition pass of 2 frames of 256 tokens, that
  pass included, against the whole sequence every step; 675 M.

Timed in bf16 (adaln, prefix: bf16 weights; training: autocast), equality checked in fp32 first.
Needs 6 GB of memory and a few minutes of an otherwise idle CPU.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor, nn

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.spec import UserError
from selfflow.eval.bench.per_token import PerTokenDiT, Published, randomised
from selfflow.worldmodel.import_checkpoint import IMAGE, convert
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.sampler import euler
from selfflow.worldmodel.transformer import Modality, ModelConfig, Tokens, VideoActionTransformer

BATCH, TOKENS = 4, 256  # of adaln
STEPS, ACTIONS, FRAMES = 10, 6, 2  # of prefix
TINY_BATCH = 64
Run = Callable[[], object]


@dataclass(frozen=True)
class BenchConfig:
    """Every key of configs/bench_model.yaml, which explains them."""

    only: str | None
    repeats: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of both sides by repeat, and how far their outputs lie apart."""

    name: str
    baseline: list[float]
    ours: list[float]
    bar: float
    apart: str

    @property
    def ratios(self) -> list[float]:
        """Baseline over ours, of runs side by side, rising."""
        return sorted(a / b for a, b in zip(self.baseline, self.ours, strict=True))


def check(config: BenchConfig) -> None:
    """Raises UserError."""
    if config.only is not None:
        one_of("only", config.only, PARTS)
    if config.repeats < 1 or config.threads < 0:
        raise UserError(f"repeats={config.repeats}: 1 or more; threads={config.threads}: 0 or more")


def main(config: BenchConfig) -> None:
    """Measures, then prints the table."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    table = Table(
        "what", "without", "with", "ratio", "range", "bar", "outputs apart",
        title=f"median of {config.repeats}, bf16, {torch.get_num_threads()} threads",
    )  # fmt: skip
    for name, part in PARTS.items():
        if config.only in (None, name):
            with Console(stderr=True).status(name):
                row = part(config.repeats)
            gc.collect()
            ratio = statistics.median(row.ratios)
            table.add_row(
                row.name,
                *(f"{statistics.median(side):.3f} s" for side in (row.baseline, row.ours)),
                f"{ratio:.2f}x",
                f"{row.ratios[0]:.2f} .. {row.ratios[-1]:.2f}",
                f"{row.bar:.2f}x {'met' if ratio >= row.bar else 'MISSED'}",
                row.apart,
            )
    Console(width=130).print(table)


def side_by_side(baseline: Run, ours: Run, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each repeat; who goes first alternates."""
    runs, seconds = (baseline, ours), ([], [])
    for run in runs:
        run()
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            start = time.perf_counter()
            runs[side]()
            seconds[side].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def adaln(repeats: int) -> Row:
    """Per noise group against per token, at 675 M."""
    published = randomised(Published())
    model = imported(published)
    generator = Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, 16, generator=generator)
    tau = torch.rand(BATCH, 2, generator=generator)
    group = (torch.rand(BATCH, TOKENS, generator=generator) < 0.25).long()
    label = torch.randint(0, 1000, (BATCH,), generator=generator)
    per_token = tau.gather(1, group)

    def ours(n: int = BATCH) -> Tensor:
        tokens = {IMAGE: x[:n].to(model.final.weight.dtype)}
        return model(tokens, tau[:n], group[:n], label=label[:n])[IMAGE]

    def theirs(n: int = BATCH) -> Tensor:
        return published(x[:n].to(published.pos_embed.dtype), per_token[:n], label[:n])

    exact, exact_theirs = ours(1), theirs(1)
    apart = f"{(exact - exact_theirs).abs().max():.1e} in fp32"
    published.bfloat16()
    model.bfloat16()
    bf16 = (ours(1).float() - theirs(1).float()).square().mean().sqrt()
    size = exact.square().mean().sqrt()
    rounding = (theirs(1).float() - exact).square().mean().sqrt()
    apart += f"; bf16 rms {bf16 / size:.1e} (its rounding {rounding / size:.1e})"
    seconds = side_by_side(theirs, ours, repeats)
    return Row(f"adaln: 675 M, {BATCH} x {TOKENS} tokens", *seconds, 1.35, apart)


def imported(published: PerTokenDiT) -> VideoActionTransformer:
    """Our model with the published one's weights; unconverted tensors share their memory."""
    config, weights = convert(published.state_dict(), published.sizes.heads)
    model = VideoActionTransformer(config)
    start = "backbone."
    model.load_state_dict(
        {k[len(start) :]: v for k, v in weights.items() if k.startswith(start)}, assign=True
    )
    return model.eval().requires_grad_(False)


def training(repeats: int) -> Row:
    """Forward and backward of tiny on what worldmodel/train.py feeds it by default."""
    modalities = Layout().modalities()
    sizes = ModelConfig(192, 6, 6, 4.0, attention="prefix", modalities=modalities)
    model = awake(VideoActionTransformer(sizes))
    generator = Generator().manual_seed(0)
    tokens = {
        m.name: torch.randn(TINY_BATCH, m.length, m.channels, generator=generator)
        for m in modalities
    }
    tau = torch.rand(TINY_BATCH, 3, generator=generator)
    count, first = sum(m.length for m in modalities), model.config.prefix_length
    group = 1 + (torch.rand(TINY_BATCH, count, generator=generator) < 0.1).long()
    group[:, :first] = 0
    per_token = tau.gather(1, group)

    def step(tau: Tensor, group: Tensor | None, bf16: bool = True) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            velocity = model(tokens, tau, group)
        loss = torch.stack([v.float().square().mean() for v in velocity.values()]).sum()
        loss.backward()
        return loss.detach()

    def gradient(tau: Tensor, group: Tensor | None) -> Tensor:
        step(tau, group, bf16=False)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours, theirs = gradient(tau, group), gradient(per_token, None)
    apart = f"gradient {(ours - theirs).abs().max() / theirs.abs().max():.1e} in fp32"
    seconds = side_by_side(lambda: step(per_token, None), lambda: step(tau, group), repeats)
    return Row(f"training: tiny, batch {TINY_BATCH}", *seconds, 1.3, apart)


@torch.no_grad()
def prefix(repeats: int) -> Row:
    """Actions sampled against a kept condition pass, at 675 M."""
    modalities = (
        Modality("context", 16, FRAMES * TOKENS, "condition", (FRAMES, 16, 16)),
        Modality("action", 7, ACTIONS, "target", (ACTIONS, 1, 1)),
    )
    sizes = ModelConfig(1152, 28, 16, 4.0, attention="prefix", modalities=modalities)
    model = awake(VideoActionTransformer(sizes)).requires_grad_(False)
    generator = Generator().manual_seed(0)
    context = torch.randn(1, FRAMES * TOKENS, 16, generator=generator)
    noise = torch.randn(1, ACTIONS, 7, generator=generator)
    group = torch.cat([torch.zeros(1, FRAMES * TOKENS), torch.ones(1, ACTIONS)], 1).long()
    clean = torch.zeros(1)

    def given() -> Tokens:
        return {"context": context.to(model.final.weight.dtype)}

    def whole() -> Tensor:
        def velocity(x: Tensor, t: float) -> Tensor:
            return model(given() | {"action": x}, torch.tensor([[0.0, t]]), group)["action"]

        return euler(velocity, noise.to(model.final.weight.dtype), STEPS)

    def cached() -> Tensor:
        kept = model.prefix(given(), clean)

        def velocity(x: Tensor, t: float) -> Tensor:
            return model.decode({"action": x}, torch.tensor([[t]]), None, kept)["action"]

        return euler(velocity, noise.to(model.final.weight.dtype), STEPS)

    apart = f"{(whole() - cached()).abs().max():.1e} in fp32"
    model.bfloat16()
    bf16 = (whole().float() - cached().float()).square().mean().sqrt()
    apart += f"; bf16 rms {bf16:.1e}"
    seconds = side_by_side(whole, cached, repeats)
    return Row(f"prefix: 675 M, {ACTIONS} actions, {STEPS} steps", *seconds, 5.0, apart)


def awake(model: VideoActionTransformer) -> VideoActionTransformer:
    """Fresh weights, but none at zero: a fresh model answers zero whatever it is given."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            std = 0.3 if name.startswith(("blocks", "final")) else 1.0
            nn.init.normal_(layer.weight, std=std * layer.in_features**-0.5)
    return model


PARTS: dict[str, Callable[[int], Row]] = {"adaln": adaln, "training": training, "prefix": prefix}

if __name__ == "__main__":
    launch(BenchConfig, main, "bench_model", check=check)
