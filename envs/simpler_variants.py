"""What SIMPLER's variants of the Google robot's scenes look like: room, light, cabinet, camera,
distractors. Data alone; the scenes build it (envs/simpler_scene.py, envs/simpler_table.py).

World frame, metres. Numbers: SIMPLER (docs/simpler.md says which of our conventions are inferred).
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from selfflow.datasets.rotations import compose
from selfflow.datasets.spec import UserError
from selfflow.envs.bridge_tasks import BRIDGE_RULES
from selfflow.envs.simpler_assets import default_root, genuine
from selfflow.envs.table_objects import COKE, Placed
from selfflow.envs.task_move_near import TRIPLETS
from selfflow.envs.tasks import TABLE_TASKS

MATCHED = "visual_matching"  # the variant with the photograph, which scenes have by default
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Light:
    """Grey levels of the light from everywhere, and by direction; the first may cast shadows."""

    ambient: float
    beams: tuple[tuple[Vector, float], ...]
    shadow: bool = False


@dataclass(frozen=True)
class Look:
    """One variant of a scene.

    `matched`: a photograph covers the room, objects have baked colours, robot and cabinet those
    that match it. `head` is added to the head's pan and tilt (rad). `third`: in move near a third
    object lies there.
    """

    room: str | None
    light: Light
    cabinet: str = "mk_station"
    distractors: tuple[str, ...] = ()
    head: tuple[float, float] = (0.0, 0.0)
    third: bool = True
    matched: bool = False

    def model(self, name: str) -> str:
        """The model in the place of the baked one."""
        return name if self.matched else name.removeprefix("baked_").removesuffix("_v2")


# --- lights ---------------------------------------------------------------------------------------

DOWN: Vector = (0.0, 0.0, -1.0)
STEEP = (-float(np.cos(np.deg2rad(75))), 0.0, -float(np.sin(np.deg2rad(75))))
# At the table without shadows: the original's pictures show none.
TABLE_LIGHT = Light(0.3, ((DOWN, 2.2), ((-1.0, -0.5, -1.0), 0.7), ((1.0, 1.0, -1.0), 0.7)))
DARKER = Light(0.3, (((1.0, 1.0, -1.0), 0.8), (DOWN, 0.8)))
BRIGHTER = Light(0.3, ((DOWN, 3.6), ((-1.0, -0.5, -1.0), 1.3), ((1.0, 1.0, -1.0), 1.3)))
CABINET_LIGHT = Light(1.0, ((STEEP, 1.0),))


def legacy_light(main: float = 1.0, direction: Vector = (-0.2, 0.0, -1.0)) -> Light:
    """The cabinet's light of variant aggregation, the main one of this grey level."""
    sides = (((-1.0, 1.0, -0.05), 0.5), ((-1.0, -1.0, -0.05), 0.5))
    return Light(0.3, ((direction, main), *sides), shadow=True)


# --- rooms ----------------------------------------------------------------------------------------

HALF = float(np.sqrt(0.5))
Y_UP = (HALF, HALF, 0.0, 0.0)  # the meshes have y up
PLACE: Vector = (1.6616, 3.0337, 0.0)  # of every room
# By beginning of a room's name: a further shift, and a turn about z, after Y_UP and before PLACE.
SHIFTED: dict[str, tuple[Vector, tuple[float, ...]]] = {
    "modern_bedroom": ((0.178, -2.235, 1.669), (0.007, 0.0, 0.0, -1.0)),
    "modern_office": ((-0.192, -1.728, 1.48), (0.709, 0.0, 0.0, -0.705)),
}


def room_pose(room: str) -> tuple[Vector, tuple[float, ...]]:
    """Position and quaternion of a room's mesh."""
    for name, (shift, turn) in SHIFTED.items():
        if room.startswith(name):
            x, y, z = np.add(PLACE, shift).tolist()
            unit = np.divide(turn, np.linalg.norm(turn))  # SIMPLER's are rounded
            return (x, y, z), tuple(compose(unit, np.array(Y_UP)).tolist())
    return PLACE, Y_UP


# --- variants -------------------------------------------------------------------------------------

