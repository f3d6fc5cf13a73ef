"""Made-up episodes in the exact schema of RT-1's data set, for tests and dry runs.

A gripper-like shape glides to a coloured object, closes and lifts it, in front of a grainy table:
256×320 JPEGs of about the size of real ones. Poses, actions, flags and instructions agree with one
another; embeddings are random but the same for the same text. There is nothing to learn from it.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Float, UInt8

from selfflow.datasets.instructions import rt1_families
from selfflow.datasets.rotations import compose, from_rpy
from selfflow.datasets.spec import UserError
from selfflow.datasets.tfrecord import encode_example, write_records

NAME, VERSION = "fractal20220817_data", "0.1.0"
HEIGHT, WIDTH = 256, 320
XYZW = [1, 2, 3, 0]  # of wxyz

# A leaf is "text", "image", or a dtype with a shape; () is a scalar.
TEXT, IMAGE = "text", "image"
BOOL, INT, FLOAT = ("bool", ()), ("int64", ()), ("float32", ())
_ATTRIBUTES = ["collection_mode", "data_type", "env", "location", "objects_family", "task_family"]
_ASPECTS = ["already_success", "feasible", "has_aspects", "success", "undesirable"]
EPISODE = {
    "aspects": dict.fromkeys(_ASPECTS, BOOL),
    "attributes": dict.fromkeys(_ATTRIBUTES, INT)
    | dict.fromkeys([f"{name}_name" for name in _ATTRIBUTES], TEXT),
}
STEPS = {
    "action": {
        "base_displacement_vector": ("float32", (2,)),
        "base_displacement_vertical_rotation": ("float32", (1,)),
        "gripper_closedness_action": ("float32", (1,)),
        "rotation_delta": ("float32", (3,)),
        "terminate_episode": ("int32", (3,)),
        "world_vector": ("float32", (3,)),
    },
    "is_first": BOOL,
    "is_last": BOOL,
    "is_terminal": BOOL,
    "observation": {
        "base_pose_tool_reached": ("float32", (7,)),
        "gripper_closed": ("float32", (1,)),
        "gripper_closedness_commanded": ("float32", (1,)),
        "height_to_bottom": ("float32", (1,)),
        "image": IMAGE,
        "natural_language_embedding": ("float32", (512,)),
        "natural_language_instruction": TEXT,
        "orientation_box": ("float32", (2, 3)),
        "orientation_start": ("float32", (4,)),
        "robot_orientation_positions_box": ("float32", (3, 3)),
        "rotation_delta_to_go": ("float32", (3,)),
        "src_rotation": ("float32", (4,)),
        "vector_to_go": ("float32", (3,)),
        "workspace_bounds": ("float32", (3, 3)),
    },
    "reward": FLOAT,
}
_CLASS = "tensorflow_datasets.core.features"


def write_fractal(
    folder: Path, episodes: int = 4, steps: int = 12, shards: int = 1, seed: int = 0
) -> Path:
    """Writes `episodes` of `steps` steps each; returns folder/fractal20220817_data/0.1.0.

    Whole or not at all; the same arguments write the same bytes. Raises UserError if it exists.
    """
    if min(episodes, shards) < 1 or steps < 2 or shards > episodes:
        raise ValueError(f"{episodes} episodes of {steps} steps in {shards} shards")
    place = folder / NAME / VERSION
    if place.exists():
        raise UserError(f"{place}: already there; give another folder, or remove it")
    draft = place.with_name(f".{VERSION}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    parts = np.array_split(np.arange(episodes), shards)
    for n, part in enumerate(parts):
        path = draft / f"{NAME}-train.tfrecord-{n:05d}-of-{shards:05d}"
        write_records(path, (encode_example(episode([seed, int(i)], steps)) for i in part))
    size = sum(path.stat().st_size for path in draft.iterdir())
    (draft / "dataset_info.json").write_text(json.dumps(_info([len(p) for p in parts], size)))
    (draft / "features.json").write_text(json.dumps(features(), indent=4))
    os.replace(draft, place)
    return place


def features() -> dict[str, Any]:
    """The schema as TFDS writes it into features.json."""
    steps = {"feature": _described(STEPS), "length": "-1"}
    whole = _described(EPISODE)
    whole["featuresDict"]["features"]["steps"] = _entry("dataset_feature.Dataset", sequence=steps)
    return whole


def episode(seed: Sequence[int], steps: int) -> dict[str, list[bytes] | np.ndarray]:
    """All features of one episode by wire name, those that mean nothing here as zeros."""
    rng = np.random.default_rng(seed)
    families = rt1_families()
    text = families[rng.integers(len(families))]
    grasp = max(1, round(0.6 * steps)) - 1  # the step whose action closes the gripper
    tool, thing, yaw = _paths(rng, steps, grasp)
    last = np.arange(steps) == steps - 1
    closed = (np.arange(steps) > grasp).astype(np.float32)
    start = from_rpy(np.array([np.pi / 2, 0.3, 0.0]))
    turned = compose(from_rpy(np.stack([0 * yaw, 0 * yaw, yaw], 1)), start)
    use = np.random.default_rng(zlib.crc32(text.encode())).normal(size=512)
    known = {
        "aspects/success": np.ones(1, np.int64),
        "steps/is_first": np.arange(steps) == 0,
        "steps/is_last": last,
        "steps/is_terminal": last,
        "steps/reward": last.astype(np.float32),
        "steps/action/world_vector": np.diff(tool, axis=0, append=tool[-1:]),
        "steps/action/rotation_delta": np.diff(yaw, append=yaw[-1:])[:, None] * np.eye(3)[2],
        "steps/action/gripper_closedness_action": (np.arange(steps) == grasp).astype(np.float32),
        "steps/action/terminate_episode": np.where(last[:, None], [1, 0, 0], [0, 1, 0]),
        "steps/observation/base_pose_tool_reached": np.column_stack([tool, turned[:, XYZW]]),
        "steps/observation/gripper_closed": closed,
        "steps/observation/natural_language_embedding": np.tile(use / np.linalg.norm(use), steps),
        "steps/observation/natural_language_instruction": [text.encode()] * steps,
        "steps/observation/image": _film(rng, tool, thing, closed),
    }
    values = {key: v if isinstance(v, list) else v.ravel() for key, v in known.items()}
    return {
        **{key: _zeros(leaf, 1) for key, leaf in _leaves(EPISODE)},
        **{key: _zeros(leaf, steps) for key, leaf in _leaves({"steps": STEPS})},
        **values,
    }


def _paths(
    rng: np.random.Generator, steps: int, grasp: int
) -> tuple[Float[np.ndarray, "T 3"], Float[np.ndarray, "T 3"], Float[np.ndarray, "T"]]:
    """Positions of tool and object (m, base frame) and the tool's yaw (rad), all smooth."""
    start = np.array([0.45, -0.05, 1.0]) + rng.uniform(-0.05, 0.05, 3)
    goal = np.array([0.65, 0.0, 0.65]) + rng.uniform(-0.15, 0.15, 3) * [1, 1, 0.3]
    there = _ease(np.arange(steps) / max(grasp, 1))[:, None]
    lifted = _ease((np.arange(steps) - grasp - 1) / max(steps - grasp - 2, 1))[:, None]
    rise = np.array([0, 0, 0.2]) * lifted
    yaw = rng.uniform(-0.8, 0.8) * _ease(np.arange(steps) / (steps - 1))
    return start + (goal - start) * there + rise, goal + rise, yaw


