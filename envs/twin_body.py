"""The twin's Google robot as MuJoCo primitives: base, head camera, arm and two sliding fingers.

Arm kinematics, gains, limits and the head camera are SIMPLER's (metres, radians).
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import mujoco
import numpy as np

from selfflow.datasets.rotations import from_axis_angle

BASE_HEIGHT = 0.07905

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
# Collision: the arm from the forearm on, cabinet, objects. bit 1 world and objects, bit 2 robot.
WORLD = {"contype": 1, "conaffinity": 3}
ROBOT = {"contype": 2, "conaffinity": 1}
VISUAL = {"contype": 0, "conaffinity": 0, "mass": 0.0}
_AXES = {"y": (0, 1, 0), "z": (0, 0, 1)}

SHELL, DARK = (0.87, 0.88, 0.90, 1), (0.22, 0.23, 0.26, 1)

Body = Any  # mujoco.MjsBody


def box(body: Body, position, size, rgba=None, **options) -> Any:
    """A box by its full size in metres."""
    look = {} if rgba is None else {"rgba": rgba}
    return body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_BOX, pos=position, size=np.asarray(size) / 2, **look, **options
    )


def _capsule(body: Body, start, end, radius, rgba, **options) -> None:
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CAPSULE,
        fromto=(*start, *end),
        size=(radius, 0, 0),
        rgba=rgba,
        **options,
    )


def add_robot(spec: mujoco.MjSpec) -> None:
    base = spec.worldbody.add_body(
        name="base", pos=(0.66, 0, BASE_HEIGHT), quat=(0, 0, 0, 1), mocap=True
    )
    base.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        size=(0.26, 0.12, 0),
        pos=(-0.12, 0, 0.1),
        rgba=SHELL,
        **VISUAL,
    )
    _capsule(base, (-0.05, 0, 0.2), (-0.05, 0, 1.1), 0.10, SHELL, **VISUAL)
    box(base, (-0.02, 0, 1.25), (0.18, 0.24, 0.18), DARK, **VISUAL)
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
            options = ROBOT if collides else {"contype": 0, "conaffinity": 0}
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
        box(finger, (0, side * 0.006, 0.045), (0.028, 0.012, 0.10), DARK,
             name=f"{name}_bar", mass=0.04, friction=(1.5, 0.02, 0.002), **ROBOT)  # fmt: skip
        box(finger, (0, side * 0.008, 0.095), (0.030, 0.016, 0.056), (0.1, 0.1, 0.1, 1), mass=0.02,
             name=f"{name}_tip", friction=(2, 0.05, 0.005), condim=6,
             solimp=(0.95, 0.99, 0.001, 0.5, 2), solref=(0.004, 1), **ROBOT)  # fmt: skip
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
