"""The embedded twin's two scenes by MjSpec: a three-drawer cabinet with an apple, and a table.

Own primitives only. Cabinet, arm kinematics, gains and the head camera have SIMPLER's dimensions
(metres, world frame); the drawer fronts leave the same open gap above them and the handles are
visual only, so what opens a drawer here opens it there. Where the twin differs: docs/twin.md.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

import mujoco
import numpy as np

from selfflow.envs.twin_body import VISUAL, WORLD, add_robot, box
from selfflow.envs.twin_look import USUAL, Look
from selfflow.envs.twin_mesh import dress
from selfflow.envs.twin_objects import add_objects
from selfflow.envs.twin_room import STEEL, WOOD, add_office, add_patterns, add_room

CABINET = np.array([-0.295, 0.0, 0.017])
CONTROL_HZ, SUBSTEPS = 3.0, 167
TIMESTEP = 1 / (CONTROL_HZ * SUBSTEPS)
DRAWER_HEIGHTS = {"top": 0.668, "middle": 0.423, "bottom": 0.178}
APPLE_RADIUS = 0.0375
FRONT, RED = (0.80, 0.63, 0.44, 1), (0.76, 0.12, 0.10, 1)
TABLE_TOP = 0.882
TABLE_Y = 0.21  # of the table's middle; it is a cabinet's body with SIMPLER's stand-in's extents
HANDLES = ("visual", "collide")
HANDLE = {"mass": 0.0, "friction": (1.5, 0.02, 0.002), **WORLD}  # collides


def build(
    height: int,
    width: int,
    look: Look = USUAL,
    handles: str = "visual",
    robot: str = "primitives",
) -> mujoco.MjModel:
    """The compiled cabinet scene, offscreen buffer at least height × width; handles: HANDLES;
    robot: twin_mesh.ROBOTS."""
    spec = _start(height, width, look)
    _cabinet(spec, handles)
    _apple(spec)
    return _with_robot(spec, robot)


def build_table(
    height: int, width: int, things: tuple[str, ...], look: Look, robot: str = "primitives"
) -> mujoco.MjModel:
    """The compiled table scene with the things (names of table_objects.MODELS), all parked."""
    spec = _start(height, width, look)
    _table(spec)
    add_objects(spec, things)
    return _with_robot(spec, robot)


def _with_robot(spec: mujoco.MjSpec, robot: str) -> mujoco.MjModel:
    add_robot(spec)
    if robot == "google_mesh":
        dress(spec)
    return spec.compile()


def _start(height: int, width: int, look: Look) -> mujoco.MjSpec:
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10
    # MuJoCo 4.0.0 factorises sparse Hessians wrongly (its release notes, #3767); dense is exact.
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    spec.visual.global_.offwidth, spec.visual.global_.offheight = max(640, width), max(512, height)
    spec.visual.quality.shadowsize = look.shadows
    spec.visual.quality.offsamples = look.samples
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.38] * 3, [0.28] * 3
    spec.visual.headlight.specular = [0, 0, 0]
    spec.visual.map.znear = 0.005
    (add_room if look.room == "plain" else add_office)(spec)
    add_patterns(spec)
    return spec


def _cabinet(spec: mujoco.MjSpec, handles: str) -> None:
    body = spec.worldbody.add_body(name="cabinet", pos=CABINET)
    grip = HANDLE if handles == "collide" else VISUAL
    wood = {"material": "wood", **WORLD}
    box(body, (-0.305, 0, 0.4225), (0.02, 0.615, 0.845), **wood)
    for side in (-1, 1):
        box(body, (0, side * 0.2975, 0.4225), (0.59, 0.02, 0.845), **wood)
    box(body, (0, 0, 0.855), (0.63, 0.615, 0.02), name="table", friction=(1, 0.01, 0.002), **wood)
    for name, z in DRAWER_HEIGHTS.items():
        drawer = body.add_body(name=f"drawer_{name}", pos=(0, 0, z), gravcomp=1)
        drawer.add_joint(
            name=f"drawer_{name}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(1, 0, 0), range=(0, 0.5),
            limited=True, damping=[3.0, 0, 0], frictionloss=1.5,
        )  # fmt: skip
        inside = {"mass": 0.3, "rgba": WOOD, **WORLD}
        box(drawer, (0.305, 0, 0), (0.015, 0.615, 0.14), FRONT, name=f"front_{name}", mass=0.3,
             friction=(1.2, 0.02, 0.002), **WORLD)  # fmt: skip
        box(drawer, (-0.285, 0, -0.02), (0.02, 0.515, 0.10), **inside)
        box(drawer, (0, 0, -0.06), (0.55, 0.515, 0.02), name=f"floor_{name}", **inside)
        box(drawer, (0.285, 0, -0.02), (0.02, 0.515, 0.10), **inside)
        for side in (-1, 1):
            box(drawer, (0, side * 0.2675, -0.02), (0.59, 0.02, 0.10), **inside)
        box(drawer, (0.348, 0, 0.02), (0.010, 0.13, 0.010), STEEL, **grip)
        for side in (-1, 1):
            box(drawer, (0.33, side * 0.06, 0.02), (0.035, 0.008, 0.008), STEEL, **grip)


def _table(spec: mujoco.MjSpec) -> None:
    """A cabinet's body with shut drawers: the extents of SIMPLER's stand-in, 0.63 × 0.615 m."""
    body = spec.worldbody.add_body(name="table", pos=(CABINET[0], TABLE_Y, CABINET[2]))
    box(body, (0, 0, 0.4325), (0.63, 0.615, 0.865), name="table", material="wood",
        friction=(0.8, 0.01, 0.001), **WORLD)  # fmt: skip
    for z in DRAWER_HEIGHTS.values():
        box(body, (0.317, 0, z + 0.02), (0.015, 0.60, 0.22), FRONT, **VISUAL)
        box(body, (0.348, 0, z + 0.02), (0.010, 0.13, 0.010), STEEL, **VISUAL)
        for side in (-1, 1):
            box(body, (0.33, side * 0.06, z + 0.02), (0.035, 0.008, 0.008), STEEL, **VISUAL)


def _apple(spec: mujoco.MjSpec) -> None:
    r = APPLE_RADIUS
    body = spec.worldbody.add_body(name="apple", pos=(-0.08, 0.05, 0.93))
    body.add_freejoint(name="apple")
    body.add_geom(
        name="apple", type=mujoco.mjtGeom.mjGEOM_ELLIPSOID, size=(r, r, 0.93 * r), rgba=RED,
        density=600,         friction=(1, 0.02, 0.004), condim=6, solref=(0.006, 1), **WORLD,
    )  # fmt: skip
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=(0.003, 0.008, 0), pos=(0, 0, 0.93 * r),
        rgba=(0.3, 0.2, 0.1, 1), **VISUAL,
    )  # fmt: skip
