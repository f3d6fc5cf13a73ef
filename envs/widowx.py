"""The WidowX 250 S on SAPIEN 3: joints, gains, contact materials and the 5 Hz pose controller.

The delta of an action moves the last *target* of the tool, not the sensed pose (SIMPLER's
"target_delta_pose_align2"): what the arm lags behind is not lost, and a script that wants to arrive
exactly must command from the target. Joint targets are set at once, without a path in between.
"""

from pathlib import Path

import numpy as np
import sapien
from jaxtyping import Float

from selfflow.datasets.rotations import canonical, compose, rotate
from selfflow.envs.arm import Arm, Joint

CONTROL_HZ, PHYSICS_HZ = 5, 500
SUBSTEPS = PHYSICS_HZ // CONTROL_HZ
TOOL, BASE = "ee_gripper_link", "base_link"

# Stiffness, damping, force limit by joint.
_DRIVES = {
    "waist": (1169.79, 330.0, 200.0),
    "shoulder": (730.0, 180.0, 200.0),
    "elbow": (808.46, 152.12, 100.0),
    "forearm_roll": (1229.13, 309.63, 100.0),
    "wrist_angle": (1272.28, 201.05, 100.0),
    "wrist_rotate": (1056.33, 269.51, 100.0),
}
ARM = tuple(_DRIVES)
# m from the middle, each finger's limits: opening 0 and 1. SIMPLER's targets are 1 mm beyond, but
# PhysX 4 drives towards nothing beyond a limit (fingers: 1 mm -> 0.04 mm from the original's).
FINGER_RANGE = (0.015, 0.037)
FINGERS = {
    name: Joint(FINGER_RANGE[1], 1000.0, 200.0, 60.0) for name in ("left_finger", "right_finger")
}
FINGER_LINKS = ("left_finger_link", "right_finger_link")
MATERIALS = {link: ((2.0, 2.0, 0.0), 0.01) for link in FINGER_LINKS}
NO_SELF_COLLISION = 1 << 29  # bit of a shape's third collision group; shapes that share it pass


class WidowX(Arm):
    """The robot in a scene, the arm's joints starting at `start` (rad, in the order of ARM)."""

    def __init__(
        self, scene: sapien.Scene, urdf: Path, base: sapien.Pose, start: tuple[float, ...]
    ) -> None:
        angles = zip(_DRIVES.items(), start, strict=True)
        arm = {name: Joint(angle, *drive) for (name, drive), angle in angles}
        super().__init__(scene, urdf, base, arm, FINGERS, MATERIALS, TOOL, several_hulls=False)
        self._ignore_itself()
        self.target = self.tool_pose()  # where the actions so far want the tool to be
        self.arm_drive = self.arm_angles  # last joint targets (rad)

    def _ignore_itself(self) -> None:
        """The gripper's hulls overlap: with their contacts the tool is off by 60 mm in a replay."""
        for link in self.body.links:
            for shape in link.collision_shapes:
                groups = list(shape.get_collision_groups())
                groups[2] |= NO_SELF_COLLISION
                shape.set_collision_groups(groups)

    def opening(self) -> float:
        """Gripper opening in [0, 1]; 0 where the fingers stand at their inner limit."""
        return float(np.clip(np.interp(self.finger_angles.mean(), FINGER_RANGE, (0.0, 1.0)), 0, 1))

    def move_target(self, delta: Float[np.ndarray, "3"], turn: Float[np.ndarray, "4"]) -> None:
        """Turns the target about the sensed tool position, then shifts it; base frame, m."""
        centre, _ = self.tool_pose()
        position, quaternion = self.target
        self.target = (
            centre + rotate(turn, position - centre) + delta,
            canonical(compose(turn, quaternion)),
        )

    def drive(self, opening: float) -> bool:
        """Sets the joints' targets for a control step; False where the tool's target has no
        inverse kinematics: the arm stops at its sensed angles, the target stays where it is."""
        goal = self.inverse_kinematics(*self.target)
        self.arm_drive = self.arm_angles if goal is None else goal
        finger = float(np.interp(opening, (0.0, 1.0), FINGER_RANGE))
        for name, angle in zip(ARM, self.arm_drive.tolist(), strict=True):
            self.joints[name].set_drive_target(angle)
        for name in FINGERS:
            self.joints[name].set_drive_target(finger)
        return goal is not None
