"""MMRV and Pearson against the published tables of SIMPLER and against closed forms."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval import real_to_sim
from selfflow.eval.real_to_sim import PUBLISHED, RealToSimConfig, mmrv, pearson

PAPER = {
    "pick coke can": (0.031, 0.975),
    "move near": (0.111, 0.856),
    "open drawer": (0.000, 0.983),
    "close drawer": (0.123, 0.771),
    "place apple": (0.000, 0.969),
    "WidowX spoon on towel": (0.000, 0.827),
    "WidowX carrot on plate": (0.111, 0.571),
    "WidowX stack cube": (0.0, 1.0),
    "WidowX eggplant in basket": (0.0, 0.989),
}
rate = st.integers(0, 1000).map(lambda n: n / 1000)
scores = st.lists(st.tuples(rate, rate), min_size=2, max_size=8)


@pytest.mark.parametrize("task", PAPER)
def test_published_values(task):
    published = PUBLISHED[task]
    assert mmrv(published["sim"], published["real"]) == pytest.approx(PAPER[task][0], abs=6e-4)
    assert pearson(published["sim"], published["real"]) == pytest.approx(PAPER[task][1], abs=6e-4)


def test_every_published_task_is_checked():
    assert PUBLISHED.keys() == PAPER.keys()


def test_a_closed_form_in_which_the_order_of_arguments_matters():
    sim, real = [0.0, 0.5, 1.0], [0.2, 0.1, 0.8]  # 0 and 1 are exchanged, 0.1 apart in reality
    assert mmrv(sim, real) == pytest.approx((0.1 + 0.1 + 0.0) / 3)
    assert mmrv(real, sim) == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    # A tie in the simulator alone: the one that is worse in reality is ranked otherwise.
    assert mmrv([0.5, 0.5], [0.2, 0.6]) == pytest.approx(0.2)


@settings(max_examples=50)
@given(scores)
def test_properties(pairs):
    sim, real = (np.array(side) for side in zip(*pairs, strict=True))
    assert mmrv(real, real) == 0.0
    assert 0.0 <= mmrv(sim, real) <= np.ptp(real) + 1e-12
    assert mmrv(2 * sim, real) == mmrv(sim, real)  # ranks alone count in the simulator
    if np.ptp(sim) > 0.1 and np.ptp(real) > 0.1:
        assert pearson(sim, real) == pytest.approx(np.corrcoef(sim, real)[0, 1], abs=1e-9)
        assert pearson(sim, real) == pytest.approx(pearson(real, sim), abs=1e-12)


def test_degenerate_scores():
    assert math.isnan(pearson([0.5, 0.5], [0.2, 0.6]))
    for sim, real in (([0.5], [0.5]), ([0.5, 0.6], [0.5]), ([0.5, math.nan], [0.1, 0.2])):
        for metric in (mmrv, pearson):
            with pytest.raises(ValueError, match="score"):
                metric(sim, real)


def test_the_command_prints_the_published_table_and_a_file_s(tmp_path, capsys):
    config = compose(RealToSimConfig, "real_to_sim", [])
    real_to_sim.check(config)
    found = real_to_sim.main(config)
    printed = capsys.readouterr().out
    assert {task: (round(a, 3), round(b, 3)) for task, (a, b) in found.items()} == PAPER
    assert "0.031" in printed
    assert "0.975" in printed
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"mine": {"real": [0.1, 0.9], "sim": [0.2, 0.4]}}))
    assert real_to_sim.main(RealToSimConfig(str(path), ""))["mine"] == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"a": {"real": [1, 2]}}', '{"a": {"real": [1], "sim": [1]}}', '{"a": 3}'],
)
def test_a_wrong_file_is_one_line(tmp_path, content):
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(UserError, match="scores=") as caught:
        real_to_sim.check(RealToSimConfig(str(path), ""))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        real_to_sim.check(RealToSimConfig(str(tmp_path / "none.json"), ""))
