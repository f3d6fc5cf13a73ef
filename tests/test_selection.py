"""Selection on closed-loop success: a fake rollout tells how each checkpoint does."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from selfflow.datasets.spec import UserError
from selfflow.policies import finetune
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.policies.flow_policy import load_policy
from selfflow.policies.selection import Selection, words
from selfflow.worldmodel import checkpoint
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.train_config import ModelSize

# A rollout that succeeds as often as the test says, in a file beside it.
ROLLOUT = """
import json, sys
from pathlib import Path
checkpoint, out, plan = (Path(p) for p in sys.argv[1:4])
assert (checkpoint / "model.safetensors").is_file() and not (checkpoint / "train").exists()
successes = json.loads(plan.read_text())[checkpoint.name]
if successes is None:
    sys.exit("the arm is not plugged in")
out.mkdir(parents=True)
summary = {"successes": successes, "episodes": int(sys.argv[4])}
(out / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    (tmp_path / "fake.py").write_text(ROLLOUT)
    return f"{{python}} {tmp_path}/fake.py {{checkpoint}} {{out}} {tmp_path}/plan.json {{episodes}}"


def saved(run: Path, step: int) -> None:
    folder = checkpoint.folder(run, step)
    (folder / "train").mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights of {step}")


def evaluated(selection: Selection) -> dict[str, float]:
    """Steps until the evaluation that is under way has told its result."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if news := selection.step():
            return news
        if selection.error:
            raise selection.error
        time.sleep(0.01)
    raise AssertionError("no result")


def rows(run: Path) -> list[tuple[int, int, bool]]:
    lines = [json.loads(x) for x in (run / "selection.jsonl").read_text().splitlines()]
    return [(row["step"], row["successes"], row["best"]) for row in lines]


def test_the_checkpoint_of_most_successes_is_kept(tmp_path: Path, command: str) -> None:
    run, made = tmp_path / "run", {"minutes": 1e-9, "tasks": ["a", "b"], "episodes": 10}
    plan = {f"step-{n:06d}": k for n, k in ((1, 3), (2, 7), (3, 5), (4, 7))}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    select: Callable[[], Selection] = lambda: Selection(run, command=command, **made)  # noqa: E731
    with select() as selection:
        assert selection.step() == {}  # there is no checkpoint yet
        for n in (1, 2):
            saved(run, n)
            assert evaluated(selection) == {"select_success": plan[f"step-{n:06d}"] / 10}
        assert selection.step() == {}  # each has one turn
        assert not selection._begin()
    best = run / "best" / "model.safetensors"
    with select() as selection:  # a later sitting knows the best so far
        saved(run, 3)
        checkpoint.prune(run, 1)
        evaluated(selection)
        assert best.read_text() == "weights of 2"
        assert not (run / "selection" / "step-000003" / "model.safetensors").exists()
        saved(run, 4)
        evaluated(selection)
        assert best.read_text() == "weights of 4"  # of equals the later
        selection.finish(complete=True)
    assert rows(run) == [(1, 6, True), (2, 14, True), (3, 10, False), (4, 14, True)]
    assert (run / "best" / "rollouts" / "a" / "summary.json").is_file()


def test_a_failing_rollout_is_told(tmp_path: Path, command: str) -> None:
    (tmp_path / "plan.json").write_text('{"step-000001": null}')
    run = tmp_path / "run"
    saved(run, 1)
    with Selection(run, 1e-9, command, ["a"], 10) as selection:
        with pytest.raises(RunError, match="status 1: the arm is not plugged in"):
            evaluated(selection)
        with pytest.raises(RunError, match="step-000001 on a failed"):
            selection.finish(complete=False)
    (tmp_path / "plan.json").write_text('{"step-000001": 2}')
    with Selection(run, 1e-9, command, ["a"], 10) as selection:
        evaluated(selection)  # what was left over comes first
    assert rows(run) == [(1, 2, True)]
    with Selection(run, 1e-9, "/no/such/program", ["a"], 10) as selection:
        selection.step()
        with pytest.raises(RunError, match="cannot be run"):
            selection.finish(complete=True)


def test_an_evaluation_ends_with_its_run_and_is_taken_up_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, 1)
    waits = words("{python} -c 'import time; time.sleep(60)'", {})
    with Selection(run, 1e-9, " ".join(waits[:2]) + f" '{waits[2]}'", ["a"], 1) as selection:
        selection.step()
        process = selection._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
    assert (run / "selection" / "step-000001" / "model.safetensors").is_file()


def test_a_kill_amid_the_change_of_the_best_loses_nothing(tmp_path: Path, command: str) -> None:
    (tmp_path / "plan.json").write_text('{"step-000001": 2, "step-000002": 1}')
    run = tmp_path / "run"
    saved(run, 1)
    with Selection(run, 1e-9, command, ["a"], 10) as selection:
        evaluated(selection)
    (run / "best").rename(run / ".old-best")  # between the two renames
    saved(run, 2)
    with Selection(run, 1e-9, command, ["a"], 10) as selection:
        evaluated(selection)
    assert (run / "best" / "model.safetensors").read_text() == "weights of 1"


def test_other_tasks_are_another_measure(tmp_path: Path, command: str) -> None:
    (tmp_path / "plan.json").write_text('{"step-000001": 9, "step-000002": 1}')
    run = tmp_path / "run"
    for n, tasks in ((1, ["a"]), (2, ["a", "b"])):
        saved(run, n)
        with Selection(run, 1e-9, command, tasks, 10) as selection:
            evaluated(selection)
    assert rows(run) == [(1, 9, True), (2, 2, True)]


def test_training_goes_on_while_its_checkpoints_are_rolled_out(
    store: Path, tmp_path: Path, command: str
) -> None:
    plan = {f"step-{n:06d}": 9 - n for n in range(10)}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    config = FinetuneConfig(
        data=str(store),
        out=str(tmp_path / "policy"),
        steps=4,
        batch=3,
        threads=1,
        save_every=1,
        keep=1,
        model=ModelSize(hidden=32, depth=2, heads=2, mlp_ratio=2.0),
        layout=Layout(32, 32, 16, future=0, chunk=4),
        select_minutes=1e-9,
        select_tasks=["a"],
        select_command=command,
    )
    finetune.main(config)
    first = rows(Path(config.out))[0][0]
    assert rows(Path(config.out))[-1][0] == 4  # the last one is always evaluated
    chosen = checkpoint.load(Path(config.out) / "best", "policy")
    assert chosen.config["provenance"]["step"] == first
    load_policy(Path(config.out) / "best")
    (tmp_path / "plan.json").write_text(json.dumps(dict.fromkeys(plan)))
    failing = replace(config, out=config.out + "2")
    with pytest.raises(UserError, match="not plugged in"):
        finetune.main(failing)
    assert checkpoint.last(Path(failing.out)) is not None
