"""The twin drawn closer to SIMPLER: the Google robot's original meshes, and the real photograph.

Both are seen only: kinematics, masses, collision and control stay the primitives'. Needs SIMPLER's
data files (envs/simpler_assets.py), which are read with trimesh once and cached.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

import hashlib
import os
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float, UInt8

from selfflow.datasets.rotations import compose, from_axis_angle, inverse, rotate
from selfflow.datasets.spec import Task, UserError
from selfflow.envs.backgrounds import nearest_photo
from selfflow.envs.simpler_assets import AssetMissing, photo, robot_urdf
from selfflow.envs.tasks import TABLE_TASKS, photographs
from selfflow.envs.twin_body import FINGER_TRAVEL, VISUAL
from selfflow.envs.twin_render import Renderer
from selfflow.envs.twin_room import add_material

ROBOTS = ("primitives", "google_mesh")
COLOURS = "recolor_cabinet_visual_matching_1"  # of the robot, as eval/ asks of SIMPLER by default
PREFIX = "google_"  # of the names of what is added
TEXTURE_SIDE = 1024  # px; the originals have up to 2048
CLOSED = 1.08  # rad, a finger's angle when both close on nothing; 0 is open
FINGERS = ("finger_right", "finger_left")


@dataclass(frozen=True)
class Pose:
    """Position (m) and quaternion wxyz in the parent's frame."""

    p: np.ndarray
    q: np.ndarray

    def __mul__(self, other: "Pose") -> "Pose":
        return Pose(self.p + rotate(self.q, other.p), compose(self.q, other.q))

    def inverse(self) -> "Pose":
        q = inverse(self.q)
        return Pose(-rotate(q, self.p), q)


HERE = Pose(np.zeros(3), np.array([1.0, 0, 0, 0]))


@dataclass(frozen=True)
class Link:
    """A URDF link: its joint, the joint's frame in the parent link, axis, and visual meshes."""

    parent: str | None
    joint: str | None
    moves: bool
    origin: Pose
    axis: np.ndarray
    visuals: tuple[tuple[str, Pose], ...]  # file, its pose in the link


@dataclass(frozen=True)
class Part:
    """A mesh of one material: m, 0 .. 1 (first row of the picture at v = 0), RGB."""

    vertices: np.ndarray  # (V, 3)
    faces: np.ndarray  # (F, 3)
    uv: np.ndarray  # (V, 2)
    texture: np.ndarray  # (H, W, 3) uint8


# --- the description ------------------------------------------------------------------------------


def read_urdf(path: Path) -> dict[str, Link]:
    """The links by name."""
    tree = ET.parse(path).getroot()
    joints = {j.find("child").attrib["link"]: j for j in tree.findall("joint")}  # type: ignore[union-attr]
    links = {}
    for element in tree.findall("link"):
        visuals = tuple(
            (mesh.attrib["filename"], _origin(visual))
            for visual in element.findall("visual")
            for mesh in visual.iter("mesh")
        )
        joint = joints.get(element.attrib["name"])
        if joint is None:
            link = Link(None, None, False, HERE, np.zeros(3), visuals)
        else:
            axis = joint.find("axis")
            link = Link(
                joint.find("parent").attrib["link"],  # type: ignore[union-attr]
                joint.attrib["name"],
                joint.attrib["type"] == "revolute",
                _origin(joint),
                _numbers("0 0 0" if axis is None else axis.attrib["xyz"]),
                visuals,
            )
        links[element.attrib["name"]] = link
    return links


def _origin(element: ET.Element) -> Pose:
    found = element.find("origin")
    if found is None:
        return HERE
    roll, pitch, yaw = _numbers(found.get("rpy", "0 0 0"))
    q = compose(from_axis_angle([0, 0, yaw]), from_axis_angle([0, pitch, 0]))
    return Pose(_numbers(found.get("xyz", "0 0 0")), compose(q, from_axis_angle([roll, 0, 0])))


def _numbers(text: str) -> np.ndarray:
    return np.array([float(number) for number in text.split()])


def link_pose(links: dict[str, Link], name: str, angles: dict[str, float]) -> Pose:
    """A link's pose in the base's frame; angles (rad) by joint, 0 where not given."""
    link = links[name]
    if link.parent is None:
        return HERE
    turned = from_axis_angle(link.axis * angles.get(link.joint or "", 0.0))
    return link_pose(links, link.parent, angles) * link.origin * Pose(np.zeros(3), turned)


