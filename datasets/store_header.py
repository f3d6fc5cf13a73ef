"""What all episodes of a store have in common: its store.json."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfflow.datasets.spec import EMBODIMENTS, Embodiment, UserError

VERSION = 1
HEADER = "store.json"


@dataclass(frozen=True)
class StoreHeader:
    """What all episodes of a store have in common."""

    embodiment: str
    task: str
    cameras: tuple[str, ...]  # the first is the one that is read by default
    backend: str
    placement: str = "mild"  # how start states were drawn
    image_size: tuple[int, int] | None = None  # (height, width) of all frames; None: not noted
    photographs: tuple[str, ...] = ()  # seen in the pictures: who is scored on them has seen them
    robot: Embodiment | None = None  # the embodiment, where spec.py's of that name is not it

    @property
    def is_of(self) -> Embodiment:
        """The robot of all episodes."""
        return self.robot or EMBODIMENTS[self.embodiment]


def read_header(folder: Path) -> StoreHeader:
    """The store's header. Raises UserError if there is none, or none that this version reads."""
    try:
        values = json.loads((folder / HEADER).read_text())
        version = values.pop("version")
        if values.get("robot"):
            values["robot"] = Embodiment(**_tuples(values["robot"]))
        header = StoreHeader(**_tuples(values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}: not an episode store, store.json cannot be read ({e})") from e
    if version != VERSION:
        raise UserError(f"{folder}: store format {version}, this selfflow reads format {VERSION}")
    return header


def agree_on_header(folder: Path, header: StoreHeader | None) -> StoreHeader:
    """Writes the header into a new store, or checks that an existing one is of the same kind."""
    if header is None or (folder / HEADER).exists():
        found = read_header(folder)
        if header is not None and found != header:
            raise UserError(
                f"{folder} holds {asdict(found)}, not {asdict(header)}; choose another folder"
            )
        return found
    if header.robot is None and header.embodiment not in EMBODIMENTS:
        raise UserError(f"embodiment={header.embodiment}: choose one of {', '.join(EMBODIMENTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{HEADER}.{os.getpid()}"
    partial.write_text(json.dumps({"version": VERSION} | asdict(header), indent=2) + "\n")
    os.replace(partial, folder / HEADER)
    return header


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
