"""What surrounds the twin's cabinet or table: floor, walls, furniture, lights. Seen, not touched
(but for the floor). `office` is the default; `plain` is barer."""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

import mujoco
import numpy as np

from selfflow.datasets.rotations import compose, from_axis_angle
from selfflow.envs.twin_body import VISUAL, WORLD, Body, box

WOOD, STEEL = (0.72, 0.55, 0.38, 1), (0.62, 0.63, 0.66, 1)
TEXTURE_SIZE = 256
# Materials that floor and table or cabinet may have: the first, unless drawn (twin_random.py).
FLOORS = ("tiles", "parquet", "concrete", "checks")
TOPS = ("wood", "dark_wood", "laminate", "marble")
_DESK, _LEAF, _CHAIR = (0.75, 0.72, 0.66, 1), (0.20, 0.36, 0.17, 1), (0.20, 0.23, 0.30, 1)


def add_room(spec: mujoco.MjSpec) -> None:
    """Checkered floor, a wall with a board, a low shelf, one sun."""
    world = spec.worldbody
    texture = {
        "type": mujoco.mjtTexture.mjTEXTURE_2D,
        "width": TEXTURE_SIZE,
        "height": TEXTURE_SIZE,
    }
    spec.add_texture(
        name="tiles", builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER, rgb1=(0.50, 0.50, 0.49),
        rgb2=(0.45, 0.45, 0.45), **texture,
    )  # fmt: skip
    spec.add_texture(
        name="grain", builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        mark=mujoco.mjtMark.mjMARK_RANDOM,
        rgb1=WOOD[:3], rgb2=(0.66, 0.49, 0.33), markrgb=(0.60, 0.44, 0.29), random=0.03, **texture,
    )  # fmt: skip
    add_material(spec, "tiles", "tiles", (6, 6))
    add_material(spec, "wood", "grain", (1, 1))
    world.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(4, 4, 0.1), pos=(0, 0, 0.017),
        material="tiles", **WORLD,
    )  # fmt: skip
    box(world, (-1.2, 0, 1.3), (0.05, 8, 2.6), (0.78, 0.79, 0.77, 1), name="wall", **VISUAL)
    box(world, (-1.17, 0, 0.07), (0.03, 8, 0.12), (0.55, 0.55, 0.55, 1), **VISUAL)
    box(world, (-1.165, 0.9, 1.1), (0.02, 0.9, 0.7), (0.30, 0.42, 0.50, 1), **VISUAL)
    box(world, (-0.85, -1.2, 0.4), (0.5, 0.9, 0.8), (0.42, 0.45, 0.48, 1), **VISUAL)
    _sun(world, (0.6, 0.6, 0.58))


def add_office(spec: mujoco.MjSpec) -> None:
    """Carpet tiles, a wall with a window's light, desk, chair and plant; a sun and a fill light."""
    world, rng = spec.worldbody, np.random.default_rng(0)
    paint(spec, "tiles", carpet(rng))
    paint(spec, "grain", planks(rng))
    add_material(spec, "tiles", "tiles", (9, 9))
    add_material(spec, "wood", "grain", (1, 1))
    world.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(4, 4, 0.1), pos=(0, 0, 0.017),
        material="tiles", **WORLD,
    )  # fmt: skip
    box(world, (-1.9, 0, 1.3), (0.05, 8, 2.6), (0.83, 0.82, 0.78, 1), name="wall", **VISUAL)
    box(world, (-1.86, 0, 0.07), (0.03, 8, 0.10), (0.93, 0.93, 0.91, 1), **VISUAL)
    box(world, (-1.865, 0.75, 0.95), (0.03, 1.0, 0.55), (0.93, 0.93, 0.91, 1), **VISUAL)
    box(world, (-1.855, 0.75, 0.95), (0.03, 0.92, 0.47), (0.55, 0.70, 0.82, 1), **VISUAL)
    _desk(world.add_body(name="desk", pos=(-1.45, -0.85, 0.017)))
    _chair(world.add_body(name="chair", pos=(-0.95, -1.0, 0.017)))
    _plant(world.add_body(name="plant", pos=(-1.45, 0.15, 0.017)))
    # From the robot's left: its shadow falls beside the table. The shadow map covers that only.
    _sun(world, (0.42, 0.41, 0.38), position=(-0.1, -0.9, 2.6), direction=(-0.12, 0.62, -1))
    spec.stat.extent, spec.stat.center = 2.0, (-0.3, 0.2, 0.7)
    spec.visual.map.shadowclip = 0.55
    spec.visual.quality.numslices, spec.visual.quality.numstacks = 20, 8  # of round shapes
    world.add_light(
        name="fill", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, pos=(1.0, 1.2, 2.6),
        dir=(-0.6, -0.4, -0.8), diffuse=(0.20, 0.20, 0.21), specular=(0.1, 0.1, 0.1),
        castshadow=False,
    )  # fmt: skip


