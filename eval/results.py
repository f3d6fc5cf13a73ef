"""A rollout's folder: config.json, episodes.jsonl (appended as episodes finish), summary.json.

A run with the same `out` continues: what is finished is read back and not run again.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from selfflow.datasets.spec import UserError
from selfflow.eval.rollout import Episode

CONFIG, EPISODES, SUMMARY = "config.json", "episodes.jsonl", "summary.json"
Made = TypeVar("Made")


def open_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Creates the folder, or makes ready to continue: drops a line that a kill has torn."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, identity)
    write_episodes(folder, read_episodes(folder))


def check_writable(folder: Path) -> None:
    """Raises UserError unless the folder can be written to, or be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        of = "" if there == folder else f"{there} "
        raise UserError(f"out={folder}: {of}is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"out={folder}: {there} cannot be written to; choose another folder")


def check_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Raises UserError unless the folder is new, empty, or holds a run of the same config."""
    check_writable(folder)
    # A kill may have left unfinished files, whose names begin with a dot, and no config.json yet.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise UserError(f"out={folder}: holds something else than a rollout; choose another folder")
    held = _read_config(folder)
    # also what the run had and this has not: keys at their usual values are not in an identity
    keys = dict.fromkeys([*identity, *held])
    other = [f"{k}={held.get(k)}" for k in keys if held.get(k) != identity.get(k)]
    if other:
        raise UserError(f"out={folder}: holds a run with {', '.join(other)}; choose another folder")
    read_episodes(folder)


def append_episode(folder: Path, episode: Episode) -> None:
    """One more line of episodes.jsonl."""
    with open(folder / EPISODES, "a", encoding="utf-8") as f:
        f.write(_line(episode))


def write_episodes(folder: Path, episodes: Iterable[Episode]) -> None:
    """All of episodes.jsonl, in the order of seeds."""
    lines = [_line(e) for e in sorted(episodes, key=lambda e: e.seed)]
    write_text(folder / EPISODES, "".join(lines))


def read_episodes(folder: Path) -> list[Episode]:
    """The finished episodes; a torn last line is none. Raises UserError for a damaged one."""
    return read_lines(folder / EPISODES, _episode, "episode")


def read_lines(path: Path, made: Callable[[dict[str, Any]], Made], name: str) -> list[Made]:
    """What `made` makes of each line of JSON, none where there is no file; a torn last line is
    none. Raises UserError for a damaged one, which stands for a `name`."""
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(made(json.loads(line)))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path}: line {number} is damaged; delete it and its {name} is run again"
            ) from e
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        held = json.loads((folder / CONFIG).read_bytes())
    except ValueError:  # also what undecodable bytes raise
        held = None
    if not isinstance(held, dict):
        raise UserError(f"out={folder}: its {CONFIG} is damaged; choose another folder")
    return held


def _line(episode: Episode) -> str:
    content = dataclasses.asdict(episode)
    content["latencies"] = [round(s, 6) for s in episode.latencies]
    return json.dumps(content) + "\n"


def _episode(content: dict[str, Any]) -> Episode:
    content["latencies"] = tuple(content["latencies"])
    content["subtask_steps"] = tuple(content["subtask_steps"])
    if nearest := content.get("nearest"):
        content["nearest"] = tuple(nearest)
    return Episode(**content)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
