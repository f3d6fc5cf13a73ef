"""A step: accumulation, what is skipped, learning rate, random numbers, options of the config."""

import math

import pytest
import torch
from torch import Tensor, nn

from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.loop import LoopConfig, State, generator


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


def small(**keys: object) -> State:
    return State(Small(), LoopConfig(**{"lr": 0.1, "warmup": 0, "batch": 8} | keys))  # type: ignore[arg-type]


def micro(state: State, x: Tensor, weight: Tensor | None = None) -> None:
    error = state.model(x).square().mean(1)
    weight = torch.ones(len(x)) if weight is None else weight
    state.backward({"loss": (error * weight).sum() / weight.sum(), "rows": torch.tensor(len(x))})


def gradients(state: State) -> list[Tensor]:
    return [p.grad.clone() for p in state.student.parameters() if p.grad is not None]


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    x = torch.randn(8, 3, generator=generator(0, 0))
    once, parts = small(), small(accumulate=4)
    micro(once, x)
    for part in x.chunk(4):
        micro(parts, part)
    for a, b in zip(gradients(once), gradients(parts), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    a, b = once.update(8), parts.update(8)
    assert (a.pop("rows"), b.pop("rows")) == (8, 2)
    assert a == pytest.approx(b, abs=1e-6)
    for p, q in zip(once.average.parameters(), parts.average.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert (parts.step, parts.samples) == (1, 8)


def test_micro_batches_count_alike_whatever_is_valid_in_them() -> None:
    """So the loss of a masked batch is another mean when it is cut, and that is meant."""
    x = torch.randn(8, 3, generator=generator(0, 0))
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])
    whole, parts = small(), small(accumulate=2)
    micro(whole, x, weight)
    for part, own in zip(x.chunk(2), weight.chunk(2), strict=True):
        micro(parts, part, own)
    error = small().model(x).square().mean(1).detach()
    assert whole.update(8)["loss"] == pytest.approx(float(error[:5].mean()), abs=1e-6)
    want = (error[:4].mean() + error[4]) / 2
    assert parts.update(8)["loss"] == pytest.approx(float(want), abs=1e-6)


def test_gradients_do_not_stay_for_the_next_step() -> None:
    state = small()
    micro(state, torch.ones(8, 3))
    state.update(8)
    assert gradients(state) == []
    micro(state, torch.ones(8, 3))
    assert state.update(8)["grad_norm"] > 0


def test_one_bad_micro_batch_skips_the_step() -> None:
    state = small(accumulate=2)
    before = [p.clone() for p in state.student.parameters()]
    micro(state, torch.ones(4, 3))
    micro(state, torch.full((4, 3), float("nan")))
    assert math.isnan(state.update(8)["loss"])
    assert (state.step, state.skipped) == (1, 1)
    assert all(torch.equal(p, q) for p, q in zip(state.student.parameters(), before, strict=True))


def test_a_finite_loss_with_an_infinite_gradient_is_skipped() -> None:
    state = small()
    before = state.student.enter.weight.clone()
    y = state.model(torch.ones(8, 3))
    state.backward({"loss": torch.sqrt((y - y).sum())})  # 0, and its slope is 1 / 0
    values = state.update(8)
    assert values["loss"] == 0
    assert not math.isfinite(values["grad_norm"])
    assert state.skipped == 1
    assert torch.equal(before, state.student.enter.weight)


def test_non_finite_steps_are_skipped_counted_and_at_last_fatal() -> None:
    state = small()
    before = state.student.enter.weight.clone()
    for _ in range(9):
        micro(state, torch.full((8, 3), float("nan")))
        state.update(8)
    assert torch.equal(before, state.student.enter.weight)
    assert torch.equal(before, state.average.enter.weight)
    assert (state.step, state.skipped) == (9, 9)
    micro(state, torch.full((8, 3), float("inf")))
    with pytest.raises(RunError, match="episode 7"):
        state.update(8, "episode 7")
    state = small()
    state.skipped_in_row = 9
    micro(state, torch.ones(8, 3))
    state.update(8)
    assert state.skipped_in_row == 0