def carried_by(links: dict[str, Link], name: str, bodies: set[str]) -> tuple[str, Pose]:
    """The twin's body that carries a link, with the link's pose in it. Fingers are the gripper's,
    at angle 0."""
    link = links[name]
    if link.parent is None:
        return "base", HERE
    body = (link.joint or "").removeprefix("joint_")
    if link.moves and body in bodies and body not in FINGERS:
        return body, HERE
    carrier, pose = carried_by(links, link.parent, bodies)
    return carrier, pose * link.origin


# --- meshes ---------------------------------------------------------------------------------------


def parts_of(path: Path) -> list[Part]:
    """A mesh file's parts; from the cache where they are there. Raises UserError."""
    cached = _cached(path)
    if not cached.is_file():
        parts = _convert(path)
        cached.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{n}_{k}": v for n, part in enumerate(parts) for k, v in vars(part).items()}
        draft = cached.with_suffix(f".{os.getpid()}.tmp")
        with open(draft, "wb") as f:
            np.savez_compressed(f, **arrays)
        os.replace(draft, cached)
        return parts
    with np.load(cached) as stored:
        return [
            Part(**{k: stored[f"{n}_{k}"] for k in Part.__dataclass_fields__})
            for n in range(len(stored.files) // len(Part.__dataclass_fields__))
        ]


def _cached(path: Path) -> Path:
    """Where a mesh file's parts are kept; another name where the file has changed."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {TEXTURE_SIDE}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = f"{path.stem}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    return root / "selfflow" / "meshes" / name


def _trimesh() -> Any:
    try:
        import trimesh
    except ModuleNotFoundError as e:
        raise UserError(
            "robot=google_mesh: trimesh is not installed; pip install 'selfflow[mesh]'"
        ) from e
    return trimesh


def _convert(path: Path) -> list[Part]:
    parts = []
    for mesh in _trimesh().load_scene(path).dump():
        uv = getattr(mesh.visual, "uv", None)
        uv = np.zeros((len(mesh.vertices), 2)) if uv is None else np.asarray(uv)
        parts.append(
            Part(
                np.asarray(mesh.vertices, np.float32),
                np.asarray(mesh.faces, np.int32),
                np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1).astype(np.float32),
                _texture(getattr(mesh.visual, "material", None)),
            )
        )
    return parts


def _texture(material: Any) -> UInt8[np.ndarray, "H W 3"]:
    """A material's picture, or a pixel of its colour."""
    picture = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    if picture is None:
        colour = getattr(material, "main_color", (180, 180, 180))
        return np.array(colour[:3], np.uint8).reshape(1, 1, 3)
    picture = picture.convert("RGB")
    picture.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE))
    return np.array(picture)


def check_meshes() -> None:
    """Raises UserError with the cure where `dress` could not: files, or trimesh, are missing."""
    urdf = robot_urdf(COLOURS)
    for link in read_urdf(urdf).values():
        for file, _ in link.visuals:
            if not (urdf.parent / file).is_file():
                raise AssetMissing(
                    f"robot=google_mesh: {urdf.parent / file} is missing; "
                    "run python envs/simpler_assets.py source=..."
                )
            if not _cached(urdf.parent / file).is_file():
                _trimesh()


def dress(spec: mujoco.MjSpec) -> None:
    """Hides the robot's primitives, puts the original meshes in their place. Raises UserError."""
    urdf = robot_urdf(COLOURS)
    links = read_urdf(urdf)
    base = spec.body("base")
    robot = {body.name for body in (base, *base.find_all(mujoco.mjtObj.mjOBJ_BODY))}
    for geom in base.find_all(mujoco.mjtObj.mjOBJ_GEOM):
        geom.rgba = (*geom.rgba[:3], 0)
    meshes: dict[str, list[tuple[str, str]]] = {}
    textures: set[str] = set()
    for name, link in links.items():
        body, place = carried_by(links, name, robot)
        for n, (file, origin) in enumerate(link.visuals):
            if file not in meshes:
                meshes[file] = _add_meshes(spec, urdf.parent / file, textures)
            pose = place * origin
            for k, (mesh, material) in enumerate(meshes[file]):
                spec.body(body).add_geom(
                    name=f"{PREFIX}{name}_{n}_{k}", type=mujoco.mjtGeom.mjGEOM_MESH, meshname=mesh,
                    material=material, pos=pose.p, quat=pose.q, **VISUAL,
                )  # fmt: skip


