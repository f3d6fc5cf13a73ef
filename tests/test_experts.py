"""The table of the experts: its rows are rollouts, it continues, and mistakes are one line."""

from dataclasses import replace

import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval import experts, parts, results, simpler_rollout
from selfflow.eval.experts import ExpertsConfig, check, main
from selfflow.eval.parts import RolloutConfig

TASK = "close_top_drawer"


def config(*given: str, task: str = TASK) -> ExpertsConfig:
    return compose(ExpertsConfig, "experts", [f"task={task}", "episodes=2", *given])


@pytest.mark.slow
def test_a_row_is_its_command_s_and_a_second_run_adds_what_is_missing(tmp_path, monkeypatch):
    out = tmp_path / "experts"
    first = replace(config("placements=[grid]", f"out={out}"), episodes=1)
    check(first)
    main(first)
    asked, real = [], simpler_rollout.run_seeds
    monkeypatch.setattr(
        simpler_rollout, "run_seeds", lambda *given: (asked.append(given[1]), real(*given))
    )
    again = config("placements=[grid]", f"out={out}")
    check(again)
    (row,) = main(again)["rows"]
    assert asked == [[200_001]]
    assert (row["successes"], row["episodes"], row["starts"]) == (2, 2, 2)
    assert 0 < row["median_first_success"] < row["median_steps"] == 113
    arguments = row["command"].removeprefix(f"{experts.ROLLOUT} ").split()
    (rollout,) = again.rollouts()
    assert compose(RolloutConfig, "rollout", arguments) == rollout
    assert rollout.policy == "expert"
    lines = (out / "table.md").read_text().splitlines()
    assert lines[4].startswith(f"| {TASK} | 2/2 (34.2 to 100.0 %) | ")


def test_all_is_every_task_of_the_simulator_on_both_placements():
    everything = config(task="all")
    pairs = [(one.task, one.placement) for one in everything.rollouts()]
    assert pairs == [(t, p) for t in parts.tasks_of("mujoco") for p in ("mild", "grid")]
    assert everything.rollouts()[-1].out == f"{everything.out}/move_near_grid"
    assert {"pick_coke_can", "pick_standing_coke_can", "move_near"} < set(everything.tasks)


def test_a_grid_s_repeated_cells_are_counted_once():
    (mild, grid) = replace(config(), episodes=200).rollouts()
    assert (experts.starts(mild), experts.starts(grid)) == (200, 9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["backend=nope"], "backend=nope"),
        (["task=nope"], "task=nope"),
        (["task=widowx_stack_cube"], "not built yet with backend=mujoco"),
        (["placements=[]"], "give at least one"),
        (["placements=[mild,mild]"], "give each once"),
        (["placements=[mild,far]"], "placement=far"),
        (["randomise=wild"], "randomise=wild: choose one of"),
        (["randomise=mild", "backend=fake"], "only with backend=mujoco"),
        (["episodes=0"], "must be 1 or more"),
        (["seed=7"], "split=train"),
        ([f"out={__file__}"], "is a file"),
    ],
)
def test_mistakes_are_one_line(given: list[str], says: str):
    with pytest.raises(UserError, match=says):
        check(config(*given))


def test_other_conditions_do_not_continue_a_table(tmp_path):
    out = tmp_path / "experts"
    main(replace(config("backend=fake", "placements=[mild]", f"out={out}"), episodes=1))
    with pytest.raises(UserError, match="holds a run with backend=fake"):
        check(config(f"out={out}"))


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results.os, "access", lambda path, mode: path != tmp_path)  # root may all
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to; choose another"):
        results.check_writable(tmp_path / "new" / "table")
