"""eval/bench/sim.py: the bars are read the right way round, and the twin's side runs."""

import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval.bench import sim
from selfflow.eval.bench.sim import BenchConfig, Row


def test_the_median_is_held_against_the_bar():
    assert Row("step", [10.0, 39.0, 90.0], "ms", 40.0).verdict == "met"
    assert Row("step", [10.0, 41.0, 42.0], "ms", 40.0).verdict == "MISSED"
    assert Row("speed", [1.7], "", 1.6, least=True).verdict == "met"
    assert Row("speed", [1.5], "", 1.6, least=True).verdict == "MISSED"
    assert Row("first", [99.0], "s").verdict == ""


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("backend=fake", "backend=fake: .*mujoco, simpler"),
        ("task=nope", "no such task"),
        ("steps=0", "must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(override: str, says: str):
    with pytest.raises(UserError, match=says):
        sim.check(compose(BenchConfig, "bench_sim", [override]))


def test_a_task_that_the_twin_has_not_is_refused():
    overrides = ["backend=mujoco", "task=widowx_stack_cube"]
    with pytest.raises(UserError, match="task=widowx_stack_cube"):
        sim.check(compose(BenchConfig, "bench_sim", overrides))


@pytest.mark.slow
def test_the_twin_s_bars_are_printed(capsys):
    rows = sim.main(compose(BenchConfig, "bench_sim", ["backend=mujoco", "steps=2", "resets=2"]))
    assert [row.bar for row in rows] == [0.3, 30, None, 8, 25, None] * 3 + [1.6] * 2
    assert [row.what.split(":")[0] for row in rows[::6]][:3] == list(sim.SCENES)
    assert all(value > 0 for row in rows for value in row.values)
    assert "scene construction" in capsys.readouterr().out
