"""Chooses a run's checkpoint by what it does in closed loop, while the run goes on training.

    out/selection.jsonl          a line an evaluation
    out/selection/step-000500/   a copy of the checkpoint under evaluation, and rollouts/TASK/
    out/best/                    that of the most successes, with selection.json and its rollouts

Policies know no simulator: an evaluation is a command that gets a checkpoint's folder and leaves a
summary.json with `successes` and `episodes`, such as eval/simpler_rollout.py.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from selfflow.worldmodel.checkpoint import last, read_json, step_of, write_json, write_text
from selfflow.worldmodel.errors import RunError

STOP_SECONDS = 20.0  # between asking an evaluation to end and ending it
ROWS, ROW, BEST = "selection.jsonl", "selection.json", "best"


def words(command: str, values: Mapping[str, Any]) -> list[str]:
    """The command's words with {checkpoint}, {task}, {episodes}, {out} and {python} filled in.

    Raises ValueError where it names something else.
    """
    try:
        return [
            word.format(**(dict(values) | {"python": sys.executable}))
            for word in shlex.split(command)
        ]
    except (KeyError, IndexError, ValueError) as e:
        raise ValueError(
            f"select_command: {e} in {command!r}; it may name {{python}}, {{checkpoint}}, "
            "{task}, {episodes} and {out}"
        ) from e


class Selection:
    """One evaluation at a time, task after task. `error` is what went wrong, and ends the run."""

    def __init__(
        self, run: Path, minutes: float, command: str, tasks: Sequence[str], episodes: int
    ) -> None:
        self.run, self.minutes = run, minutes
        self.measure = {"command": command, "tasks": list(tasks), "episodes": episodes}
        self.error: RunError | None = None
        self._process: subprocess.Popen | None = None
        self._folder, self._left, self._counts = run, [], {}
        self._begun = time.monotonic()  # of this evaluation, or of the sitting
        self._step = max((row["step"] for row in self._rows()), default=-1)  # the last evaluated
        if minutes:
            _recover(run / BEST)

    def __enter__(self) -> "Selection":
        return self

    def __exit__(self, *error: object) -> None:
        """An evaluation that is under way ends; the next sitting takes it up."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)  # its worker processes too
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)

    def step(self) -> dict[str, float]:
        """Between two steps of training: begins what is due, takes what is done. Returns what is
        new, for the log."""
        if not self.minutes or self.error:
            return {}
        if self._process is None:
            if time.monotonic() - self._begun >= 60 * self.minutes:
                self._begin()
            return {}
        code = self._process.poll()
        if code is None:
            return {}
        try:
            return self._take(code)
        except RunError as e:
            self.error = e
            return {}

    def finish(self, complete: bool) -> None:
        """After the last step of a sitting; where that ends the run, the last checkpoint is
        evaluated too. Raises `error`."""
        if not self.minutes:
            return
        if complete:
            self._finish_all()
        elif self._process is not None:
            print(f"selection: the next sitting goes on with {self._folder.name}")
        if self.error:
            raise self.error
        if (self.run / BEST).is_dir():
            row = read_json(self.run / BEST / ROW)
            print(f"best: {self.run / BEST}, {_told(row)}; all: {self.run / ROWS}")

    def _finish_all(self) -> None:
        """Waits for what is under way, then evaluates the last checkpoint."""
        with Console().status("selection: rolling out") as status:
            while not self.error and (self._process is not None or self._begin()):
                if self._process is not None:
                    status.update(f"selection: {self._folder.name} on {self._left[0]}")
                    self._process.wait()
                    self.step()

    def _begin(self) -> bool:
        """Starts with what was left over, else with the newest checkpoint, once."""
        begun = [p.parent for p in (self.run / "selection").glob("step-*/model.safetensors")]
        left = [p for p in begun if read_json(p / ROW)["measure"] == self.measure]
        newest = last(self.run)
        if left:
            self._folder = left[0]
        elif newest is not None and step_of(newest) > self._step:
            self._folder = _copy(newest, self.run / "selection" / newest.name, self.measure)
        else:
            return False
        self._begun, self._step = time.monotonic(), step_of(self._folder)
        self._left, self._counts = list(self.measure["tasks"]), {}
        self._roll_out()
        return True

    def _roll_out(self) -> None:
        """Starts the command for the first task that is left."""
        out = self._folder / "rollouts" / self._left[0]
        out.parent.mkdir(exist_ok=True)
        values = {"checkpoint": self._folder, "task": self._left[0], "out": out}
        line = words(self.measure["command"], values | {"episodes": self.measure["episodes"]})
        with open(f"{out}.log", "ab") as log:
            try:
                self._process = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the training, which ends this one
                )
            except OSError as e:
                self.error = RunError(f"select_command: {line[0]} cannot be run ({e.strerror})")

    def _take(self, code: int) -> dict[str, float]:
        """A task's outcome; after the last one the evaluation's. Raises RunError if it failed."""
        task = self._left.pop(0)
        out, self._process = self._folder / "rollouts" / task, None
        log = Path(f"{out}.log")
        if code:
            said = [s for s in log.read_text(errors="replace").splitlines() if s.strip()]
            raise RunError(
                f"selection: the rollout of {self._folder.name} on {task} failed with status "
                f"{code}: {said[-1] if said else 'it said nothing'}; see {log}"
            )
        summary = read_json(out / "summary.json")
        counts = {key: summary.get(key) for key in ("successes", "episodes")}
        if not all(isinstance(n, int) for n in counts.values()) or not counts["episodes"]:
            raise RunError(f"selection: {out / 'summary.json'} counts no successes of episodes")
        self._counts[task] = counts
        if self._left:
            self._roll_out()
            return {}
        return self._conclude()

    def _conclude(self) -> dict[str, float]:
        """Writes the line, and keeps the checkpoint as the best or drops it."""
        total = {k: sum(c[k] for c in self._counts.values()) for k in ("successes", "episodes")}
        rate = total["successes"] / total["episodes"]
        held = self.run / BEST / ROW
        before = read_json(held) if held.is_file() else {}
        comparable = before.get("measure") == self.measure
        best = not comparable or rate >= before["success_rate"]  # of equals the later
        row = {"step": self._step, **total, "success_rate": rate, "best": best}
        row |= {"by_task": self._counts, "minutes": (time.monotonic() - self._begun) / 60}
        row |= {"measure": self.measure}
        self._note(row)
        if best:
            write_json(self._folder / ROW, row)
            _replace(self._folder, self.run / BEST)
        else:
            _drop_weights(self._folder)
        print(f"selection: {_told(row)}{', the best so far' if best else ''}", flush=True)
        return {"select_success": rate}

    def _note(self, row: dict[str, Any]) -> None:
        """Adds the line, unless a kill came between it and what follows it."""
        if self._step not in [other["step"] for other in self._rows()]:
            lines = [*_lines(self.run / ROWS), json.dumps(row)]
            write_text(self.run / ROWS, "".join(line + "\n" for line in lines))

    def _rows(self) -> list[dict[str, Any]]:
        """The lines of selection.jsonl that measure the same."""
        rows = [json.loads(line) for line in _lines(self.run / ROWS)]
        return [row for row in rows if row["measure"] == self.measure]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _told(row: dict[str, Any]) -> str:
    return f"step {row['step']}: {row['successes']} of {row['episodes']} episodes succeed"


def _copy(checkpoint: Path, to: Path, measure: dict[str, Any]) -> Path:
    """What is needed to use the checkpoint, whole or not at all: the run may delete its own."""
    draft = to.with_name(f".draft-{to.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.is_file():
            shutil.copyfile(file, draft / file.name)
    write_json(draft / ROW, {"measure": measure})
    shutil.rmtree(to, ignore_errors=True)  # of another measure
    draft.rename(to)
    return to


def _replace(folder: Path, best: Path) -> None:
    """Makes the folder the best one; a kill in between is mended by `_recover`."""
    old = best.with_name(".old-best")
    if best.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        best.rename(old)
    folder.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def _recover(best: Path) -> None:
    old = best.with_name(".old-best")
    if old.is_dir() and not best.is_dir():
        old.rename(best)


def _drop_weights(folder: Path) -> None:
    """Leaves the rollouts."""
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