def _add_meshes(spec: mujoco.MjSpec, path: Path, textures: set[str]) -> list[tuple[str, str]]:
    """Adds a file's parts; the names of their meshes and materials."""
    names = []
    for n, part in enumerate(parts_of(path)):
        material = PREFIX + hashlib.sha256(part.texture.tobytes()).hexdigest()[:8]
        if material not in textures:
            textures.add(material)
            texture = spec.add_texture(
                name=material, type=mujoco.mjtTexture.mjTEXTURE_2D, nchannel=3,
                width=part.texture.shape[1], height=part.texture.shape[0],
            )  # fmt: skip
            texture.data = part.texture.tobytes()
            add_material(spec, material, material)
        mesh = f"{PREFIX}{path.parent.name}_{path.stem}_{n}"
        spec.add_mesh(
            name=mesh, uservert=part.vertices.ravel(), userface=part.faces.ravel(),
            usertexcoord=part.uv.ravel(), userfacetexcoord=part.faces.ravel(),
            inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL,
        )  # fmt: skip
        names.append((mesh, material))
    return names


# --- at picture time ------------------------------------------------------------------------------


class Fingers:
    """Turns the fingers' meshes about their hinges by how far the twin's fingers have slid.

    It edits the geoms' poses in the data alone, after kinematics, so that nothing but the picture
    depends on it.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        links = read_urdf(robot_urdf(COLOURS))
        self._gripper = model.body("gripper").id
        self._sides = []
        for finger in FINGERS:
            _, hinge = carried_by(links, f"link_{finger}", {"gripper"})
            side = finger.removeprefix("finger_")
            starts = tuple(f"{PREFIX}link_{part}{side}_" for part in ("finger_", *_MORE))
            geoms = [g for g in range(model.ngeom) if model.geom(g).name.startswith(starts)]
            local = [hinge.inverse() * Pose(model.geom_pos[g], model.geom_quat[g]) for g in geoms]
            joint = model.joint(finger).qposadr[0]
            self._sides.append((joint, hinge, list(zip(geoms, local, strict=True))))

    def turn(self, data: mujoco.MjData) -> None:
        """Before a picture."""
        hand = Pose(data.xpos[self._gripper], data.xquat[self._gripper])
        for joint, hinge, geoms in self._sides:
            angle = CLOSED * float(data.qpos[joint]) / FINGER_TRAVEL
            turned = hand * hinge * Pose(np.zeros(3), from_axis_angle([angle, 0, 0]))
            for geom, local in geoms:
                pose = turned * local
                data.geom_xpos[geom] = pose.p
                mujoco.mju_quat2Mat(data.geom_xmat[geom], pose.q)


_MORE = ("finger_tip_", "finger_nail_")


class Photo:
    """SIMPLER's photograph behind what is simulated: the robot, the cabinet with its drawers (but
    no table: it is in the photograph) and the things that move."""

    def __init__(self, model: mujoco.MjModel, task: Task, size: tuple[int, int]) -> None:
        self._task, self._size = task, size
        self._photos: dict[str, np.ndarray] = {}
        roots = [body for body in range(1, model.nbody) if model.body_rootid[body] == body]
        shown = [b for b in roots if model.body(b).name in ("base", "cabinet") or _free(model, b)]
        self._shown = np.isin(model.body_rootid[model.geom_bodyid], shown)

    def behind(
        self,
        picture: UInt8[np.ndarray, "H W 3"],
        renderer: Renderer,
        data: mujoco.MjData,
        camera: str,
    ) -> UInt8[np.ndarray, "H W 3"]:
        """The picture with the photograph that was taken nearest to the robot's place behind it."""
        x, y, _ = data.mocap_pos[0].tolist()
        share = renderer.share(data, camera, self._shown)[..., None]
        mixed = share * picture + (1 - share) * self._photo(nearest_photo(x, y))
        return mixed.round().astype(np.uint8)

    def _photo(self, view: str) -> Float[np.ndarray, "H W 3"]:
        from PIL import Image

        if view not in self._photos:
            with Image.open(photo_file(self._task, view)) as image:
                size = self._size[1], self._size[0]
                small = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            self._photos[view] = np.asarray(small, np.float64)
        return self._photos[view]


def photo_file(task: Task, view: str = "b0") -> Path:
    """A task's photograph, of the drawers' from a pose of DRAWER_POSES. Raises UserError."""
    return photo(photographs(task)[0] if task.name in TABLE_TASKS else f"open_drawer_{view}")


def _free(model: mujoco.MjModel, body: int) -> bool:
    joint = model.body_jntadr[body]
    return bool(joint >= 0 and model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE)
