"""The embedded twin's scene: Google-robot arm, three-drawer cabinet and an apple, by MjSpec.

Own primitives only. Cabinet, arm kinematics, gains and the head camera have SIMPLER's dimensions
(metres, world frame); the drawer fronts leave the same open gap above them and the handles are
visual only, so what opens a drawer here opens it there. Where the twin differs: docs/twin.md.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import mujoco
import numpy as np

from selfflow.datasets.rotations import from_axis_angle

CABINET = np.array([-0.295, 0.0, 0.017])
BASE_HEIGHT = 0.07905
CONTROL_HZ, SUBSTEPS = 3.0, 167
TIMESTEP = 1 / (CONTROL_HZ * SUBSTEPS)

# name, offset from parent, axis, range, kp, kd, force, mass, start, capsules (from, to, radius)
ARM = (
    ("torso", (0, 0, 0.5945), "z", (-4.49, 1.35), 1700, 1060, 300, 2.47, -0.26395,
     (((0, 0, -0.02), (0, 0, 0.113), 0.08), ((0, 0, 0.113), (0, -0.12, 0.113), 0.06))),
    ("shoulder", (0, -0.1673, 0.113), "y", (-2.66, 3.18), 1737, 1010, 300, 2.08, 0.08319,
     (((0, 0, 0), (0, 0, 0.19), 0.06),)),
    ("bicep", (0, 0.0023, 0.215), "z", (-2.13, 3.71), 980, 767, 100, 1.40, 0.50176,
     (((0, 0, 0), (0, 0, 0.185), 0.055),)),
    ("elbow", (0, -0.064, 0.185), "y", (-2.05, 3.79), 930, 680, 100, 0.79, 1.15686,
     (((0, 0, 0), (0, -0.08, 0.03), 0.05),)),
    ("forearm", (0, -0.101, 0.0915), "z", (-2.92, 2.92), 1212, 675, 100, 0.82, 0.02858,
     (((0, 0, 0), (0, 0, 0.25), 0.045),)),
    ("wrist", (0, -0.006, 0.2735), "y", (-1.79, 1.79), 433, 275, 100, 0.54, 1.59260,
     (((0, 0, 0), (0, 0, 0.08), 0.04),)),
    ("gripper", (0, 0.006, 0.1091), "z", (-4.49, 1.35), 468, 340, 100, 0.41, -1.08065,
     (((0, -0.05, 0.02), (0, 0.05, 0.02), 0.03),)),
)  # fmt: skip
ARM_JOINTS = tuple(row[0] for row in ARM)
HOME = np.array([row[8] for row in ARM])
FINGER_TRAVEL = 0.09  # m each; 0 = open, FINGER_TRAVEL = closed
DRAWER_HEIGHTS = {"top": 0.668, "middle": 0.423, "bottom": 0.178}
APPLE_RADIUS = 0.0375

# Collision: the arm from the forearm on, cabinet, apple. bit 1 world and objects, bit 2 robot.
_WORLD = {"contype": 1, "conaffinity": 3}
_ROBOT = {"contype": 2, "conaffinity": 1}
_VISUAL = {"contype": 0, "conaffinity": 0, "mass": 0.0}
_AXES = {"y": (0, 1, 0), "z": (0, 0, 1)}

WOOD, FRONT, STEEL = (0.72, 0.55, 0.38, 1), (0.80, 0.63, 0.44, 1), (0.62, 0.63, 0.66, 1)
SHELL, DARK, RED = (0.87, 0.88, 0.90, 1), (0.22, 0.23, 0.26, 1), (0.76, 0.12, 0.10, 1)

Body = Any  # mujoco.MjsBody


def build(height: int, width: int) -> mujoco.MjModel:
    """The compiled scene, offscreen buffer at least height × width."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10
    # MuJoCo 4.0.0 factorises sparse Hessians wrongly (its release notes, #3767); dense is exact.
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    spec.visual.global_.offwidth, spec.visual.global_.offheight = max(640, width), max(512, height)
    spec.visual.quality.shadowsize, spec.visual.quality.offsamples = 1024, 0
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.38] * 3, [0.28] * 3
    spec.visual.headlight.specular = [0, 0, 0]
    spec.visual.map.znear = 0.005
    _room(spec)
    _cabinet(spec)
    _apple(spec)
    _robot(spec)
    return spec.compile()


def _box(body: Body, position, size, rgba=None, **options) -> Any:
    """A box by its full size in metres."""
    look = {} if rgba is None else {"rgba": rgba}
    return body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_BOX, pos=position, size=np.asarray(size) / 2, **look, **options
    )


