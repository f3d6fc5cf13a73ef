"""SIMPLER's two evaluations as lists of trials, with the paper's counts. Pure: nothing is run.

| trials | visual matching, in each of four colourings | variant aggregation |
|---|---|---|
| coke can | 3 orientations x 25 = 75 | 9 variants x 75, two cameras besides |
| move near | 60 | 8 variants x 60, two cameras besides |
| drawers | 27 open + 27 close | 7 variants x 54 |
| place apple | 27 | 7 variants x 27 = 189 |
| WidowX, each of four tasks (no colourings) | 24 | none |

Numbers: docs of SIMPLER (arXiv 2405.05941) and its published evaluation scripts.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from selfflow.datasets.spec import task_named
from selfflow.envs.cabinet_placements import DRAWER_POSES, DRAWERS
from selfflow.envs.simpler_assets import URDF_VERSIONS
from selfflow.envs.simpler_variants import MATCHED, UNPUBLISHED, looks, needs
from selfflow.envs.task_open_drawer_place import PLACE_POSES
from selfflow.envs.tasks import DRAWER_TASKS, photographs

COKE = tuple(
    f"pick_{orientation}_coke_can" for orientation in ("horizontal", "vertical", "standing")
)
OPEN, CLOSE = (tuple(f"{verb}_{d}_drawer" for d in DRAWERS) for verb in ("open", "close"))
WIDOWX = tuple(
    f"widowx_{name}"
    for name in ("spoon_on_towel", "carrot_on_plate", "stack_cube", "eggplant_in_basket")
)
# What success rates are reported of together.
FAMILIES = {
    "coke can": COKE,
    "move near": ("move_near",),
    "open drawer": OPEN,
    "close drawer": CLOSE,
    "place apple": ("open_drawer_place",),
    **{name.replace("_", " ").replace("widowx", "WidowX"): (name,) for name in WIDOWX},
}
CELLS = {
    **dict.fromkeys(COKE, 25),
    "move_near": 60,
    **dict.fromkeys((*OPEN, *CLOSE), 9),
    "open_drawer_place": 27,
    **dict.fromkeys(WIDOWX, 24),
}


@dataclass(frozen=True)
class Variant:
    """Trials of a task that differ in their start alone: cells 0 .. cells - 1 of its grid.

    `shader` is the one of the published numbers: rt (ray tracing) or ibl (SAPIEN's default).
    `needs` are the files below the asset root that it cannot do without (* stands for anything).
    `counts` is False for the cameras, which the paper analyses but leaves out of its averages.
    """

    task: str
    name: str
    urdf_version: str
    cells: int
    shader: str
    needs: tuple[str, ...] = ()
    counts: bool = True

    @property
    def folder(self) -> str:
        """A name for its files."""
        return f"{self.task}-{self.name}-{self.urdf_version or 'plain'}"


def visual_matching() -> list[Variant]:
    """The photograph behind what is simulated; every Google-robot grid in four colourings."""
    found = []
    for task, cells in CELLS.items():
        shader = "rt" if task in DRAWER_TASKS else "ibl"
        files = tuple(f"data/real_inpainting/{name}.png" for name in photos(task))
        for colouring in [""] if task in WIDOWX else URDF_VERSIONS:
            found.append(Variant(task, MATCHED, colouring, cells, shader, files))
    return found


def variant_aggregation() -> list[Variant]:
    """No photograph, but other rooms, lights, tables, cabinets, distractors; the plain robot."""
    found = []
    for task in (*COKE, "move_near", *OPEN, *CLOSE, "open_drawer_place"):
        shader = "rt" if task in DRAWER_TASKS else "ibl"
        for name in looks(task):
            if name == MATCHED or name in UNPUBLISHED:
                continue
            files, counts = needs(task, name), not name.startswith("camera")
            found.append(Variant(task, name, "none", CELLS[task], shader, files, counts))
    return found


SUITES: dict[str, Callable[[], list[Variant]]] = {
    "visual_matching": visual_matching,
    "variant_aggregation": variant_aggregation,
}


def why_not(variant: Variant, tasks: Collection[str], has: Callable[[str], bool]) -> str | None:
    """Why the variant cannot be run with these tasks and files, or None where it can."""
    missing = [need for need in variant.needs if not has(need)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"asset missing: {missing[0]}{more}"
    if variant.task not in tasks:
        return "the backend does not have this task"
    return None


def photos(task: str) -> tuple[str, ...]:
    """Names of the photographs that visual matching shows behind the task."""
    if task in DRAWER_TASKS:
        poses = PLACE_POSES if task == "open_drawer_place" else DRAWER_POSES
        return tuple(f"open_drawer_{pose}" for pose in poses)
    return photographs(task_named(task))
