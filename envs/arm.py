"""What SIMPLER's robots share on SAPIEN 3: loading, drives, the tool's pose, inverse kinematics.

Joints are matched by name throughout: SAPIEN 3 orders them otherwise than SIMPLER's SAPIEN 2 did.
Legend: J arm joints, F fingers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sapien
from jaxtyping import Float

from selfflow.datasets.rotations import canonical
from selfflow.envs.simpler_assets import AssetMissing

# Link -> ((static friction, dynamic friction, restitution), patch radius in m).
Materials = Mapping[str, tuple[tuple[float, float, float], float]]


@dataclass(frozen=True)
class Joint:
    """Start and drive: rad, N m/rad, N m s/rad, N m; for prismatic joints m, N/m, N s/m, N."""

    start: float
    stiffness: float
    damping: float
    force: float


class Arm:
    """A robot in a scene. Poses are in its base frame unless a name says world."""

    def __init__(
        self,
        scene: sapien.Scene,
        urdf: Path,
        base: sapien.Pose,
        arm: Mapping[str, Joint],
        fingers: Mapping[str, Joint],
        materials: Materials,
        tool: str,
        several_hulls: bool,
    ) -> None:
        """`several_hulls`: a collision file holds a convex hull per object, not one in all."""
        loader = scene.create_urdf_loader()
        loader.fix_root_link = True
        loader.load_multiple_collisions_from_file = several_hulls
        for link, (material, patch) in materials.items():
            loader.set_link_material(link, *material)
            loader.set_link_patch_radius(link, patch)
            loader.set_link_min_patch_radius(link, patch)
        try:
            self.body = loader.load(str(urdf))
        except RuntimeError as e:
            raise AssetMissing(
                f"a mesh of {urdf.name} is missing in {urdf.parent} ({e}); "
                "run python envs/simpler_assets.py source=..."
            ) from e
        for link in self.body.links:
            link.disable_gravity = True  # stands for SIMPLER's gravity compensation
        self.joints = {j.name: j for j in self.body.active_joints}
        self.links = {link.name: link for link in self.body.links}
        order = list(self.joints)
        self._arm = [order.index(name) for name in arm]
        self._fingers = [order.index(name) for name in fingers]
        start = np.zeros(len(order))
        for name, joint in (*arm.items(), *fingers.items()):
            self.joints[name].set_drive_properties(
                joint.stiffness, joint.damping, joint.force, "force"
            )
            self.joints[name].set_friction(0.0)
            start[order.index(name)] = joint.start
        self.body.set_root_pose(base)
        self.body.set_qpos(start)
        self.body.set_qvel(np.zeros(len(order)))
        self._model: Any = self.body.create_pinocchio_model()  # type: ignore[call-arg]
        self._ik_mask = np.isin(np.arange(len(order)), self._arm).astype(np.int32)
        self.tool = self.links[tool]

    def opening(self) -> float:
        """Gripper opening in [0, 1]."""
        raise NotImplementedError

    @property
    def arm_angles(self) -> Float[np.ndarray, "J"]:
        """Sensed angles (rad) in the order of the arm's joints."""
        return np.asarray(self.body.get_qpos(), np.float64)[self._arm]

    @property
    def finger_angles(self) -> Float[np.ndarray, "F"]:
        """Sensed fingers (rad, or m where they slide)."""
        return np.asarray(self.body.get_qpos(), np.float64)[self._fingers]

    def limits(self) -> tuple[Float[np.ndarray, "J 2"], Float[np.ndarray, "F 2"]]:
        """Lower and upper limits of the arm's joints and of the fingers."""
        limits = np.asarray(self.body.get_qlimits(), np.float64)
        return limits[self._arm], limits[self._fingers]

    def tool_pose(self) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "4"]]:
        """Position and canonical quaternion wxyz of the tool link."""
        pose = self.body.get_root_pose().inv() * self.tool.entity_pose
        return np.asarray(pose.p, np.float64), canonical(np.asarray(pose.q, np.float64))

    def inverse_kinematics(
        self, position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"]
    ) -> Float[np.ndarray, "J"] | None:
        """Arm angles that put the tool there, from the present ones; None where none were found."""
        angles, found, _ = self._model.compute_inverse_kinematics(
            self.body.links.index(self.tool),
            sapien.Pose(position.tolist(), quaternion.tolist()),
            initial_qpos=np.asarray(self.body.get_qpos(), np.float64),
            active_qmask=self._ik_mask,
            max_iterations=100,
        )
        return np.asarray(angles, np.float64)[self._arm] if found else None