def _room(spec: mujoco.MjSpec) -> None:
    world = spec.worldbody
    texture = {"type": mujoco.mjtTexture.mjTEXTURE_2D, "width": 256, "height": 256}
    spec.add_texture(
        name="tiles", builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER, rgb1=(0.50, 0.50, 0.49),
        rgb2=(0.45, 0.45, 0.45), **texture,
    )  # fmt: skip
    spec.add_texture(
        name="grain", builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        mark=mujoco.mjtMark.mjMARK_RANDOM,
        rgb1=WOOD[:3], rgb2=(0.66, 0.49, 0.33), markrgb=(0.60, 0.44, 0.29), random=0.03, **texture,
    )  # fmt: skip
    for name, tex, repeat in (("tiles", "tiles", (6, 6)), ("wood", "grain", (1, 1))):
        textures = [""] * mujoco.mjtTextureRole.mjNTEXROLE
        textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = tex
        spec.add_material(
            name=name, textures=textures, texrepeat=repeat, specular=0.1, reflectance=0.0
        )
    world.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(4, 4, 0.1), pos=(0, 0, 0.017),
        material="tiles", **_WORLD,
    )  # fmt: skip
    _box(world, (-1.2, 0, 1.3), (0.05, 8, 2.6), (0.78, 0.79, 0.77, 1), **_VISUAL)
    _box(world, (-1.17, 0, 0.07), (0.03, 8, 0.12), (0.55, 0.55, 0.55, 1), **_VISUAL)
    _box(world, (-1.165, 0.9, 1.1), (0.02, 0.9, 0.7), (0.30, 0.42, 0.50, 1), **_VISUAL)
    _box(world, (-0.85, -1.2, 0.4), (0.5, 0.9, 0.8), (0.42, 0.45, 0.48, 1), **_VISUAL)
    world.add_light(
        name="sun", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, pos=(1.2, 0.6, 2.6),
        dir=(-0.5, -0.25, -1), diffuse=(0.6, 0.6, 0.58), castshadow=True,
    )  # fmt: skip


def _cabinet(spec: mujoco.MjSpec) -> None:
    body = spec.worldbody.add_body(name="cabinet", pos=CABINET)
    wood = {"material": "wood", **_WORLD}
    _box(body, (-0.305, 0, 0.4225), (0.02, 0.615, 0.845), **wood)
    for side in (-1, 1):
        _box(body, (0, side * 0.2975, 0.4225), (0.59, 0.02, 0.845), **wood)
    _box(body, (0, 0, 0.855), (0.63, 0.615, 0.02), name="table", friction=(1, 0.01, 0.002), **wood)
    for name, z in DRAWER_HEIGHTS.items():
        drawer = body.add_body(name=f"drawer_{name}", pos=(0, 0, z), gravcomp=1)
        drawer.add_joint(
            name=f"drawer_{name}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(1, 0, 0), range=(0, 0.5),
            limited=True, damping=[3.0, 0, 0], frictionloss=1.5,
        )  # fmt: skip
        inside = {"mass": 0.3, "rgba": WOOD, **_WORLD}
        _box(drawer, (0.305, 0, 0), (0.015, 0.615, 0.14), FRONT, name=f"front_{name}", mass=0.3,
             friction=(1.2, 0.02, 0.002), **_WORLD)  # fmt: skip
        _box(drawer, (-0.285, 0, -0.02), (0.02, 0.515, 0.10), **inside)
        _box(drawer, (0, 0, -0.06), (0.55, 0.515, 0.02), name=f"floor_{name}", **inside)
        _box(drawer, (0.285, 0, -0.02), (0.02, 0.515, 0.10), **inside)
        for side in (-1, 1):
            _box(drawer, (0, side * 0.2675, -0.02), (0.59, 0.02, 0.10), **inside)
        _box(drawer, (0.348, 0, 0.02), (0.010, 0.13, 0.010), STEEL, **_VISUAL)
        for side in (-1, 1):
            _box(drawer, (0.33, side * 0.06, 0.02), (0.035, 0.008, 0.008), STEEL, **_VISUAL)


def _apple(spec: mujoco.MjSpec) -> None:
    r = APPLE_RADIUS
    body = spec.worldbody.add_body(name="apple", pos=(-0.08, 0.05, 0.93))
    body.add_freejoint(name="apple")
    body.add_geom(
        name="apple", type=mujoco.mjtGeom.mjGEOM_ELLIPSOID, size=(r, r, 0.93 * r), rgba=RED,
        density=600,         friction=(1, 0.02, 0.004), condim=6, solref=(0.006, 1), **_WORLD,
    )  # fmt: skip
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=(0.003, 0.008, 0), pos=(0, 0, 0.93 * r),
        rgba=(0.3, 0.2, 0.1, 1), **_VISUAL,
    )  # fmt: skip


