"""The plain per-token model of the benchmark is the published one."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval.bench.model import BenchConfig, Row, check, imported, side_by_side
from selfflow.eval.bench.per_token import PerTokenDiT, Published, randomised, sincos_2d

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "selfflow_per_token_dit_a.safetensors"


@torch.no_grad()
def test_agrees_with_the_official_outputs():
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is not here: the official outputs lie outside the repository")
    with safe_open(ORACLE, "pt") as file:
        size = {k: int(v) for k, v in file.metadata().items() if v.isdigit()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = PerTokenDiT(
        Published(
            size=size["input_size"],
            hidden=size["hidden"],
            depth=size["depth"],
            heads=size["heads"],
            classes=size["num_classes"],
        )
    )
    state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
    torch.testing.assert_close(model.pos_embed, state["pos_embed"], atol=1e-6, rtol=0)
    model.load_state_dict(state, strict=True)
    x, y, block = tensors["in.x"], tensors["in.y"], size["student_block"]

    def close(answer, name):
        torch.testing.assert_close(answer, tensors[f"out.{name}"], atol=1e-5, rtol=0)

    velocity, stream = model.with_stream(x, tensors["in.t_per_token"], y, block)
    close(velocity, "velocity_per_token")
    close(model.projector(stream), "projected_features")
    close(model.with_stream(x, tensors["in.t_per_token"], y, block + 1)[1], "raw_features_next")
    close(model(x, tensors["in.t_scalar"], y), "velocity_scalar")


def test_positions_tell_column_then_row():
    code = sincos_2d(4, 16).unflatten(0, (4, 4))  # (row, column, D)
    assert torch.equal(code[0, :, :8], code[3, :, :8])  # the first half does not see the row
    assert torch.equal(code[:, 0, 8:], code[:, 3, 8:])
    expected = torch.tensor([1.0, 10_000**-0.25, 10_000**-0.5, 10_000**-0.75])
    torch.testing.assert_close(code[0, 1, :8], torch.cat([expected.sin(), expected.cos()]))


@torch.no_grad()
def test_the_two_sides_of_the_benchmark_are_one_function():
    published = randomised(Published(size=8, hidden=96, depth=2, heads=4))
    x, tau, label = torch.randn(2, 16, 16), torch.rand(2, 2), torch.tensor([3, 1000])
    group = torch.arange(16).remainder(2).expand(2, -1)
    ours = imported(published)({"image": x}, tau, group, label=label)["image"]
    theirs = published(x, tau.gather(1, group), label)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_sides_take_turns():
    order = []
    seconds = side_by_side(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert "".join(order) == "ab" + "abbaab"
    assert [len(side) for side in seconds] == [3, 3]
    assert Row("", [4.0, 3.0], [1.0, 1.0], 1.0, "").ratios == [3.0, 4.0]


def test_mistakes():
    with pytest.raises(UserError, match="choose one of adaln, prefix, training"):
        check(compose(BenchConfig, "bench_model", ["only=all"]))
    with pytest.raises(UserError, match="repeats=0"):
        check(compose(BenchConfig, "bench_model", ["repeats=0"]))