TABLE_ROOM, APARTMENT = "google_pick_coke_can_1_v4", "frl_apartment_stage_simple"
_TABLE, _CABINET = Look(TABLE_ROOM, TABLE_LIGHT), Look(APARTMENT, legacy_light())
_CUPBOARD = "Baked_sc1_staging_objaverse_cabinet{}_h870"
AT_TABLE = {
    "base": _TABLE,
    "background_1": replace(_TABLE, room=f"{TABLE_ROOM}_alt_background"),
    "background_2": replace(_TABLE, room=f"{TABLE_ROOM}_alt_background_2"),
    "slightly_darker": replace(_TABLE, light=DARKER),
    "slightly_brighter": replace(_TABLE, light=BRIGHTER),
    "table_1": replace(_TABLE, room=_CUPBOARD.format(1)),
    "table_2": replace(_TABLE, room=_CUPBOARD.format(2)),
    "camera_1": replace(_TABLE, head=(0.0, 0.15)),
    "camera_2": replace(_TABLE, head=(0.0, -0.12)),
}
LESS = ("opened_pepsi_can", "apple", "sponge", "orange")
MORE = (
    *("opened_7up_can", "opened_sprite_can", "sponge", "orange", "opened_fanta_can"),
    "bridge_spoon_generated_modified",
)
COKE_LOOKS = AT_TABLE | {
    "distractors_less": replace(_TABLE, distractors=LESS),
    "distractors_more": replace(_TABLE, distractors=MORE),
}
NEAR_LOOKS = AT_TABLE | {"no_distractor": replace(_TABLE, third=False)}
CABINET_LOOKS = {
    "base": _CABINET,
    "background_1": replace(_CABINET, room="modern_bedroom_no_roof"),
    "background_2": replace(_CABINET, room="modern_office_no_roof"),
    "brighter": replace(_CABINET, light=legacy_light(2.0)),
    "darker": replace(_CABINET, light=legacy_light(0.5)),
    "cabinet_2": replace(_CABINET, cabinet="mk_station2"),
    "cabinet_3": replace(_CABINET, cabinet="mk_station3"),
}
# The original can do these too; its published evaluation does not.
UNPUBLISHED = {
    "vertical_light": replace(_CABINET, light=legacy_light(direction=(-0.1, 0.0, -1.0))),
    "camera_variant": replace(_CABINET, head=(-0.025, 0.008)),
}
# What a cabinet's description refers to; the others are of boxes alone.
CABINET_MESHES = {"mk_station3": ("data/custom/models/stone_tabletop.glb",)}
MATCHED_TABLE = replace(_TABLE, matched=True)
MATCHED_CABINET = Look(None, CABINET_LIGHT, "mk_station_recolor", matched=True)


def looks(task: str) -> Mapping[str, Look]:
    """Every variant of a task's scene; none of the WidowX's, whose scenes are their own."""
    if task in BRIDGE_RULES:
        return {}
    if task not in TABLE_TASKS:
        return {MATCHED: MATCHED_CABINET} | CABINET_LOOKS | UNPUBLISHED
    return {MATCHED: MATCHED_TABLE} | (NEAR_LOOKS if task == "move_near" else COKE_LOOKS)


def needs(task: str, variant: str) -> tuple[str, ...]:
    """Files below the asset root (* stands for anything) that show this variant, where the room is
    seen; none for visual matching, which a photograph covers."""
    if variant == MATCHED:
        return ()
    look = looks(task)[variant]
    files = [f"data/hab2_bench_assets/stages/{look.room}.glb"]
    if task == "move_near":
        names = sorted({look.model(name) for triplet in TRIPLETS for name in triplet})
    elif task in TABLE_TASKS:
        names = [COKE, *look.distractors]
    else:
        files += [f"data/custom/{look.cabinet}.urdf", *CABINET_MESHES.get(look.cabinet, ())]
        names = ["apple"] if task == "open_drawer_place" else []
    kinds = ("textured.*", "collision.obj")
    return *files, *(f"data/custom/models/{name}/{kind}" for name in names for kind in kinds)


def check_variant(task: str, variant: str) -> None:
    """Raises UserError for a variant that the task's scene does not have, naming the choices, and
    for one whose files are missing. A stand-in counts as missing: the look is the point."""
    choices = list(looks(task)) or [MATCHED]
    if variant not in choices:
        raise UserError(f"variant={variant} of {task}: choose one of {', '.join(choices)}")
    missing = [need for need in needs(task, variant) if not genuine(need)]
    if missing:
        raise UserError(
            f"variant={variant} of {task}: {missing[0]} is missing (a stand-in does not count) in "
            f"{default_root()}; set SIMPLER_ASSETS to a folder that holds it"
        )


# --- objects that are not baked -------------------------------------------------------------------

# kg/m³, of SIMPLER's object table; ours holds the models of visual matching alone.
_DENSITY = {"apple": 800.0, "orange": 800.0, "sponge": 150.0, "blue_plastic_bottle": 50.0}
_DENSITY |= {"bridge_spoon_generated_modified": 1200.0}
_EMPTY_CAN = 50.0


def plain_density(model: str) -> float:
    """Of a model that is not baked, kg/m³."""
    return _EMPTY_CAN if model.startswith("opened_") else _DENSITY[model]


# Distractors of the coke can: at most so far from it, then cut to the table; nearer is drawn again.
REACH, CLEAR = 0.3, 0.25
LOW, HIGH = (-0.50, 0.05), (-0.10, 0.35)  # x, y


def place_distractors(can: Placed, models: tuple[str, ...], variant: str) -> list[Placed]:
    """Where they are dropped, turned as the can. The can's place and the variant fix the draw, so
    that every policy sees the same; the original's draw is not published."""
    rng = np.random.default_rng(zlib.crc32(repr((variant, can.xy, can.turn)).encode()))
    placed = []
    for model in models:
        xy = np.array(can.xy)
        while np.linalg.norm(xy - can.xy) <= CLEAR:
            xy = np.clip(can.xy + rng.uniform(-REACH, REACH, 2), LOW, HIGH)
        x, y = xy.tolist()
        placed.append(Placed(model, (x, y), can.turn))
    return placed