def _ease(x: np.ndarray) -> np.ndarray:
    """0 to 1 over x from 0 to 1, without a jerk at the ends."""
    x = x.clip(0, 1)
    return x**3 * (10 - 15 * x + 6 * x**2)


def _film(
    rng: np.random.Generator, tool: np.ndarray, thing: np.ndarray, closed: np.ndarray
) -> list[bytes]:
    """JPEGs of the gripper over the object; pixels lie along y (columns) and z (rows)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    light = np.interp(rows, (0, 110, 120, HEIGHT), (170, 150, 110, 140))
    room = light[..., None] * rng.uniform(0.5, 1.1, 3) + rng.normal(0, 2.2, (HEIGHT, WIDTH, 3))
    colour, film = rng.uniform(30, 255, 3), []
    for hand, at, grip in zip(tool, thing, closed, strict=True):
        frame: UInt8[np.ndarray, "256 320 3"] = room.clip(0, 255).astype(np.uint8)
        v, u = _pixel(at)
        frame[(rows - v) ** 2 / 1.5 + (columns - u) ** 2 < 15**2] = colour
        v, u = _pixel(hand)
        for side in (-1, 1):
            left = u + side * round(26 - 9 * grip) - 5
            frame[max(v - 34, 0) : max(v + 12, 0), max(left, 0) : max(left + 10, 0)] = 40
        frame[max(v - 60, 0) : max(v - 34, 0), max(u - 32, 0) : max(u + 32, 0)] = 70
        film.append(simplejpeg.encode_jpeg(frame, quality=95))
    return film


def _pixel(position: np.ndarray) -> tuple[int, int]:
    return round(256 * (1.35 - position[2])), round(160 - 400 * position[1])


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{before}{key}/")
        else:
            yield before + key, node


def _zeros(leaf: Any, count: int) -> list[bytes] | np.ndarray:
    if leaf in (TEXT, IMAGE):
        return [b""] * count
    dtype, shape = leaf
    return np.zeros(count * int(np.prod(shape)), np.float32 if dtype == "float32" else np.int64)


def _described(node: Any) -> dict[str, Any]:
    """A node of the schema in TFDS's words."""
    if isinstance(node, Mapping):
        parts = {key: _described(child) for key, child in sorted(node.items())}
        return _entry("features_dict.FeaturesDict", featuresDict={"features": parts})
    if node == TEXT:
        return _entry("text_feature.Text", text={})
    if node == IMAGE:
        shape = {"dimensions": [str(HEIGHT), str(WIDTH), "3"]}
        image = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape}
        return _entry("image_feature.Image", image=image)
    dtype, shape = node
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    name = "tensor_feature.Tensor" if shape else "scalar.Scalar"
    return _entry(name, tensor={"dtype": dtype, "encoding": "none", "shape": dimensions})


def _entry(name: str, **content: Any) -> dict[str, Any]:
    return {"pythonClassName": f"{_CLASS}.{name}", **content}


def _info(lengths: list[int], size: int) -> dict[str, Any]:
    """dataset_info.json."""
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "numBytes": str(size),
        "shardLengths": [str(n) for n in lengths],
    }
    return {
        "description": "Made-up episodes; see selfflow.datasets.synthetic.",
        "fileFormat": "tfrecord",
        "name": NAME,
        "splits": [split],
        "version": VERSION,
    }
