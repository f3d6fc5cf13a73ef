"""Made-up episodes in the exact schema of RT-1's data set, for tests and dry runs.

A gripper-like shape glides to a coloured object, closes and lifts it, in front of a grainy table:
256×320 JPEGs of about the size of real ones. Poses, actions, flags and instructions agree with one
another; embeddings are random but the same for the same text. There is nothing to learn from it.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import Float, UInt8

from selfflow.datasets.fractal import (
    CLOSE,
    CLOSED,
    IMAGE,
    INSTRUCTION,
    MOVE,
    POSE,
    SCHEMA,
    TERMINATE,
    TURN,
    XYZW,
)
from selfflow.datasets.instructions import rt1_families
from selfflow.datasets.rlds_writer import (
    NAME,
    VERSION,
    Features,
    begin,
    filled,
    finish,
    shard_paths,
    write_shard,
)
from selfflow.datasets.rotations import compose, from_rpy
from selfflow.datasets.tfrecord import encode_example

HEIGHT, WIDTH = SCHEMA[IMAGE].shape[:2]


def write_fractal(
    folder: Path, episodes: int = 4, steps: int = 12, shards: int = 1, seed: int = 0
) -> Path:
    """Writes `episodes` of `steps` steps each; returns folder/fractal20220817_data/0.1.0.

    Whole or not at all; the same arguments write the same bytes. Raises UserError if it exists.
    """
    if min(episodes, shards) < 1 or steps < 2 or shards > episodes:
        raise ValueError(f"{episodes} episodes of {steps} steps in {shards} shards")
    place = folder / NAME / VERSION
    draft, _ = begin(place, {"episodes": episodes, "steps": steps, "shards": shards, "seed": seed})
    parts = np.array_split(np.arange(episodes), shards)
    for part, path in zip(parts, shard_paths(draft, NAME, shards), strict=True):
        write_shard(path, (encode_example(episode([seed, int(i)], steps)) for i in part))
    about = "Made-up episodes; see selfflow.datasets.synthetic."
    finish(draft, place, NAME, SCHEMA, about)
    return place


def episode(seed: Sequence[int], steps: int) -> Features:
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
        "aspects/has_aspects": True,
        "aspects/success": True,
        "steps/is_first": np.arange(steps) == 0,
        "steps/is_last": last,
        "steps/is_terminal": last,
        "steps/reward": last.astype(np.float32),
        MOVE: np.diff(tool, axis=0, append=tool[-1:]),
        TURN: np.diff(yaw, append=yaw[-1:])[:, None] * np.eye(3)[2],
        CLOSE: (np.arange(steps) == grasp).astype(np.float32),
        TERMINATE: np.where(last[:, None], [1, 0, 0], [0, 1, 0]),
        POSE: np.column_stack([tool, turned[:, XYZW]]),
        CLOSED: closed,
        "steps/observation/natural_language_embedding": np.tile(use / np.linalg.norm(use), steps),
        INSTRUCTION: [text.encode()] * steps,
        IMAGE: _film(rng, tool, thing, closed),
    }
    return filled(known, SCHEMA, steps)


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
