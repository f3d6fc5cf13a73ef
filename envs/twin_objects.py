"""The things on the twin's table: cans, bottle, fruit and sponge, by the names of table_objects.MODELS.

Collision shapes are cylinders, ellipsoids and a box of SIMPLER's sizes; what is seen is turned on a
lathe and painted here. Every thing starts parked: below the floor, weightless, touching nothing.
"""  # noqa: E501

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import mujoco
import numpy as np

from selfflow.envs.table_objects import COKE, MODELS
from selfflow.envs.task_move_near import TRIPLETS
from selfflow.envs.twin_body import VISUAL, Body
from selfflow.envs.twin_room import add_material, paint

COKE_THINGS = (COKE,)
NEAR_THINGS = tuple(sorted({name for triplet in TRIPLETS for name in triplet}))
# kg/m³: SIMPLER's object table, but for the can to pick, and apple and orange of move near.
DENSITY = {COKE: 100, "baked_apple_v2": 200, "orange": 200, "baked_sponge_v2": 150}
HOLLOW = 50  # cans and bottle
PARKED = -1.5  # m

AROUND = 24  # corners of a turned shape
TO_Y = (np.sqrt(0.5), -np.sqrt(0.5), 0.0, 0.0)  # a lathe's axis z becomes y: cans lie along it
CAN = ((0.0, -0.955), (0.70, -0.955), (0.78, -1.0), (0.97, -0.90), (1.0, -0.86), (1.0, 0.82),
       (0.96, 0.88), (0.83, 0.97), (0.80, 1.0), (0.74, 0.975), (0.0, 0.975))  # fmt: skip
BOTTLE = ((0.0, -0.97), (0.75, -1.0), (0.97, -0.94), (1.0, -0.88), (1.0, 0.30), (0.93, 0.42),
          (0.72, 0.58), (0.50, 0.70), (0.44, 0.74), (0.44, 0.80), (0.50, 0.81), (0.50, 0.99),
          (0.44, 1.0), (0.0, 1.0))  # fmt: skip
SILVER, WHITE, RED = (0.62, 0.63, 0.65), (0.92, 0.92, 0.91), (0.72, 0.05, 0.07)


def add_objects(spec: mujoco.MjSpec, names: Sequence[str]) -> None:
    """One free body of the model's name for each, its joint too; all parked."""
    for n, name in enumerate(names):
        body = spec.worldbody.add_body(name=name, pos=(0.4 * n, 0, PARKED), gravcomp=1)
        body.add_freejoint(name=name)
        size = np.array(MODELS[name].box) / 2
        if "sponge" in name:
            _sponge(spec, body, size)
        elif "apple" in name or name == "orange":
            _fruit(spec, body, size)
        elif "bottle" in name:
            _bottle(spec, body, size)
        else:
            _can(spec, body, size)


def _solid(body: Body, kind: mujoco.mjtGeom, size, **options) -> None:
    """A collision shape, not seen; parked, until a reset lets it collide."""
    body.add_geom(
        name=body.name if not options.get("pos") else f"{body.name}_neck",
        type=kind, size=size, rgba=(0, 0, 0, 0), density=DENSITY.get(body.name, HOLLOW),
        friction=(0.8, 0.02, 0.001), condim=6, solref=(0.006, 1), contype=0, conaffinity=0,
        **options,
    )  # fmt: skip


def _can(spec: mujoco.MjSpec, body: Body, size: np.ndarray) -> None:
    radius, half = size[0], size[1]
    _solid(body, mujoco.mjtGeom.mjGEOM_CYLINDER, (radius, half, 0), quat=TO_Y)
    picture = next(label for brand, label in LABELS.items() if brand in body.name)()
    add_painted(spec, body.name, picture, specular=0.55, shininess=0.6)
    _turned(spec, body, np.array(CAN) * (radius, half), TO_Y)


def _bottle(spec: mujoco.MjSpec, body: Body, size: np.ndarray) -> None:
    radius, half = size[0], size[1]
    belly = 0.72 * half  # half the height up to the shoulder
    _solid(body, mujoco.mjtGeom.mjGEOM_CYLINDER, (radius, belly, 0), quat=TO_Y)
    body.geoms[-1].pos = (0, belly - half, 0)
    neck = half - belly
    _solid(body, mujoco.mjtGeom.mjGEOM_CYLINDER, (0.5 * radius, neck, 0), quat=TO_Y,
           pos=(0, half - neck, 0))  # fmt: skip
    add_painted(spec, body.name, bottle_label(), specular=0.6, shininess=0.7)
    _turned(spec, body, np.array(BOTTLE) * (radius, half), TO_Y)


