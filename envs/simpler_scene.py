"""SIMPLER's scenes on SAPIEN 3: what all have in common, the Google robot's, and the drawers'.

World frame, metres; the numbers are SIMPLER's (docs/simpler.md). Scenes are built anew for every
episode, without which the same start does not give the same contacts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import sapien
from jaxtyping import Float, Int, UInt8
from PIL import Image

from selfflow.envs.arm import Arm
from selfflow.envs.cabinet_placements import DRAWERS
from selfflow.envs.google_robot import (
    BASE_HEIGHT,
    CAMERA,
    FINGER_LINKS,
    PHYSICS_HZ,
    GoogleRobot,
)
from selfflow.envs.simpler_assets import asset, model_files, robot_urdf, stage, station_urdf
from selfflow.envs.simpler_hulls import FLATTENED, flat_hull
from selfflow.envs.simpler_variants import MATCHED_CABINET, Light, Look, plain_density, room_pose

Body = sapien.physx.PhysxRigidDynamicComponent
Robot = TypeVar("Robot", bound=Arm)

CABINET = (-0.295, 0.0, 0.017)
FLOOR = 0.017
APPLE, OBJECT_TABLE = "baked_apple_v2", "info_pick_custom_baked_tex_v1.json"
TABLE_HEIGHT = 0.87
DROP = 0.5  # m above the table
DRAWER_FLOOR = 2  # index of the drawer floor among a drawer's collision shapes
TOUCH = 1e-6  # N s; a smaller contact impulse is none
GRASP_CONE = np.deg2rad(80)  # about the closing direction
CAMERA_POSE = sapien.Pose(q=[0.5, 0.5, -0.5, 0.5])  # on link_camera
FOCAL, IMAGE = 425.0, (512, 640)  # px at this (height, width)


def configure_physics(contact_offset: float = 0.02) -> None:
    """SIMPLER's PhysX settings; they are global and apply to scenes made from now on."""
    physx = sapien.physx
    physx.set_scene_config(enable_pcm=False, enable_tgs=True)
    physx.set_body_config(solver_position_iterations=25, solver_velocity_iterations=1)
    physx.set_shape_config(contact_offset=contact_offset)
    physx.set_default_material(1.0, 1.0, 0.0)


class SimplerScene(Generic[Robot]):
    """One episode's scene; subclasses add what the robot handles, then robot and camera.

    `photo` covers all that is not robot or handled, whose entities' ids are in `_shown`.
    """

    robot: Robot
    camera: sapien.render.RenderCameraComponent
    _shown: Int[np.ndarray, "n"]
    fingers: Mapping[str, Sequence[str]]  # links of the "right" and "left" finger, the first a tip

    def __init__(
        self,
        renderer: sapien.render.RenderSystem,
        photo: UInt8[np.ndarray, "H W 3"] | None,
        hz: int,
        contact_offset: float,
    ) -> None:
        configure_physics(contact_offset)
        self.physics = sapien.physx.PhysxCpuSystem()
        self._hz = hz
        self.physics.timestep = 1.0 / hz
        self.scene = sapien.Scene([self.physics, renderer])
        self._photo = photo

    def settle(self, bodies: Sequence[Body]) -> None:
        """Lets dropped objects come to rest, unable to tip at first; the robot is not there yet."""
        for body in bodies:
            held = body.entity.name in FLATTENED  # PhysX 5 would push it aside on its tilted face
            body.set_locked_motion_axes([held, held, False, True, True, held])
        self._wait(0.5)
        for body in bodies:
            self.release(body)
        self._wait(0.5)
        self.calm(bodies)

    def release(self, body: Body) -> None:
        """Lets a body that was held move, from rest."""
        body.set_locked_motion_axes([False] * 6)
        body.set_linear_velocity((0.0, 0.0, 0.0))
        body.set_angular_velocity((0.0, 0.0, 0.0))

    def calm(self, bodies: Sequence[Body]) -> None:
        """Waits longer where something still moves."""
        speed = sum(np.linalg.norm(body.linear_velocity) for body in bodies)
        turning = sum(np.linalg.norm(body.angular_velocity) for body in bodies)
        if speed > 1e-3 or turning > 1e-2:
            self._wait(1.5)

    def _wait(self, seconds: float) -> None:
        for _ in range(int(self._hz * seconds)):
            self.scene.step()

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """The camera's picture, with the photograph behind what is simulated."""
        self.scene.update_render()
        self.camera.take_picture()
        colour = self.camera.get_picture("Color")[..., :3]
        image = np.clip(colour * 255, 0, 255).astype(np.uint8)
        if self._photo is None:
            return image
        ids = self.camera.get_picture("Segmentation")[..., 1]
        return np.where(np.isin(ids, self._shown)[..., None], image, self._photo)

    def impulse_on(
        self, body: Body, others: Sequence[object], shape: int | None = None
    ) -> Float[np.ndarray, "3"]:
        """Sum of the contact impulses (N s, world) that others gave the body in the last substep;
        of their collision shape of that index alone if one is given."""
        total = np.zeros(3)
        for contact in self.physics.get_contacts():
            a, b = contact.bodies
            if body not in (a, b):
                continue
            other, part, sign = (b, 1, 1.0) if a == body else (a, 0, -1.0)
            if other not in others:
                continue
            if shape is not None and contact.shapes[part] != other.collision_shapes[shape]:
                continue
            total += sign * np.sum([point.impulse for point in contact.points], axis=0)
        return total

    def touches(self, body: Body, *ignored: Body) -> bool:
        """Whether anything but the robot and what is ignored touches the body."""
        fine = [*self.robot.body.links, *ignored]
        for contact in self.physics.get_contacts():
            if body in contact.bodies and not any(b in fine for b in contact.bodies):
                impulse = np.sum([point.impulse for point in contact.points], axis=0)
                if np.linalg.norm(impulse) > TOUCH:
                    return True
        return False

    def grasped(self, body: Body) -> bool:
        """Both fingers press on the body, each within 80° of the closing direction."""
        links = self.robot.links
        tips = {
            side: np.asarray(links[names[0]].entity_pose.p) for side, names in self.fingers.items()
        }
        closing = tips["left"] - tips["right"]
        closing /= np.linalg.norm(closing)
        for side, direction in (("right", closing), ("left", -closing)):
            push = self.impulse_on(body, [links[name] for name in self.fingers[side]])
            size = np.linalg.norm(push)
            if size <= TOUCH or push @ direction < np.cos(GRASP_CONE) * size:
                return False
        return True