def test_the_norm_is_of_before_clipping() -> None:
    state = small(clip=1e-3)
    micro(state, 10 * torch.ones(8, 3))
    want = torch.cat([g.flatten() for g in gradients(state)]).norm()
    assert state.update(8)["grad_norm"] == pytest.approx(float(want), rel=1e-6)


def test_the_optimiser_is_fused_adamw_with_these_betas() -> None:
    group = small(betas=[0.8, 0.95], weight_decay=0.1).optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["fused"]) == ((0.8, 0.95), 0.1, True)


def test_the_average_moves_every_step() -> None:
    state = small(ema=0.9, ema_warmup=False, accumulate=2)
    for step in range(3):
        before = [p.clone() for p in state.average.parameters()]
        for _ in range(2):
            micro(state, torch.randn(4, 3, generator=generator(0, step)))
        state.update(8)
        rows = (before, state.average.parameters(), state.student.parameters())
        for old, now, new in zip(*rows, strict=True):
            assert torch.allclose(now, 0.9 * old + 0.1 * new)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what the compiler itself does
def test_compiled_blocks_keep_their_names_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    compile = nn.Module.compile  # traced as ever, but not made into machine code for a minute
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile(block, backend="aot_eager"))
    plain, fast = small(), small(compile=True)
    assert fast.student.state_dict().keys() == plain.student.state_dict().keys()
    for step in range(2):
        x = torch.randn(8, 3, generator=generator(0, step))
        for state in (plain, fast):
            micro(state, x)
        assert plain.update(8) == pytest.approx(fast.update(8), abs=1e-5)
    assert fast.student.blocks[0]._compiled_call_impl is not None
    assert fast.average.blocks[0]._compiled_call_impl is not None


def test_activation_checkpointing_is_told_to_who_knows_it() -> None:
    class Knows(Small):
        activation_checkpointing = False

    state = State(Knows(), LoopConfig(activation_checkpointing=True))
    assert state.student.activation_checkpointing
    assert not state.average.activation_checkpointing  # without gradients nothing is kept anyway
    with pytest.raises(RunError, match="Small has none"):
        small(activation_checkpointing=True)


def test_learning_rate_depends_on_the_step_alone() -> None:
    cosine = LoopConfig(lr=1.0, warmup=10, steps=110)
    assert cosine.lr_at(0) == pytest.approx(0.1)
    assert cosine.lr_at(9) == cosine.lr_at(10) == 1.0
    assert cosine.lr_at(60) == pytest.approx(0.55)
    assert cosine.lr_at(110) == pytest.approx(0.1)
    assert LoopConfig(lr=1.0, warmup=10, steps=110, schedule="constant").lr_at(90) == 1.0


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"schedule": "linear"}, "cosine, constant"),
        ({"parallel": "dp"}, "auto, none, ddp, fsdp"),
        ({"log": ["comet"]}, "tensorboard, wandb"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"batch": 6, "accumulate": 4}, "batch=6 does not divide by accumulate=4"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"peak_flops": -1.0}, "peak_flops"),
        ({"shard_dtype": "int8"}, "float32, bfloat16"),
    ],
)
def test_values_out_of_range_are_named(keys: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoopConfig(**keys)


def test_random_numbers_of_a_step_are_its_own() -> None:
    keys = [(0, 1), (1, 0), (0, 1, 1, 0), (0, 1, 0, 1), (0, 1, 1, 1)]
    draws = [torch.rand(3, generator=generator(*k)) for k in keys]
    assert torch.equal(draws[0], torch.rand(3, generator=generator(0, 1)))
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    # runs of one process go on with the numbers they began with
    assert draws[0].tolist() == pytest.approx([0.4637425, 0.9808618, 0.4540606])
