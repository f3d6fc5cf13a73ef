"""A checkpoint's statistics against other data's: the verdicts, and what finetune.py does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selfflow.datasets.compatibility import compare, settle
from selfflow.datasets.normalize import Statistics, fit, from_json, statistics_for, to_json
from selfflow.datasets.source import open_source, open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.windows import WindowSpec
from selfflow.policies.finetune import FinetuneConfig, scaling
from selfflow.worldmodel.batches import prepare
from selfflow.worldmodel.checkpoint import load
from selfflow.worldmodel.loop import LoopConfig

SHIPPED = str(Path(__file__).parents[1] / "checkpoints/twin")


@pytest.fixture(scope="module")
def own(store: Path) -> Statistics:
    return fit([open_source(str(store))])["google_robot"]


def changed(stat: Statistics, factor: float, shift: float, dimension: int = 0) -> Statistics:
    """Dimension's range multiplied, and moved by `shift` of its old half range."""
    low, high = list(stat.action_q01), list(stat.action_q99)
    middle, half = (low[dimension] + high[dimension]) / 2, (high[dimension] - low[dimension]) / 2
    low[dimension] = middle + shift * half - factor * half
    high[dimension] = middle + shift * half + factor * half
    return replace(stat, action_q01=tuple(low), action_q99=tuple(high))


@pytest.mark.parametrize(
    ("factor", "shift", "verdict"),
    [
        (1.0, 0.0, "fits"),
        (1.9, 0.4, "fits"),
        (2.1, 0.0, "wide"),
        (0.4, 0.0, "narrow"),
        (1.0, 0.6, "shifted"),
        (0.0, 0.0, "constant here"),
        (0.0, 1.5, "shifted"),
    ],
)
def test_verdicts(own: Statistics, factor: float, shift: float, verdict: str) -> None:
    row = compare(own, changed(own, factor, shift))[0]
    assert (row.name, row.verdict) == ("dx", verdict)
    assert row.ratio == pytest.approx(factor)
    assert row.offset == pytest.approx(shift)
    others = compare(own, changed(own, factor, shift))[1:]
    assert all(other.same for other in others)
    assert len(others) == 8  # the gripper is never scaled; the position is


def test_a_constant_of_the_checkpoint_loses_what_moves_here(own: Statistics) -> None:
    still = changed(own, 0.0, 0.0)
    assert compare(still, own)[0].verdict == "constant there"
    assert compare(still, still)[0].same


def test_mismatch_is_an_error_until_the_user_chooses(
    own: Statistics, capsys: pytest.CaptureFixture
) -> None:
    data, init = {"google_robot": changed(own, 3.0, 0.0)}, {"google_robot": own}
    assert settle({"google_robot": own}, init, None, "run") == init
    assert capsys.readouterr().out == ""  # nothing to say of the same data
    close = {"google_robot": changed(own, 1.2, 0.0)}
    assert settle(close, init, None, "run") == close
    assert "1.20" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"init=run has other statistics .*: dx wide; choose"):
        settle(data, init, None, "run")
    assert settle(data, init, "data", "run") == data
    assert settle(data, init, "init", "run") == init
    elsewhere = {"widowx": own}
    assert settle(data, elsewhere, None, "run") == data
    with pytest.raises(UserError, match=r"has none for google_robot; only \[widowx\]"):
        settle(data, elsewhere, "init", "run")
    faster = {"google_robot": replace(own, control_hz=30.0)}
    for choice in (None, "init"):
        with pytest.raises(UserError, match=r"another action space .*control_hz is 3\.0 there"):
            settle(faster, init, choice, "run")
    assert settle(faster, init, "data", "run") == faster


def test_finetuning_asks_whose_scale_counts(own: Statistics, tmp_path: Path) -> None:
    config = FinetuneConfig(data="x", init=SHIPPED, out=str(tmp_path))
    shipped = from_json(load(SHIPPED).statistics)
    assert scaling(config, shipped) == shipped
    with pytest.raises(UserError, match="scale_by=data"):
        scaling(config, {"google_robot": own})
    assert scaling(replace(config, scale_by="init"), {"google_robot": own}) == shipped
    assert scaling(replace(config, init=None), {"google_robot": own}) == {"google_robot": own}
    with pytest.raises(ValueError, match="there is no init"):
        FinetuneConfig(scale_by="init")
    with pytest.raises(ValueError, match="choose data or init"):
        FinetuneConfig(scale_by="mean")


def test_training_scales_by_the_file_that_is_named(
    store: Path, own: Statistics, tmp_path: Path
) -> None:
    file, wide = tmp_path / "stats.json", changed(own, 3.0, 0.0)
    file.write_text(json.dumps(to_json({"google_robot": wide})))
    config = LoopConfig(data=str(store), out=str(tmp_path / "run"), statistics=str(file))
    sources, weights = open_sources(config.sources)
    spec = WindowSpec(frames=(0,), chunk=4, height=16, width=16)
    assert prepare(config, sources, weights, spec)[1] == {"google_robot": wide}
    config = replace(config, statistics=None)
    assert prepare(config, sources, weights, spec)[1] == {"google_robot": own}


def test_statistics_of_a_file_must_cover_the_data(store: Path, own: Statistics) -> None:
    source = open_source(str(store))
    given = {"google_robot": own, "widowx": own}
    assert statistics_for([source], given, "s.json") == {"google_robot": own}
    with pytest.raises(UserError, match=r"s\.json has no statistics of 'google_robot'.*\[widowx\]"):
        statistics_for([source], {"widowx": own}, "s.json")
    with pytest.raises(UserError, match="frame=tool"):
        statistics_for([source], {"google_robot": replace(own, frame="tool")}, "s.json")
