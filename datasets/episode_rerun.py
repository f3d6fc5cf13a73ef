"""An episode in rerun, the viewer of the extra `rerun`: cameras, actions, gripper and texts."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfflow.datasets.blob import to_jpeg
from selfflow.datasets.curves import COLOURS, OPEN, SENSED, changes
from selfflow.datasets.episode_film import BLOCK, fps_of
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.spec import ACTION_NAMES, GRIPPER, OPENING, POSITION, ROTATION, UserError


def need_rerun() -> Any:
    """The module. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("rerun")
    except ModuleNotFoundError as e:
        raise UserError("viewer=rerun needs rerun: pip install 'selfflow[rerun]'") from e


def has_screen() -> bool:
    """Whether a window can be opened."""
    return sys.platform != "linux" or any(os.environ.get(k) for k in ("DISPLAY", "WAYLAND_DISPLAY"))


def write_rerun(
    source: EpisodeSource, i: int, cameras: Sequence[str], path: Path | None = None
) -> None:
    """Writes episode i into an .rrd file that appears when it is whole; None opens the viewer."""
    rr = need_rerun()
    recording = rr.RecordingStream(f"selfflow {source.name}", recording_id=f"episode {i}")
    part = None if path is None else path.with_name(f".{path.name}.part")
    plan = _blueprint(rr, cameras)
    if part is None:
        recording.spawn(default_blueprint=plan)
    else:
        recording.save(part, default_blueprint=plan)
    _log(rr, recording, source, i, cameras)
    recording.flush()
    recording.disconnect()
    if part is not None and path is not None:
        os.replace(part, path)


def _blueprint(rr: Any, cameras: Sequence[str]) -> Any:
    view = rr.blueprint
    pictures = [view.Spatial2DView(origin=f"camera/{name}", name=name) for name in cameras]
    curves = [
        view.TimeSeriesView(origin=name, name=name) for name in ("position", "rotation", "gripper")
    ]
    texts = view.TextLogView(origin="instruction", name="instruction")
    left = view.Vertical(view.Horizontal(*pictures), texts, row_shares=[4, 1])
    return view.Blueprint(view.Horizontal(left, view.Vertical(*curves)), collapse_panels=True)


def _log(rr: Any, recording: Any, source: EpisodeSource, i: int, cameras: Sequence[str]) -> None:
    signals, rate, steps = source.signals(i), fps_of(source, i), source.length(i)
    for path, colour, _ in _curves(signals.actions, signals.proprio):
        lines = rr.SeriesLines(colors=[colour], names=[path.rpartition("/")[2]])
        recording.log(path, lines, static=True)
    told = {0, *changes(signals.instruction)}
    for first in range(0, steps, BLOCK):
        block = range(first, min(first + BLOCK, steps))
        films = {name: source.frames(i, block, name) for name in cameras}
        for step in block:
            recording.set_time("step", sequence=step)
            recording.set_time("time", duration=step / rate)
            for name, images in films.items():
                picture = rr.EncodedImage(
                    contents=to_jpeg(images[step - first]), media_type="image/jpeg"
                )
                recording.log(f"camera/{name}", picture)
            for path, _, values in _curves(signals.actions, signals.proprio):
                known = signals.proprio_valid if path.endswith("sensed") else signals.action_valid
                if known[step]:
                    recording.log(path, rr.Scalars(float(values[step])))
            if step in told:
                recording.log("instruction", rr.TextLog(signals.instruction[step]))
            if signals.terminate[step]:
                recording.log("instruction", rr.TextLog("terminate", level="WARN"))


def _curves(
    actions: np.ndarray, proprio: np.ndarray
) -> list[tuple[str, tuple[int, int, int], np.ndarray]]:
    """(path, colour, values) of every curve."""
    found = []
    for part, group in ((POSITION, "position"), (ROTATION, "rotation")):
        named = zip(ACTION_NAMES[part], COLOURS, actions[:, part].T, strict=True)
        found += [(f"{group}/{name}", colour, values) for name, colour, values in named]
    found.append(("gripper/target", OPEN, actions[:, GRIPPER]))
    return [*found, ("gripper/sensed", SENSED, proprio[:, OPENING])]