def _fruit(spec: mujoco.MjSpec, body: Body, size: np.ndarray) -> None:
    _solid(body, mujoco.mjtGeom.mjGEOM_ELLIPSOID, size)
    apple = "apple" in body.name
    add_painted(spec, body.name, apple_skin() if apple else orange_skin(), 0.3, 0.4)
    # A sphere from the bottom dimple to the top one, which is deeper on the apple.
    angle = np.linspace(-np.pi / 2, np.pi / 2, 19)
    dent = (0.30 if apple else 0.04) * np.exp(-(((angle - np.pi / 2) / 0.42) ** 2))
    dent += (0.10 if apple else 0.02) * np.exp(-(((angle + np.pi / 2) / 0.35) ** 2))
    outline = np.stack([np.cos(angle), np.sin(angle) * (1 - dent)], axis=1)
    outline[[0, -1], 0] = 0.0
    _turned(spec, body, outline * (size[0], size[2]), (1, 0, 0, 0))
    if apple:
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CAPSULE, size=(0.0022, 0, 0), rgba=(0.30, 0.20, 0.10, 1),
            fromto=(0, 0, 0.6 * size[2], 0.005, 0.002, 1.05 * size[2]), **VISUAL,
        )  # fmt: skip


def _sponge(spec: mujoco.MjSpec, body: Body, size: np.ndarray) -> None:
    _solid(body, mujoco.mjtGeom.mjGEOM_BOX, size)
    rng = np.random.default_rng(1)
    for name, colour in (("foam", (0.93, 0.78, 0.22)), ("scrub", (0.16, 0.42, 0.22))):
        picture = np.array(colour) - 0.07 * (rng.random((128, 128, 1)) < 0.3)
        add_painted(spec, name, picture, specular=0.0, shininess=0.0)
    layer = 0.22 * size[2]  # half the thickness of the scrubbing side
    for material, z, half in (("foam", -layer, size[2] - layer), ("scrub", size[2] - layer, layer)):
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, material=material, pos=(0, 0, z),
            size=(*size[:2], half), **VISUAL,
        )  # fmt: skip


def add_painted(
    spec: mujoco.MjSpec, name: str, picture: np.ndarray, specular: float, shininess: float
) -> None:
    """A texture and the material of the same name that shows it once."""
    paint(spec, name, picture)
    add_material(spec, name, name, (1, 1), specular, shininess)


def _turned(spec: mujoco.MjSpec, body: Body, outline: np.ndarray, quat) -> None:
    """Adds the solid of revolution about z of an outline of (radius, height) rows, bottom to top,
    with the material of the body's name: its picture once around, upright."""
    turns = np.linspace(0, 2 * np.pi, AROUND + 1)
    radius, height = outline.T
    points = np.stack(
        [np.outer(radius, np.cos(turns)), np.outer(radius, np.sin(turns)),
         np.repeat(height[:, None], AROUND + 1, axis=1)], axis=-1,
    )  # fmt: skip
    up = (height - height.min()) / np.ptp(height)
    where = np.stack(np.broadcast_arrays(turns / (2 * np.pi), 1 - up[:, None]), axis=-1)
    faces = []
    for ring in range(len(outline) - 1):
        for n in range(AROUND):
            a = ring * (AROUND + 1) + n
            b = a + AROUND + 1  # the one above
            if radius[ring] > 0:
                faces.append((a, a + 1, b + 1))
            if radius[ring + 1] > 0:
                faces.append((a, b + 1, b))
    spec.add_mesh(
        name=body.name,
        uservert=points.ravel().tolist(),
        usertexcoord=where.ravel().tolist(),
        userface=np.ravel(faces).tolist(),
    )
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_MESH, meshname=body.name, material=body.name, quat=quat, **VISUAL
    )


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Around (0 .. 1) and up (0 .. 1) of a label's pixels (128, 256), the first row on top."""
    around, down = np.meshgrid((np.arange(256) + 0.5) / 256, (np.arange(128) + 0.5) / 128)
    return around, 1 - down


