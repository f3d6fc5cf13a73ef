"""MuJoCo's geoms as triangles, for viewers that are not MuJoCo's.

V vertices in the geom's own frame (metres), F triangles, counter-clockwise seen from outside.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import mujoco
import numpy as np
from jaxtyping import Float, Int

AROUND = 24  # vertices of a circle
ENDLESS = 8.0  # m, half a side of a plane without an end
FLAT = (mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_PLANE)
HIDDEN_GROUP = 3  # from here on MuJoCo's viewer shows nothing by default


@dataclass(frozen=True)
class Shape:
    """A visible geom."""

    geom: int
    name: str
    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    rgba: tuple[float, float, float, float]
    flat: bool  # edges are seen


def shapes(model: mujoco.MjModel) -> tuple[list[Shape], int]:
    """All visible geoms, and the number of those that are of a kind unknown here."""
    found, unknown = [], 0
    for geom in range(model.ngeom):
        rgba = colour(model, geom)
        if model.geom_group[geom] >= HIDDEN_GROUP or rgba[3] == 0:
            continue
        triangles = _triangles(model, geom)
        if triangles is None:
            unknown += 1
            continue
        name = f"{model.geom(geom).name or 'geom'}_{geom}"
        flat = int(model.geom_type[geom]) in FLAT
        found.append(Shape(geom, name, *triangles, rgba, flat))
    return found, unknown


def colour(model: mujoco.MjModel, geom: int) -> tuple[float, float, float, float]:
    """Red, green, blue, opacity in 0..1; a texture counts with its mean."""
    material = int(model.geom_matid[geom])
    if material < 0:
        r, g, b, a = map(float, model.geom_rgba[geom])
        return r, g, b, a
    rgba = model.mat_rgba[material].astype(float)
    texture = int(model.mat_texid[material][mujoco.mjtTextureRole.mjTEXROLE_RGB])
    if texture >= 0:
        height, width = model.tex_height[texture], model.tex_width[texture]
        channels, start = model.tex_nchannel[texture], model.tex_adr[texture]
        data = model.tex_data[start : start + height * width * channels].reshape(-1, channels)
        rgba[:3] *= data.mean(0)[:3] / 255  # one channel is grey
    r, g, b, a = map(float, rgba)
    return r, g, b, a


def poses(data: mujoco.MjData) -> Float[np.ndarray, "geoms 7"]:
    """Position and quaternion wxyz of every geom, world frame."""
    turns = np.empty((len(data.geom_xmat), 4))
    for turn, matrix in zip(turns, data.geom_xmat, strict=True):
        mujoco.mju_mat2Quat(turn, matrix)
    return np.concatenate([data.geom_xpos, turns], axis=1)


Triangles = tuple[Float[np.ndarray, "V 3"], Int[np.ndarray, "F 3"]]


def _triangles(model: mujoco.MjModel, geom: int) -> Triangles | None:
    kinds, size = mujoco.mjtGeom, model.geom_size[geom]
    match int(model.geom_type[geom]):
        case kinds.mjGEOM_BOX:
            return _box(size)
        case kinds.mjGEOM_PLANE:
            half = np.where(size[:2] > 0, size[:2], ENDLESS)
            corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
            return corners * [*half, 1.0], np.array([[0, 1, 2], [0, 2, 3]])
        case kinds.mjGEOM_SPHERE:
            return _ball(np.repeat(size[0], 3))
        case kinds.mjGEOM_ELLIPSOID:
            return _ball(size)
        case kinds.mjGEOM_CAPSULE:
            return _ball(np.repeat(size[0], 3), size[1])
        case kinds.mjGEOM_CYLINDER:
            outline = np.array([(0, -1), (1, -1), (1, 1), (0, 1.0)])
            return _turned(outline * size[:2])
        case kinds.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            v, f = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
            return (
                model.mesh_vert[v : v + model.mesh_vertnum[mesh]].astype(float),
                model.mesh_face[f : f + model.mesh_facenum[mesh]].astype(int),
            )
    return None


def _box(half: np.ndarray) -> Triangles:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * half
    sides = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    faces = [t for a, b, c, d in sides for t in ((a, b, c), (a, c, d))]
    return corners, np.array(faces)


def _ball(radii: np.ndarray, half_length: float = 0.0) -> Triangles:
    """An ellipsoid, or a capsule where its halves are `half_length` above and below the middle."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, AROUND // 2)  # an even number: none is zero
    vertices, faces = _turned(np.stack([np.cos(angles), np.sin(angles)], 1))
    above = np.sign(vertices[:, 2:]) * half_length
    return vertices * radii + above * [0, 0, 1], faces


def _turned(profile: Float[np.ndarray, "n 2"]) -> Triangles:
    """The surface of (radius, z) turned about z, from the lowest z up."""
    turns = np.linspace(0, 2 * np.pi, AROUND, endpoint=False)
    rings = [np.stack([r * np.cos(turns), r * np.sin(turns), np.full(AROUND, z)], 1)
             for r, z in profile]  # fmt: skip
    this = np.arange(AROUND)
    after = (this + 1) % AROUND
    faces = []
    for k in range(len(profile) - 1):
        low, high = k * AROUND, (k + 1) * AROUND
        faces.append(np.stack([low + this, low + after, high + after], 1))
        faces.append(np.stack([low + this, high + after, high + this], 1))
    return np.concatenate(rings), np.concatenate(faces)