class GoogleScene(SimplerScene[GoogleRobot]):
    """A scene with the Google robot."""

    fingers = {side: (names[1], names[0], names[2]) for side, names in FINGER_LINKS.items()}  # noqa: RUF012

    def __init__(
        self,
        renderer: sapien.render.RenderSystem,
        photo: UInt8[np.ndarray, "H W 3"] | None,
        contact_offset: float = 0.02,
    ) -> None:
        super().__init__(renderer, photo, PHYSICS_HZ, contact_offset)

    def add_robot(
        self,
        base: tuple[float, float, float],
        urdf_version: str,
        size: tuple[int, int],
        handled: Sequence[sapien.Entity],
        head: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Puts the robot at x, y, yaw, with its camera (height, width), before what it handles;
        `head` is added to the head's pan and tilt (rad)."""
        x, y, yaw = base
        # SIMPLER's robot faces -x: a turn of 180° about z before the yaw.
        turn = [-np.sin(yaw / 2), 0.0, 0.0, np.cos(yaw / 2)]
        self.robot = GoogleRobot(
            self.scene, robot_urdf(urdf_version), sapien.Pose([x, y, BASE_HEIGHT], turn), head
        )
        self.camera = self._mount_camera(size)
        shown = [*(link.entity for link in self.robot.body.links), *handled]
        self._shown = np.array([entity.per_scene_id for entity in shown])

    def shine(self) -> None:
        """Gives the robot the surface that SIMPLER takes from it in drawers' visual matching."""
        for link in self.robot.body.links:
            finish(link.entity, specular=0.9, roughness=0.3)

    def _mount_camera(self, size: tuple[int, int]) -> sapien.render.RenderCameraComponent:
        (height, width), focal = size, FOCAL * size[1] / IMAGE[1]
        mount = self.robot.links[CAMERA].entity
        camera = self.scene.add_mounted_camera(
            "overhead_camera", mount, CAMERA_POSE, width, height, fovy=1.0, near=0.01, far=10.0
        )
        camera.set_perspective_parameters(0.01, 10.0, focal, focal, width / 2, height / 2, 0.0)
        return camera

    def drop(
        self,
        name: str,
        xy: tuple[float, float],
        turn: Sequence[float] = (1.0, 0.0, 0.0, 0.0),
        density: float | None = None,
    ) -> Body:
        """An object above the table; kg/m³ from SIMPLER's object table unless given."""
        if density is None:
            density = object_density(asset("data", "custom", OBJECT_TABLE), name)
        pose = sapien.Pose([*xy, TABLE_HEIGHT + DROP], list(turn))
        return build_object(self.scene, name, pose, density)


class DrawerScene(GoogleScene):
    """The three-drawer cabinet, with the apple on it where a place for it is given.

    A room is only seen, as in the original; what falls stops on a floor that is not.
    """

    def __init__(
        self,
        renderer: sapien.render.RenderSystem,
        base: tuple[float, float, float],
        apple: tuple[float, float] | None,
        openings: Sequence[float],
        urdf_version: str,
        size: tuple[int, int],
        photo: UInt8[np.ndarray, "H W 3"] | None,
        look: Look = MATCHED_CABINET,
    ) -> None:
        super().__init__(renderer, photo)
        add_light(self.scene, look.light)
        _add_floor(self.scene, seen=look.room is None)
        if look.room:
            add_room(self.scene, look.room, solid=False)
        self._load_cabinet(look.cabinet, openings)
        self.apple = None
        if apple:
            model = look.model(APPLE)
            density = None if look.matched else plain_density(model)
            self.apple = self.drop(model, apple, density=density)
            self.settle([self.apple])
        handled = [link.entity for link in self.cabinet.links]
        handled += [self.apple.entity] if self.apple else []
        self.add_robot(base, urdf_version, size, handled, look.head)
        if not look.matched:
            self.shine()

    def _load_cabinet(self, name: str, openings: Sequence[float]) -> None:
        loader = self.scene.create_urdf_loader()
        loader.fix_root_link = True
        self.cabinet = loader.load(str(station_urdf(name)))
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

    def drawers(self) -> Float[np.ndarray, "3"]:
        """Openings of the top, middle and bottom drawer (m)."""
        return np.asarray(self.cabinet.get_qpos(), np.float64)[self._drawer_order]

    def apple_on_drawer_floor(self) -> bool:
        """Whether the apple touches the top drawer's floor."""
        if self.apple is None:
            return False
        push = self.impulse_on(self.apple, [self._top_drawer], DRAWER_FLOOR)
        return bool(np.linalg.norm(push) > TOUCH)


def build_object(scene: sapien.Scene, name: str, pose: sapien.Pose, density: float) -> Body:
    """One of SIMPLER's movable objects, free to move, of this density (kg/m³)."""
    visual, collision = model_files(name)
    builder = scene.create_actor_builder()
    if name not in FLATTENED:
        builder.add_multiple_convex_collisions_from_file(
            str(collision), material=sapien.physx.PhysxMaterial(0.5, 0.5, 0.0), density=density
        )
    builder.add_visual_from_file(str(visual))
    builder.set_initial_pose(pose)
    entity = builder.build(name=name)
    light_up(entity)
    body = component(entity, Body)
    if name in FLATTENED:
        body.attach(flat_hull(collision, density))
    body.linear_damping = body.angular_damping = 0.1
    return body


def object_density(table: Path, name: str) -> float:
    """kg/m³ from one of SIMPLER's object tables."""
    return float(json.loads(table.read_text())[name]["density"])


def load_photo(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A photograph at the camera's (height, width), bilinear; values are cut, not rounded."""
    with Image.open(path) as image:
        channels = [
            np.asarray(channel.convert("F").resize((size[1], size[0]), Image.Resampling.BILINEAR))
            for channel in image.convert("RGB").split()
        ]
    return np.stack(channels, axis=-1).astype(np.uint8)


def add_light(scene: sapien.Scene, light: Light) -> None:
    """A variant's light; shadows reach 5 m about the origin."""
    scene.set_ambient_light([light.ambient] * 3)
    for n, (direction, grey) in enumerate(light.beams):
        scene.add_directional_light(
            list(direction),
            [grey] * 3,
            shadow=light.shadow and n == 0,
            shadow_scale=5.0,
            shadow_map_size=2048,
        )


def add_room(scene: sapien.Scene, name: str, *, solid: bool) -> None:
    """A room where SIMPLER places it; `solid` if things lie on its table."""
    mesh = str(stage(name))
    builder = scene.create_actor_builder()
    if solid:
        builder.add_nonconvex_collision_from_file(mesh)
    builder.add_visual_from_file(mesh)
    position, turn = room_pose(name)
    builder.set_initial_pose(sapien.Pose(list(position), list(turn)))
    builder.build_static(name="arena")


def _add_floor(scene: sapien.Scene, seen: bool) -> None:
    half = (5.0, 5.0, 0.1)
    builder = scene.create_actor_builder()
    builder.add_box_collision(half_size=half)
    if seen:
        grey = sapien.render.RenderMaterial(base_color=[0.5, 0.5, 0.5, 1.0])
        builder.add_box_visual(half_size=half, material=grey)
    builder.set_initial_pose(sapien.Pose([0.0, 0.0, FLOOR - half[2]]))
    builder.build_static(name="floor")


def finish(
    entity: sapien.Entity, specular: float, roughness: float, metallic: float | None = None
) -> None:
    """Surface of everything drawn of an entity."""
    if entity.find_component_by_type(sapien.render.RenderBodyComponent) is None:
        return
    for shape in component(entity, sapien.render.RenderBodyComponent).render_shapes:
        for part in shape.parts:
            part.material.set_specular(specular)
            part.material.set_roughness(roughness)
            if metallic is not None:
                part.material.set_metallic(metallic)


def light_up(entity: sapien.Entity) -> None:
    """Makes baked colours visible: they are in the emission texture, which SAPIEN 3 scales by 0."""
    for shape in component(entity, sapien.render.RenderBodyComponent).render_shapes:
        for part in shape.parts:
            if part.material.emission_texture is not None:
                part.material.set_emission([1.0, 1.0, 1.0, 1.0])


Kind = TypeVar("Kind", bound=sapien.Component)


def component(entity: sapien.Entity, kind: type[Kind]) -> Kind:
    found = entity.find_component_by_type(kind)
    if not isinstance(found, kind):
        raise TypeError(f"{entity.name} has no {kind.__name__}")
    return found
