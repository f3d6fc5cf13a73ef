"""SIMPLER's drawer scene on SAPIEN 3: cabinet, apple, light, camera and photograph.

World frame, metres; the numbers are SIMPLER's (docs/simpler.md). Scenes are built anew for every
episode, without which the same start does not give the same contacts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import sapien
from jaxtyping import Float, UInt8
from PIL import Image

from selfflow.envs.google_robot import BASE_HEIGHT, CAMERA, PHYSICS_HZ, GoogleRobot
from selfflow.envs.simpler_assets import asset, model_files, robot_urdf, station_urdf
from selfflow.envs.tasks import DRAWERS

CABINET = (-0.295, 0.0, 0.017)
FLOOR = 0.017
APPLE, APPLE_TABLE = "baked_apple_v2", "info_pick_custom_baked_tex_v1.json"
TABLE_HEIGHT = 0.87
DRAWER_FLOOR = 2  # index of the drawer floor among a drawer's collision shapes
TOUCH = 1e-6  # N s; a smaller contact impulse is none
CAMERA_POSE = sapien.Pose(q=[0.5, 0.5, -0.5, 0.5])  # on link_camera
FOCAL, IMAGE = 425.0, (512, 640)  # px at this (height, width)


def configure_physics() -> None:
    """SIMPLER's PhysX settings; they are global and apply to scenes made from now on."""
    physx = sapien.physx
    physx.set_scene_config(enable_pcm=False, enable_tgs=True)
    physx.set_body_config(solver_position_iterations=25, solver_velocity_iterations=1)
    physx.set_shape_config(contact_offset=0.02)
    physx.set_default_material(1.0, 1.0, 0.0)


class DrawerScene:
    """One episode's scene. `photo` covers all that is not robot, cabinet or apple."""

    def __init__(
        self,
        renderer: sapien.render.RenderSystem,
        base: tuple[float, float, float],
        apple: tuple[float, float] | None,
        openings: Sequence[float],
        urdf_version: str,
        size: tuple[int, int],
        photo: UInt8[np.ndarray, "H W 3"] | None,
    ) -> None:
        configure_physics()
        self.physics = sapien.physx.PhysxCpuSystem()
        self.physics.timestep = 1.0 / PHYSICS_HZ
        self.scene = sapien.Scene([self.physics, renderer])
        _add_light(self.scene)
        _add_floor(self.scene)
        self._load_cabinet(openings)
        self.apple = None if apple is None else self._drop_apple(apple)
        x, y, yaw = base
        # SIMPLER's robot faces -x: a turn of 180° about z before the yaw.
        turn = [-np.sin(yaw / 2), 0.0, 0.0, np.cos(yaw / 2)]
        self.robot = GoogleRobot(
            self.scene, robot_urdf(urdf_version), sapien.Pose([x, y, BASE_HEIGHT], turn)
        )
        self.camera = self._mount_camera(size)
        self._photo = photo
        shown = [link.entity for link in (*self.robot.body.links, *self.cabinet.links)]
        shown += [self.apple.entity] if self.apple else []
        self._shown = np.array([entity.per_scene_id for entity in shown])

    def _load_cabinet(self, openings: Sequence[float]) -> None:
        loader = self.scene.create_urdf_loader()
        loader.fix_root_link = True
        self.cabinet = loader.load(str(station_urdf()))
        self.cabinet.set_root_pose(sapien.Pose(CABINET))
        names = [joint.name for joint in self.cabinet.active_joints]
        self._drawer_order = [names.index(f"{drawer}_drawer_joint") for drawer in DRAWERS]
        start = np.zeros(len(names))
        start[self._drawer_order] = openings
        self.cabinet.set_qpos(start)
        for joint in self.cabinet.active_joints:
            joint.set_friction(0.05)
            joint.set_drive_properties(stiffness=0.0, damping=1.0)
        links = {link.name: link for link in self.cabinet.links}
        self._top_drawer = links["top_drawer"]

    def _drop_apple(self, xy: tuple[float, float]) -> sapien.physx.PhysxRigidDynamicComponent:
        """Drops the apple on the cabinet and lets it settle; the robot is not there yet."""
        visual, collision = model_files(APPLE)
        builder = self.scene.create_actor_builder()
        material = sapien.physx.PhysxMaterial(0.5, 0.5, 0.0)
        density = apple_density(asset("data", "custom", APPLE_TABLE))
        builder.add_multiple_convex_collisions_from_file(
            str(collision), material=material, density=density
        )
        builder.add_visual_from_file(str(visual))
        builder.set_initial_pose(sapien.Pose([*xy, TABLE_HEIGHT + 0.5]))
        entity = builder.build(name=APPLE)
        _light_up(entity)
        body = _component(entity, sapien.physx.PhysxRigidDynamicComponent)
        body.linear_damping = body.angular_damping = 0.1
        body.set_locked_motion_axes([False, False, False, True, True, False])
        self._wait(0.5)
        body.set_locked_motion_axes([False] * 6)
        body.set_linear_velocity((0.0, 0.0, 0.0))
        body.set_angular_velocity((0.0, 0.0, 0.0))
        self._wait(0.5)
        speed, turning = np.linalg.norm(body.linear_velocity), np.linalg.norm(body.angular_velocity)
        if speed > 1e-3 or turning > 1e-2:
            self._wait(1.5)
        return body

    def _wait(self, seconds: float) -> None:
        for _ in range(int(PHYSICS_HZ * seconds)):
            self.scene.step()

    def _mount_camera(self, size: tuple[int, int]) -> sapien.render.RenderCameraComponent:
        (height, width), focal = size, FOCAL * size[1] / IMAGE[1]
        mount = self.robot.links[CAMERA].entity
        camera = self.scene.add_mounted_camera(
            "overhead_camera", mount, CAMERA_POSE, width, height, fovy=1.0, near=0.01, far=10.0
        )
        camera.set_perspective_parameters(0.01, 10.0, focal, focal, width / 2, height / 2, 0.0)
        return camera

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """The overhead camera's picture, with the photograph behind what is simulated."""
        self.scene.update_render()
        self.camera.take_picture()
        colour = self.camera.get_picture("Color")[..., :3]
        image = np.clip(colour * 255, 0, 255).astype(np.uint8)
        if self._photo is None:
            return image
        ids = self.camera.get_picture("Segmentation")[..., 1]
        return np.where(np.isin(ids, self._shown)[..., None], image, self._photo)

    def drawers(self) -> Float[np.ndarray, "3"]:
        """Openings of the top, middle and bottom drawer (m)."""
        return np.asarray(self.cabinet.get_qpos(), np.float64)[self._drawer_order]

    def impulse_on_apple(
        self, bodies: Sequence[object], shape: int | None = None
    ) -> Float[np.ndarray, "3"]:
        """Sum of the contact impulses (N s, world) that these bodies gave the apple in the last
        substep; of their collision shape of that index alone if one is given."""
        total = np.zeros(3)
        for contact in self.physics.get_contacts():
            a, b = contact.bodies
            if self.apple not in (a, b):
                continue
            other, part, sign = (b, 1, 1.0) if a == self.apple else (a, 0, -1.0)
            if other not in bodies:
                continue
            if shape is not None and contact.shapes[part] != other.collision_shapes[shape]:
                continue
            total += sign * np.sum([point.impulse for point in contact.points], axis=0)
        return total

    def apple_on_drawer_floor(self) -> bool:
        """Whether the apple touches the top drawer's floor."""
        if self.apple is None:
            return False
        return bool(np.linalg.norm(self.impulse_on_apple([self._top_drawer], DRAWER_FLOOR)) > TOUCH)