def add_patterns(spec: mujoco.MjSpec) -> None:
    """The other materials of FLOORS and TOPS."""
    rng = np.random.default_rng(1)
    n = TEXTURE_SIZE // 2
    speckle = rng.normal(0, 1, (n, n, 1))
    coarse = np.kron(rng.normal(0, 1, (n // 8, n // 8, 1)), np.ones((8, 8, 1)))
    wood = planks(rng)[::2, ::2]
    boards = 0.05 * ((np.arange(n) // 16 % 2)[:, None, None] - 0.5)
    x, y = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n))
    bent = x + 0.6 * y + 0.10 * np.sin(9 * y) + 0.05 * np.sin(23 * x + 5 * y)
    vein = np.exp(-12 * np.abs(np.sin(9 * bent)))[..., None]
    blocks = np.kron([[0.0, 1.0], [1.0, 0.0]], np.ones((n // 2, n // 2)))[..., None]
    pictures = {
        "parquet": (0.85 * wood + boards, (5, 5)),
        "concrete": (0.55 + 0.02 * speckle + 0.02 * coarse + np.zeros(3), (3, 3)),
        "checks": (0.35 + 0.25 * blocks + np.zeros(3), (8, 8)),
        "dark_wood": (0.55 * wood, (1, 1)),
        "laminate": (0.80 + 0.012 * speckle + np.array([0.02, 0.01, -0.03]), (1, 1)),
        "marble": (0.70 - 0.16 * vein + 0.01 * speckle + np.array([0.0, 0.01, 0.03]), (1, 1)),
    }
    for name, (picture, repeat) in pictures.items():
        paint(spec, name, picture)
        add_material(spec, name, name, repeat)


def add_material(
    spec: mujoco.MjSpec,
    name: str,
    texture: str,
    repeat: tuple[int, int] = (1, 1),
    specular: float = 0.1,
    shininess: float = 0.5,
) -> None:
    """A material with a picture on it."""
    textures = [""] * mujoco.mjtTextureRole.mjNTEXROLE
    textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = texture
    spec.add_material(
        name=name, textures=textures, texrepeat=repeat, specular=specular, shininess=shininess,
        reflectance=0.0,
    )  # fmt: skip


def paint(spec: mujoco.MjSpec, name: str, picture: np.ndarray) -> None:
    """A texture from a picture (H, W, 3) of values in 0 .. 1."""
    height, width, _ = picture.shape
    pixels = (255 * np.clip(picture, 0, 1)).round().astype(np.uint8)
    texture = spec.add_texture(
        name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=width, height=height, nchannel=3
    )
    texture.data = pixels.tobytes()


def carpet(rng: np.random.Generator) -> np.ndarray:
    """Two by two carpet tiles, (256, 256, 3)."""
    n = TEXTURE_SIZE
    tone = np.kron([[0.0, 0.018], [0.018, 0.0]], np.ones((n // 2, n // 2)))
    tone += rng.normal(0, 0.014, (n, n))
    return np.array([0.43, 0.44, 0.46]) + tone[..., None]


def planks(rng: np.random.Generator) -> np.ndarray:
    """Fine wood grain along the second axis, (256, 256, 3)."""
    n = TEXTURE_SIZE
    across = np.arange(n)[:, None] / n
    along = np.arange(n)[None] / n
    wave = across * 34 + 0.9 * np.sin(2 * np.pi * along) + 1.6 * np.sin(7 * across + 3 * along)
    fibre = np.repeat(rng.normal(0, 1, (n, n // 16)), 16, axis=1)
    grain = 0.020 * np.sin(2 * np.pi * wave) + 0.010 * fibre
    return np.array([0.70, 0.54, 0.38]) + grain[..., None] * [1.0, 0.95, 0.8]


def _sun(world: Body, colour, position=(1.2, 0.6, 2.6), direction=(-0.5, -0.25, -1)) -> None:
    world.add_light(
        name="sun", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, pos=position, dir=direction,
        diffuse=colour, castshadow=True,
    )  # fmt: skip


def _cylinder(body: Body, position, radius: float, height: float, rgba) -> None:
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER, pos=position, size=(radius, height / 2, 0), rgba=rgba,
        **VISUAL,
    )  # fmt: skip


def _desk(body: Body) -> None:
    box(body, (0, 0, 0.72), (0.7, 1.3, 0.03), _DESK, **VISUAL)
    for x in (-0.3, 0.3):
        for y in (-0.6, 0.6):
            box(body, (x, y, 0.36), (0.04, 0.04, 0.70), STEEL, **VISUAL)
    box(body, (-0.2, 0.1, 0.95), (0.03, 0.55, 0.34), (0.10, 0.11, 0.13, 1), **VISUAL)
    box(body, (-0.2, 0.1, 0.76), (0.12, 0.10, 0.06), (0.10, 0.11, 0.13, 1), **VISUAL)
    box(body, (0.12, 0.1, 0.745), (0.15, 0.42, 0.02), (0.85, 0.85, 0.86, 1), **VISUAL)


def _chair(body: Body) -> None:
    _cylinder(body, (0, 0, 0.05), 0.24, 0.04, STEEL)
    _cylinder(body, (0, 0, 0.25), 0.03, 0.40, STEEL)
    box(body, (0, 0, 0.47), (0.44, 0.44, 0.07), _CHAIR, **VISUAL)
    box(body, (0.20, 0, 0.78), (0.06, 0.42, 0.46), _CHAIR, **VISUAL)


def _plant(body: Body) -> None:
    _cylinder(body, (0, 0, 0.14), 0.13, 0.28, (0.80, 0.78, 0.74, 1))
    for n in range(9):
        turn, lean = 2.4 * n, 0.35 + 0.5 * (n % 5) / 5  # by the golden angle
        middle = np.array([0.0, 0.0, 0.30]) + 0.20 * np.array(
            [np.cos(turn) * np.sin(lean), np.sin(turn) * np.sin(lean), np.cos(lean)]
        )
        upright = compose(from_axis_angle([0, 0, turn]), from_axis_angle([0, lean, 0]))
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_ELLIPSOID, size=(0.012, 0.055, 0.19), pos=middle,
            quat=upright, rgba=_LEAF, **VISUAL,
        )  # fmt: skip