def _label(ground, ends=(0.06, 0.93)) -> tuple:
    """A plain can's picture with silver ends, and its pixels' coordinates."""
    around, up = _grid()
    picture = np.broadcast_to(np.array(ground, np.float64), (*up.shape, 3)).copy()
    picture[(up < ends[0]) | (up > ends[1])] = SILVER
    picture[(up > 0.98) & (up < 0.993)] = 0.75 * np.array(SILVER)  # the lid, below its rim
    return picture, around, up, (up >= ends[0]) & (up <= ends[1])


def coke_label() -> np.ndarray:
    """Red, a white wave around."""
    picture, around, up, side = _label(RED)
    wave = up - 0.46 - 0.16 * np.sin(4 * np.pi * around)
    picture[side & (np.abs(wave) < 0.07)] = WHITE
    picture[side & (np.abs(wave + 0.12) < 0.015)] = WHITE
    return picture


def pepsi_label() -> np.ndarray:
    """Blue, with two roundels of red, white and blue."""
    picture, around, up, side = _label((0.02, 0.17, 0.52))
    across = ((2 * around) % 1 - 0.5) * 2.0
    height = (up - 0.52) * 2.3
    inside = side & (across**2 + height**2 < 0.42)
    bend = height - 0.18 * np.sin(2.5 * across)
    picture[inside] = WHITE
    picture[inside & (bend > 0.12)] = RED
    picture[inside & (bend < -0.12)] = (0.05, 0.35, 0.75)
    return picture


def seven_up_label() -> np.ndarray:
    """Green, with a yellow band and red dots."""
    picture, around, up, side = _label((0.03, 0.48, 0.22))
    wave = up - 0.30 - 0.06 * np.sin(4 * np.pi * around)
    picture[side & (np.abs(wave) < 0.05)] = (0.9, 0.85, 0.2)
    dot = (((2 * around) % 1 - 0.5) * 2.0) ** 2 + ((up - 0.60) * 2.3) ** 2
    picture[side & (dot < 0.25)] = WHITE
    picture[side & (dot < 0.16)] = RED
    return picture


def redbull_label() -> np.ndarray:
    """Blue and silver fields, slanted, with a red and yellow emblem."""
    picture, around, up, side = _label((0.78, 0.80, 0.84))
    field = np.sign(np.sin(4 * np.pi * (around + 0.12 * up))) * np.sign(up - 0.5)
    picture[side & (field > 0)] = (0.05, 0.12, 0.45)
    across, height = ((2 * around + 0.25) % 1 - 0.5) * 2.0, (up - 0.5) * 2.8
    picture[side & (across**2 + height**2 < 0.16)] = (0.95, 0.75, 0.1)
    picture[side & (np.abs(np.abs(across) - 0.30) < 0.16) & (np.abs(height) < 0.14)] = RED
    return picture


def bottle_label() -> np.ndarray:
    """Blue plastic with a white label and a white cap."""
    around, up = _grid()
    blue = np.array([0.10, 0.36, 0.72])
    picture = np.broadcast_to(blue, (*up.shape, 3)).copy()
    band = (up > 0.22) & (up < 0.56)
    picture[band] = WHITE
    picture[band & (np.abs(up - 0.42 - 0.04 * np.sin(4 * np.pi * around)) < 0.03)] = blue
    picture[up > 0.905] = WHITE
    return picture


def apple_skin() -> np.ndarray:
    """Red, lighter streaks, greenish about the stem."""
    _, up = _grid()
    streaks = np.random.default_rng(2).normal(0, 0.05, (1, 256, 1))
    skin = np.array([0.72, 0.07, 0.08]) + streaks * [1.0, 0.5, 0.3]
    green = np.clip((up - 0.86) / 0.14, 0, 1)[..., None] ** 1.5
    return skin * (1 - 0.75 * green) + np.array([0.62, 0.60, 0.18]) * 0.75 * green


def orange_skin() -> np.ndarray:
    """Orange with pores, green at the navel."""
    _, up = _grid()
    pores = 0.05 * (np.random.default_rng(3).random((128, 256, 1)) < 0.12)
    skin = np.array([0.95, 0.50, 0.06]) - pores
    skin[up > 0.985] = (0.35, 0.45, 0.15)
    return skin


LABELS = {"coke": coke_label, "pepsi": pepsi_label, "7up": seven_up_label, "redbull": redbull_label}
