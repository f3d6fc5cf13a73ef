"""Where a run's numbers go: console, log.jsonl, TensorBoard files, wandb.

Each is an object with `track(values, step)` and `close()`. Only rank 0 has any.
"""

import importlib.util
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.worldmodel.errors import RunError

TELL_SECONDS = 30.0  # between plain lines where there is no terminal for a progress bar
NAMES = ("tensorboard", "wandb")
Values = dict[str, Any]

# Dense bf16 FLOP/s of one device, from its data sheet; the first name that is part of torch's.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@runtime_checkable
class Tracker(Protocol):
    """A place for numbers."""

    def track(self, values: Values, step: int) -> None:
        """One step's values: numbers, and now and then a text."""
        ...

    def close(self) -> None:
        """After the last step; what was tracked is on disk."""
        ...


def check(names: list[str]) -> None:
    """Raises RunError if the package for one is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RunError(f"log={name}: not installed; pip install 'selfflow[log]'")


def open_trackers(names: list[str], out: Path, config: Values, step: int) -> list[Tracker]:
    """log.jsonl, and those named. Of a run resumed at `step`, points after it are dropped."""
    makers = {
        "tensorboard": lambda: TensorBoard(out, step),
        "wandb": lambda: Wandb(out, config),
    }
    return [JsonLines(out / "log.jsonl", step), *(makers[name]() for name in names)]


def peak_flops(device: str) -> float | None:
    """Of a device by the name that torch gives it; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


class JsonLines:
    """A line of JSON a step, each step once."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            self._cut(step)
        self._file = path.open("a")

    def track(self, values: Values, step: int) -> None:
        """Appends the line."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _cut(self, step: int) -> None:
        """Drops lines after the step, so that every step is logged once."""
        kept = []
        for line in self.path.read_text().splitlines():
            if not line.endswith("}") or json.loads(line)["step"] > step:
                break
            kept.append(line + "\n")
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(kept))
        os.replace(draft, self.path)


class Console:
    """A progress bar, or a plain line now and then where there is no terminal."""

    def __init__(self, title: str, steps: int, step: int) -> None:
        self.title, self.steps = title, steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeRemainingColumn())
        self._task = self._bar.add_task(title, total=steps, completed=step)
        self._told, self._rate = time.monotonic(), 0.0
        self._bar.start()

    def track(self, values: Values, step: int) -> None:
        """Moves the bar."""
        rate = values["samples_per_s"]
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        shown = " ".join(f"{k} {values[k]:.3f}" for k in ("loss", "cosine") if k in values)
        shown = f"{shown} {self._rate:.0f} samples/s"
        self._bar.update(self._task, completed=step, description=f"{self.title} {shown}")
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._told >= TELL_SECONDS:
            print(f"{self.title} step {step} of {self.steps}, {shown}", flush=True)
            self._told = now
        if "warning" in values:
            print(f"warning: {values['warning']}", flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()


class TensorBoard:
    """Event files in out/tensorboard; a resumed run's take the place of what came after its
    checkpoint."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def track(self, values: Values, step: int) -> None:
        """A point in every curve."""
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Wandb:
    """A wandb run below out/wandb: offline unless WANDB_API_KEY is set or WANDB_MODE says so.

    A resumed run keeps its id, which wandb.json holds.
    """

    def __init__(self, out: Path, config: Values) -> None:
        import wandb

        kept = out / "wandb.json"
        if not kept.exists():
            kept.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n")
        online = "WANDB_API_KEY" in os.environ
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "selfflow"),
            name=out.name,
            id=json.loads(kept.read_text())["id"],
            dir=out,
            config=config,
            mode=mode,
            resume="allow",
        )

    def track(self, values: Values, step: int) -> None:
        """A point in every curve; wandb itself drops a step that it has."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run, uploading what is left if it is online."""
        self._run.finish()
