"""Curves of success from made-up rollouts and runs."""

import json
from pathlib import Path

import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval import curve
from selfflow.eval.curve import CurveConfig
from selfflow.eval.report import wilson
from selfflow.worldmodel.checkpoint import COUNTERS


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def a_checkpoint(run: Path, step: int, episodes: int, batch: int = 64) -> Path:
    """As fine-tuning leaves it, but for its weights."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    write(folder / "config.json", {"provenance": {"data": ["gone"], "step": step}})
    state = {"step": step, "data": {"a": [episodes - 10, 900], "b": [10, 90]}}
    counters = dict.fromkeys(COUNTERS, step)
    write(folder / "train" / "state.json", counters | state)
    (folder / "model.safetensors").write_text("weights")
    write(run / "config.json", {"batch": batch})
    return folder


def a_rollout(folder: Path, where: Path, held: str, successes: int, **other) -> Path:
    known = {"task": "open_drawer_place", "backend": "mujoco", "placement": "mild"}
    known |= {"split": "test", "checkpoint": f"{held} sha256 0", "checkpoint_folder": str(where)}
    write(folder / "summary.json", known | {"successes": successes, "episodes": 200} | other)
    return folder


def configured(*overrides: str) -> CurveConfig:
    return compose(CurveConfig, "curve", [*overrides])


def test_rollouts_become_a_curve_over_demonstrations(tmp_path: Path, capsys):
    runs = []
    for count, successes in ((400, 150), (50, 20), (100, 90)):
        checkpoint = a_checkpoint(tmp_path / f"run_{count}", 500, count)
        runs.append(a_rollout(tmp_path / f"r{count}", checkpoint, "step-000500", successes))
    given = f"runs=[{','.join(map(str, runs))}]"
    config = configured(given, f"out={tmp_path / 'curve'}")
    curve.check(config)
    rows = curve.main(config)
    assert [row["demonstrations"] for row in rows] == [50, 100, 400]
    assert {row["samples"] for row in rows} == {500 * 64}
    assert rows[0]["wilson_95"] == wilson(20, 200)
    (line,) = curve.panel(curve.points(config), "demonstrations").lines
    assert (list(line.x), list(line.y)) == ([50, 100, 400], [10, 45, 75])
    assert line.low[1] < 45 < line.high[1]
    assert (tmp_path / "curve" / "curve.png").is_file()
    table = (tmp_path / "curve" / "curve.md").read_text()
    assert "| 400 | 500 | 150 / 200 | 75.0 % |" in table
    assert str(tmp_path / "curve") in capsys.readouterr().out


def test_a_run_folder_gives_what_its_selection_measured(tmp_path: Path):
    run = tmp_path / "policy"
    a_checkpoint(run, 900, 420)
    rows = [
        {"step": step, "by_task": {"open_top_drawer": {"successes": n, "episodes": 20}}}
        for step, n in ((300, 5), (600, 12))
    ]
    (run / "selection.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = curve.points(configured(f"runs=[{run}]"))
    assert [(p.samples, p.demonstrations, p.successes) for p in found] == [
        (300 * 64, 420, 5),
        (600 * 64, 420, 12),
    ]
    assert {p.line for p in found} == {"policy, open_top_drawer"}


def test_a_rollout_of_a_run_is_of_the_checkpoint_that_it_names(tmp_path: Path):
    run = tmp_path / "run"
    a_checkpoint(run, 500, 30)
    a_checkpoint(run, 800, 30)
    of_run = a_rollout(tmp_path / "a", run, "step-000500", 100)
    gone = a_rollout(tmp_path / "b", run, "step-000200", 40)
    found = curve.points(configured(f"runs=[{of_run},{gone}]"))
    assert [(p.steps, p.samples) for p in found] == [(200, None), (500, 500 * 64)]


def test_a_copied_checkpoint_says_what_was_typed(tmp_path: Path):
    copy = a_checkpoint(tmp_path / "run", 500, 30).rename(tmp_path / "copy")
    made = {"step": 500, "data": [], "command": "policies/finetune.py model=tiny batch=48 steps=9"}
    write(copy / "config.json", {"provenance": made})
    found = curve.points(configured(f"runs=[{a_rollout(tmp_path / 'a', copy, 'copy', 9)}]"))
    assert (found[0].steps, found[0].samples, found[0].demonstrations) == (500, 500 * 48, 30)


def test_mistakes_are_one_line(tmp_path: Path):
    expert = a_rollout(tmp_path / "expert", tmp_path, "None", 9, checkpoint_folder=None)
    for overrides, said in (
        (["runs=[nowhere]"], "has neither summary.json"),
        ([f"runs=[{expert}]"], "is no rollout of a checkpoint"),
        ([f"runs=[{expert}]", "against=[samplse]"], "did you mean samples"),
        ([f"runs=[{expert}]", "names=[a,b]"], "give one for each"),
    ):
        with pytest.raises(UserError, match=said):
            curve.check(configured(*overrides))