def apple_density(table: Path) -> float:
    """kg/m³ from SIMPLER's object table."""
    return float(json.loads(table.read_text())[APPLE]["density"])


def load_photo(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A photograph at the camera's (height, width), bilinear; values are cut, not rounded."""
    with Image.open(path) as image:
        channels = [
            np.asarray(channel.convert("F").resize((size[1], size[0]), Image.Resampling.BILINEAR))
            for channel in image.convert("RGB").split()
        ]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _add_light(scene: sapien.Scene) -> None:
    scene.set_ambient_light([1.0, 1.0, 1.0])
    elevation = np.deg2rad(75)
    scene.add_directional_light([-np.cos(elevation), 0.0, -np.sin(elevation)], [1.0, 1.0, 1.0])


def _add_floor(scene: sapien.Scene) -> None:
    half = (5.0, 5.0, 0.1)
    grey = sapien.render.RenderMaterial(base_color=[0.5, 0.5, 0.5, 1.0])
    builder = scene.create_actor_builder()
    builder.add_box_collision(half_size=half)
    builder.add_box_visual(half_size=half, material=grey)
    builder.set_initial_pose(sapien.Pose([0.0, 0.0, FLOOR - half[2]]))
    builder.build_static(name="floor")


def _light_up(entity: sapien.Entity) -> None:
    """Makes baked colours visible: they are in the emission texture, which SAPIEN 3 scales by 0."""
    for shape in _component(entity, sapien.render.RenderBodyComponent).render_shapes:
        for part in shape.parts:
            if part.material.emission_texture is not None:
                part.material.set_emission([1.0, 1.0, 1.0, 1.0])


Kind = TypeVar("Kind", bound=sapien.Component)


def _component(entity: sapien.Entity, kind: type[Kind]) -> Kind:
    found = entity.find_component_by_type(kind)
    if not isinstance(found, kind):
        raise TypeError(f"{entity.name} has no {kind.__name__}")
    return found