def _capsule(body: Body, start, end, radius, rgba, **options) -> None:
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CAPSULE,
        fromto=(*start, *end),
        size=(radius, 0, 0),
        rgba=rgba,
        **options,
    )


def _robot(spec: mujoco.MjSpec) -> None:
    base = spec.worldbody.add_body(
        name="base", pos=(0.66, 0, BASE_HEIGHT), quat=(0, 0, 0, 1), mocap=True
    )
    base.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        size=(0.26, 0.12, 0),
        pos=(-0.12, 0, 0.1),
        rgba=SHELL,
        **_VISUAL,
    )
    _capsule(base, (-0.05, 0, 0.2), (-0.05, 0, 1.1), 0.10, SHELL, **_VISUAL)
    _box(base, (-0.02, 0, 1.25), (0.18, 0.24, 0.18), DARK, **_VISUAL)
    pan = base.add_body(name="head_pan", pos=(0, 0, 1.169), quat=from_axis_angle([0, 0, -0.00286]))
    tilt = pan.add_body(
        name="head_tilt", pos=(0.0718, 0, 0.1185), quat=from_axis_angle([0, 0.7851361, 0])
    )
    tilt.add_camera(  # looks along its own -z: turned to the body's +x, image up = +z
        name="overhead_camera", pos=(0.105, 0, 0), quat=(0.5, 0.5, -0.5, -0.5),
        fovy=np.degrees(2 * np.arctan(256 / 425)),
    )  # fmt: skip
    parent = base
    for name, offset, axis, limits, kp, kd, force, mass, _, capsules in ARM:
        parent = parent.add_body(name=name, pos=offset, gravcomp=1)
        parent.add_joint(
            name=name, type=mujoco.mjtJoint.mjJNT_HINGE, axis=_AXES[axis], range=limits,
            limited=True,             armature=0.1, damping=[1.0, 0, 0],
        )  # fmt: skip
        collides = name in ("forearm", "wrist", "gripper")
        for n, (start, end, radius) in enumerate(capsules):
            options = _ROBOT if collides else {"contype": 0, "conaffinity": 0}
            rgba = DARK if name in ("elbow", "wrist", "gripper") else SHELL
            _capsule(
                parent,
                start,
                end,
                radius,
                rgba,
                mass=mass / len(capsules),
                name=f"{name}_{n}",
                **options,
            )
        spec.add_actuator(
            name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, forcerange=(-force, force),
            forcelimited=True, gaintype=mujoco.mjtGain.mjGAIN_FIXED,
            biastype=mujoco.mjtBias.mjBIAS_AFFINE,
            gainprm=[kp] + [0] * 9, biasprm=[0, -kp, -kd] + [0] * 7,
        )  # fmt: skip
    _fingers(spec, parent)


def _fingers(spec: mujoco.MjSpec, gripper: Body) -> None:
    gripper.add_site(
        name="tcp", pos=(0.00434, 0.00189, 0.16353), size=(0.005, 0, 0), rgba=(0, 0, 0, 0)
    )
    for name, side in (("finger_right", -1), ("finger_left", 1)):
        finger = gripper.add_body(name=name, pos=(0, side * FINGER_TRAVEL, 0.058), gravcomp=1)
        finger.add_joint(
            name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, -side, 0),
            range=(0, FINGER_TRAVEL), limited=True, armature=0.05, damping=[10.0, 0, 0],
        )  # fmt: skip
        _box(finger, (0, side * 0.006, 0.045), (0.028, 0.012, 0.10), DARK,
             name=f"{name}_bar", mass=0.04, friction=(1.5, 0.02, 0.002), **_ROBOT)  # fmt: skip
        _box(finger, (0, side * 0.008, 0.095), (0.030, 0.016, 0.056), (0.1, 0.1, 0.1, 1), mass=0.02,
             name=f"{name}_tip", friction=(2, 0.05, 0.005), condim=6,
             solimp=(0.95, 0.99, 0.001, 0.5, 2), solref=(0.004, 1), **_ROBOT)  # fmt: skip
        spec.add_actuator(
            name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, forcerange=(-30, 30),
            forcelimited=True, gaintype=mujoco.mjtGain.mjGAIN_FIXED,
            biastype=mujoco.mjtBias.mjBIAS_AFFINE,
            gainprm=[600] + [0] * 9, biasprm=[0, -600, -40] + [0] * 7,
        )  # fmt: skip
    for a, b in (("forearm", "gripper"), ("forearm", "wrist"), ("wrist", "gripper")):
        spec.add_exclude(bodyname1=a, bodyname2=b)
    for finger in ("finger_right", "finger_left"):
        for link in ("forearm", "wrist", "gripper"):
            spec.add_exclude(bodyname1=finger, bodyname2=link)
