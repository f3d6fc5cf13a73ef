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

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

DRAWERS = ("top", "middle", "bottom")
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
COLOURINGS = (
    "none",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
MATCHED = "visual_matching"  # the variant of the first evaluation
BUILT = (MATCHED,)  # variants that backend=simpler can show


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


@dataclass(frozen=True)
class Trial:
    """One episode, fixed entirely by these five."""

    task: str
    variant: str
    cell: int
    urdf_version: str
    shader: str


def visual_matching() -> list[Variant]:
    """The photograph behind what is simulated; every Google-robot grid in four colourings."""
    found = []
    for task, cells in CELLS.items():
        shader = "rt" if _has_cabinet(task) else "ibl"
        needs = tuple(f"data/real_inpainting/{name}.png" for name in _photos(task))
        for colouring in [""] if task in WIDOWX else COLOURINGS:
            found.append(Variant(task, MATCHED, colouring, cells, shader, needs))
    return found


def variant_aggregation() -> list[Variant]:
    """No photograph, but other rooms, lights, tables, cabinets, distractors; the plain robot."""
    found = []
    for task in (*COKE, "move_near"):
        coke = task in COKE
        models = ("opened_coke_can",) if coke else _NEAR_MODELS
        variants = _TABLE_VARIANTS | (_COKE_ONLY if coke else _NEAR_ONLY)
        for name, (room, extra) in variants.items():
            needs = (_room(room), *map(_model, (*models, *extra)))
            counts = not name.startswith("camera")
            found.append(Variant(task, name, "none", CELLS[task], "ibl", needs, counts))
    for task in (*OPEN, *CLOSE, "open_drawer_place"):
        for name, (room, station) in _CABINET_VARIANTS.items():
            needs = (_room(room), f"data/custom/{station}.urdf")
            needs += (_model("apple"),) if task == "open_drawer_place" else ()
            found.append(Variant(task, name, "none", CELLS[task], "rt", needs))
    return found


SUITES: dict[str, Callable[[], list[Variant]]] = {
    "visual_matching": visual_matching,
    "variant_aggregation": variant_aggregation,
}


def trials(variants: Sequence[Variant]) -> Iterator[Trial]:
    """Every trial of the variants, in order."""
    for v in variants:
        for cell in range(v.cells):
            yield Trial(v.task, v.name, cell, v.urdf_version, v.shader)


def why_not(variant: Variant, tasks: Collection[str], has: Callable[[str], bool]) -> str | None:
    """Why the variant cannot be run with these tasks and files, or None where it can."""
    missing = [need for need in variant.needs if not has(need)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"asset missing: {missing[0]}{more}"
    if variant.task not in tasks:
        return "the backend does not have this task"
    if variant.name not in BUILT:
        return "the backend cannot show this variant yet"
    return None


_ROOM = "google_pick_coke_can_1_v4"
_CUPBOARDS = "Baked_sc1_staging_objaverse_cabinet{}_h870"
_APARTMENT, _STATION = "frl_apartment_stage_simple", "mk_station"
# By variant: room, further models.
_TABLE_VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": (_ROOM, ()),
    "background_1": (f"{_ROOM}_alt_background", ()),
    "background_2": (f"{_ROOM}_alt_background_2", ()),
    "slightly_darker": (_ROOM, ()),
    "slightly_brighter": (_ROOM, ()),
    "table_1": (_CUPBOARDS.format(1), ()),
    "table_2": (_CUPBOARDS.format(2), ()),
    "camera_1": (_ROOM, ()),
    "camera_2": (_ROOM, ()),
}
_COKE_ONLY: dict[str, tuple[str, tuple[str, ...]]] = {
    "distractors_less": (_ROOM, ("opened_pepsi_can", "apple", "sponge", "orange")),
    "distractors_more": (
        _ROOM,
        (
            *("opened_7up_can", "opened_sprite_can", "sponge", "orange", "opened_fanta_can"),
            "bridge_spoon_generated_modified",
        ),
    ),
}
_NEAR_ONLY: dict[str, tuple[str, tuple[str, ...]]] = {"no_distractor": (_ROOM, ())}
_NEAR_MODELS = (
    *("blue_plastic_bottle", "opened_pepsi_can", "orange", "opened_7up_can", "apple", "sponge"),
    *("opened_coke_can", "opened_redbull_can"),
)
# By variant: room, cabinet.
_CABINET_VARIANTS = {
    "base": (_APARTMENT, _STATION),
    "background_1": ("modern_bedroom_no_roof", _STATION),
    "background_2": ("modern_office_no_roof", _STATION),
    "brighter": (_APARTMENT, _STATION),
    "darker": (_APARTMENT, _STATION),
    "cabinet_2": (_APARTMENT, "mk_station2"),
    "cabinet_3": (_APARTMENT, "mk_station3"),
}


def _has_cabinet(task: str) -> bool:
    return task in (*OPEN, *CLOSE, "open_drawer_place")


def _photos(task: str) -> tuple[str, ...]:
    if _has_cabinet(task):
        columns = "0" if task == "open_drawer_place" else "012"
        return tuple(f"open_drawer_{row}{column}" for row in "abc" for column in columns)
    if task in WIDOWX:
        return ("bridge_sink" if "eggplant" in task else "bridge_real_eval_1",)
    name = "google_move_near_real_eval_1" if task == "move_near" else "google_coke_can_real_eval_1"
    return (name,)


def _room(name: str) -> str:
    return f"data/hab2_bench_assets/stages/{name}.glb"


def _model(name: str) -> str:
    return f"data/custom/models/{name}/textured.*"
