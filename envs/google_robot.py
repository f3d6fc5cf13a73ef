"""The Google robot on SAPIEN 3: joints, gains, contact materials and the 3 Hz pose controller.

Legend: N substeps, J arm joints (9, the head included).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sapien
from jaxtyping import Float

from selfflow.envs.arm import Arm, Joint
from selfflow.envs.trajectory import JerkLimited

CONTROL_HZ, PHYSICS_HZ = 3, 513
SUBSTEPS = PHYSICS_HZ // CONTROL_HZ
BASE_HEIGHT = 0.06205 + 0.017
TOOL, CAMERA = "link_gripper_tcp", "link_camera"
HEAD = ("joint_head_pan", "joint_head_tilt")


ARM = {
    "joint_torso": Joint(-0.2639457174606611, 1700.0, 1059.9791902443303, 300.0),
    "joint_shoulder": Joint(0.0831913360274175, 1737.0471680861954, 1010.4720585373592, 300.0),
    "joint_bicep": Joint(0.5017611504652179, 979.975871856535, 767.2803161582076, 100.0),
    "joint_elbow": Joint(1.156859026208673, 930.0, 680.0, 100.0),
    "joint_forearm": Joint(0.028583671314766423, 1212.154500274304, 674.9946964336588, 100.0),
    "joint_wrist": Joint(1.592598203487462, 432.96500923932535, 274.613381336198, 100.0),
    "joint_gripper": Joint(-1.080652960128774, 468.0013365498738, 340.532560578637, 100.0),
    "joint_head_pan": Joint(-0.00285961, 2000.0, 900.0, 100.0),
    "joint_head_tilt": Joint(0.7851361, 2000.0, 900.0, 100.0),
}
FINGERS = {
    "joint_finger_right": Joint(0.0, 200.0, 8.0, 60.0),
    "joint_finger_left": Joint(0.0, 200.0, 8.0, 60.0),
}
# kg m², not SIMPLER's. A finger has 2e-4 kg m² about its joint, and the damping of its drive acts
# like 1.6e-2 in a substep. PhysX 5 solves contacts with the bare inertia, so that closed fingers
# rattled and slid off each other by 0.2 rad. With this they rest as in the original.
FINGER_ARMATURE = 0.02
# A gripping finger stands still, but PhysX 4 reports 0.1 to 0.3 rad/s for it in the original's
# traces. SIMPLER's next path starts from that, and its speed target keeps the grip. PhysX 5 reports
# 0, with which the grip would let go at the start of every control step. The lighter the thing, the
# more: with a coke can of 40 g it is 0.8 to 3 rad/s, cut to the path's limit.
GRIP_SPEED, LIGHT_GRIP_SPEED = 0.17, 1.0  # 0.2 kg or more; 0.06 kg or less
HELD_LAG = 0.05  # rad behind the last drive target; a free finger is within 0.002
TOUCHING = 1.05  # rad; beyond it the fingers meet each other, where PhysX 4 reports no speed either
FINGER_LIMIT = 1.3  # rad, the joints' upper limit; opening 0
FINGER_LINKS = {
    side: tuple(f"link_finger_{part}{side}" for part in ("", "tip_", "nail_"))
    for side in ("right", "left")
}

# Link -> ((static friction, dynamic friction, restitution), patch radius in m).
MATERIALS = {
    "link_base": ((0.1, 0.0, 0.0), 0.1),
    **{
        link: ((0.1, 0.1, 0.0), 0.01) if "nail" in link else ((2.0, 2.0, 0.0), 0.1)
        for links in FINGER_LINKS.values()
        for link in links
    },
}


@dataclass(frozen=True)
class Drives:
    """Drive targets by substep, in the order of ARM and FINGERS: rad; rad/s for finger speeds."""

    arm: Float[np.ndarray, "N 9"]
    fingers: Float[np.ndarray, "N 2"]
    finger_speed: Float[np.ndarray, "N 2"]


class GoogleRobot(Arm):
    """The robot in a scene. Poses are in its base frame unless a name says world."""

    def __init__(
        self,
        scene: sapien.Scene,
        urdf: Path,
        base: sapien.Pose,
        head: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """`head` is added to the head's pan and tilt at the start (rad)."""
        arm = dict(ARM)
        for name, more in zip(HEAD, head, strict=True):
            arm[name] = replace(arm[name], start=arm[name].start + more)
        super().__init__(scene, urdf, base, arm, FINGERS, MATERIALS, TOOL, several_hulls=True)
        for name in FINGERS:
            self.joints[name].set_armature(np.array([FINGER_ARMATURE], np.float32))
        # With one velocity iteration, as elsewhere, PhysX 5 reports speeds of 10 rad/s for fingers
        # that rest on each other, and the fingers' next path starts from their speed.
        self.body.set_solver_velocity_iterations(0)
        self._arm_path = JerkLimited(len(ARM), velocity=1.5, acceleration=2.0, jerk=50.0)
        self._arm_path.reset(self.arm_angles)
        self.arm_drive = self.arm_angles  # last targets (rad), before the limits
        self._finger_path = JerkLimited(len(FINGERS), velocity=1.0, acceleration=7.0, jerk=50.0)
        self.finger_drive = self.finger_angles
        self._opening = np.zeros(len(FINGERS), bool)  # whether the last path ended so
        self.grip_speed = GRIP_SPEED  # rad/s, by the weight of what is there to grip
        self._times = np.arange(1, SUBSTEPS + 1) / PHYSICS_HZ

    def opening(self) -> float:
        """Gripper opening in [0, 1]: 1 - mean finger angle / limit; 0.17 when closed on nothing."""
        return float(np.clip(1.0 - self.finger_angles.mean() / FINGER_LIMIT, 0.0, 1.0))

    def plan(
        self,
        position: Float[np.ndarray, "3"],
        quaternion: Float[np.ndarray, "4"],
        finger_goal: Float[np.ndarray, "2"],
    ) -> tuple[Drives, bool]:
        """Drive targets of the next SUBSTEPS substeps, and whether the pose could be reached."""
        goal = self.inverse_kinematics(position, quaternion)
        arm, _ = self._arm_path.plan(self.arm_angles if goal is None else goal, self._times)
        self.arm_drive = arm[-1]
        # The arm goes on from where its last path was cut; the fingers from where they are.
        self._finger_path.reset(self.finger_angles, self._finger_speed())
        fingers, finger_speed = self._finger_path.plan(finger_goal, self._times)
        self.finger_drive, self._opening = fingers[-1], finger_speed[-1] < 0
        # PhysX 4 drives towards no angle beyond a joint's limit, PhysX 5 does.
        of_arm, of_fingers = self.limits()
        arm = np.clip(arm, *of_arm.T)
        fingers = np.clip(fingers, *of_fingers.T)
        return Drives(arm, fingers, finger_speed), goal is not None

    def _finger_speed(self) -> Float[np.ndarray, "2"]:
        """What the fingers' next path starts with (rad/s): the sensed speed, or GRIP_SPEED for a
        finger that something holds up on its way. One that was told to open starts from rest, or
        what it holds would never be let go."""
        speed, angles = (
            np.asarray(self.body.get_qvel(), np.float64)[self._fingers],
            self.finger_angles,
        )
        held = (self.finger_drive - angles > HELD_LAG) & (angles.mean() < TOUCHING)
        held &= ~self._opening
        return np.where(held, np.maximum(speed, self.grip_speed), speed)

    def drive(self, drives: Drives, n: int) -> None:
        """Sets the drive targets of substep n."""
        for name, angle in zip(ARM, drives.arm[n].tolist(), strict=True):
            self.joints[name].set_drive_target(angle)
        fingers = drives.fingers[n].tolist(), drives.finger_speed[n].tolist()
        for name, angle, speed in zip(FINGERS, *fingers, strict=True):
            self.joints[name].set_drive_target(angle)
            self.joints[name].set_drive_velocity_target(speed)
