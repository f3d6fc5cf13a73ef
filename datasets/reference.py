"""Published statistics of whole data sets, to compare with; nothing is ever scaled by them.

Their rotations are roll, pitch, yaw and their conventions the data sets' own, while normalize.py's
are computed from converted episodes. Ranges of small rotation deltas compare all the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "reference_statistics.json"


@dataclass(frozen=True)
class Reference:
    """mean, std, q01, q99, min and max by column: actions xyz (m), rpy (rad), gripper 1 = open;
    proprioception as `proprio_columns` says."""

    name: str
    embodiment: str
    control_hz: float
    proprio_columns: tuple[str, ...]
    episodes: int
    steps: int
    source: str
    action: Mapping[str, list[float]]
    proprio: Mapping[str, list[float]]


def references() -> dict[str, Reference]:
    """All of them, by name of the data set."""
    entries = {k: v for k, v in json.loads(FILE.read_text()).items() if not k.startswith("_")}
    return {
        name: Reference(name, proprio_columns=tuple(entry.pop("proprio_columns")), **entry)
        for name, entry in entries.items()
    }


def reference_of(embodiment: str) -> Reference | None:
    """The one of this robot, by its name."""
    return next((r for r in references().values() if r.embodiment == embodiment), None)
