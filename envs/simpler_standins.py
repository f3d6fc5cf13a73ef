"""Stand-ins for meshes that a clone of SIMPLER's assets may lack (docs/simpler.md), as glb files.

The files begin with a mark, so that nobody takes one for the original: `is_standin`. In visual
matching the photograph covers the rooms, and only their collision counts.
"""

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt32

MARK = "selfflow stand-in"
_HEADER, _CHUNK = struct.Struct("<4sII"), struct.Struct("<II")
_JSON, _BINARY = 0x4E4F534A, 0x004E4942  # chunk types of glTF 2.0
_FLOAT, _UINT = 5126, 5125  # component types
_BOX = np.array(
    [[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], np.float64
)
_BOX_FACES = np.array(
    [
        *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]),
        *([2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
    ],
    np.uint32,
)
# Boxes (smallest and largest corner in m, colour) in a room's own frame: y up, moved as SIMPLER
# places that room. The table of the Google robot has its top at 0.882, WidowX's at 0.8695.
Boxes = tuple[tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]], ...]
_GOOGLE_ROOM: Boxes = (
    ((-2.2716, 0.017, 2.5162), (-1.6416, 0.882, 3.1312), (0.66, 0.47, 0.31)),
    ((-5.6616, -0.017, -0.9663), (2.3384, 0.017, 7.0337), (0.27, 0.18, 0.13)),
)
_BRIDGE_ROOM: Boxes = (
    ((-2.7634, 0.8, 2.2313), (-1.8134, 0.8695, 3.4313), (0.55, 0.31, 0.20)),
    ((-6.0634, -0.02, -1.1687), (1.9366, 0.0, 6.8313), (0.35, 0.35, 0.35)),
)
_ROOMS = {
    "google_pick_coke_can_1_v4": _GOOGLE_ROOM,
    "bridge_table_1_v1": _BRIDGE_ROOM,
    "bridge_table_1_v2": _BRIDGE_ROOM,
}
_MODELS = "data/custom/models"
_PURPLE = (0.28, 0.13, 0.33)


def build(name: str, source: Path) -> bytes | None:
    """The stand-in for the file of that path below the asset root, made from what the clone at
    `source` holds; None where that holds nothing to make it from, or no stand-in is known."""
    room = _ROOMS.get(Path(name).stem)
    if room:
        return glb(
            [(_BOX * np.subtract(b, a) + np.add(a, b) / 2, _BOX_FACES, c) for a, b, c in room]
        )
    if name == f"{_MODELS}/eggplant/textured.glb":
        shape = source / _MODELS / "eggplant" / "collision.obj"
        return glb([(*read_obj(shape), _PURPLE)]) if shape.is_file() else None
    if name == f"{_MODELS}/blue_plastic_bottle/textured.glb":
        baked = source / _MODELS / "baked_blue_plastic_bottle_v2" / "textured.glb"
        return scaled(baked.read_bytes()) if baked.is_file() else None
    if name == f"{_MODELS}/baked_opened_redbull_can_v2/textured.glb":
        models = source / _MODELS
        other = sorted(models.glob("baked_opened_redbull_can_v2*alt*/textured.glb"))
        return scaled(other[0].read_bytes(), along_y=0.8956) if other else None
    return None


def is_standin(path: Path) -> bool:
    """Whether the file was built here."""
    with open(path, "rb") as f:
        return MARK.encode() in f.read(256)


def glb(parts: list[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]) -> bytes:
    """A binary glTF of plainly coloured meshes: vertices (n, 3) in m, triangles (m, 3), RGB."""
    data, views, accessors = b"", [], []

    def add(array: np.ndarray, component: int, kind: str, bounds: dict[str, Any]) -> int:
        nonlocal data
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": array.nbytes})
        count = array.size if kind == "SCALAR" else len(array)
        view = {"bufferView": len(views) - 1, "componentType": component}
        accessors.append(view | {"count": count, "type": kind} | bounds)
        data += array.tobytes()
        return len(accessors) - 1

    meshes, materials = [], []
    for vertices, triangles, colour in parts:
        points = np.asarray(vertices, "<f4")
        bounds = {"min": points.min(0).tolist(), "max": points.max(0).tolist()}
        position = add(points, _FLOAT, "VEC3", bounds)
        indices = add(np.asarray(triangles, "<u4"), _UINT, "SCALAR", {})
        shape = {"attributes": {"POSITION": position}, "indices": indices}
        meshes.append({"primitives": [shape | {"material": len(materials)}]})
        surface = {"baseColorFactor": [*colour, 1.0], "roughnessFactor": 0.9, "metallicFactor": 0.0}
        materials.append({"pbrMetallicRoughness": surface})
    nodes = [{"mesh": i} for i in range(len(meshes))]
    content = {
        "asset": {"generator": MARK, "version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": nodes,
        "meshes": meshes,
        "materials": materials,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(data)}],
    }
    return _pack(content, data)


def scaled(original: bytes, along_y: float = 1.0) -> bytes:
    """The binary glTF, marked, each root node stretched along its y axis and its box centred there.
    Raises ValueError if it is not one."""
    content, data = _unpack(original)
    accessors = [content["accessors"][i] for i in _positions(content)]
    middle = (min(a["min"][1] for a in accessors) + max(a["max"][1] for a in accessors)) / 2
    shift = 0.0 if along_y == 1.0 else -along_y * middle
    matrix = [1.0, 0, 0, 0, 0, along_y, 0, 0, 0, 0, 1.0, 0, 0, shift, 0, 1.0]
    scene = content["scenes"][content.get("scene", 0)]
    content["nodes"].append({"matrix": matrix, "children": scene["nodes"]})
    scene["nodes"] = [len(content["nodes"]) - 1]
    asset = {"generator": MARK, "version": content["asset"]["version"]}
    return _pack({"asset": asset} | {k: v for k, v in content.items() if k != "asset"}, data)


def read_obj(path: Path) -> tuple[Float[np.ndarray, "n 3"], UInt32[np.ndarray, "m 3"]]:
    """Vertices and triangles of a Wavefront file; faces of more corners become fans."""
    vertices, triangles = [], []
    for line in path.read_text().splitlines():
        key, *words = line.split() or [""]
        if key == "v":
            vertices.append([float(word) for word in words[:3]])
        elif key == "f":
            first, *rest = (int(word.split("/")[0]) - 1 for word in words)
            triangles += [[first, *edge] for edge in pairwise(rest)]
    return np.array(vertices), np.array(triangles, np.uint32)


def _positions(content: dict[str, Any]) -> list[int]:
    return [p["attributes"]["POSITION"] for mesh in content["meshes"] for p in mesh["primitives"]]


def _pack(content: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    data += b"\0" * (-len(data) % 4)
    total = _HEADER.size + 2 * _CHUNK.size + len(text) + len(data)
    head = _HEADER.pack(b"glTF", 2, total) + _CHUNK.pack(len(text), _JSON)
    return head + text + _CHUNK.pack(len(data), _BINARY) + data


def _unpack(file: bytes) -> tuple[dict[str, Any], bytes]:
    if file[:4] != b"glTF":
        raise ValueError("not a binary glTF")
    length, _ = _CHUNK.unpack_from(file, _HEADER.size)
    start = _HEADER.size + _CHUNK.size
    binary = start + length + _CHUNK.size
    return json.loads(file[start : start + length]), file[binary:]
