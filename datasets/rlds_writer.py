"""Episodes as an RLDS dataset, in the schema of RT-1's `fractal20220817_data` (fractal.py).

OUT/NAME/0.1.0/{dataset_info.json, features.json, NAME-train.tfrecord-00000-of-00012, ...}, which
TFDS reads with `builder_from_directory`. Shards are written one by one into a hidden folder beside
it, which takes the right name when all is there; writing again goes on behind the last whole shard.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image
from rich.progress import Progress

from selfflow.datasets.blob import QUALITY, mapped
from selfflow.datasets.episodes import DatasetSpec, EpisodeSource, Metadata, Signals
from selfflow.datasets.fractal import FRACTAL, IMAGE, INSTRUCTION, SCHEMA, invert
from selfflow.datasets.rlds import RldsSource
from selfflow.datasets.rlds_schema import STEPS, TEXT, Leaf, Schema, described, image
from selfflow.datasets.spec import GRIPPER, Embodiment, UserError
from selfflow.datasets.tfrecord import encode_example, scan, write_records

NAME, VERSION = "fractal20220817_data", "0.1.0"
PER_SHARD = 85  # episodes, as in the original: 111 MB
OWNER = "selfflow.json"  # whose episodes these are, for our own reader
PLAN = "plan.json"  # of a dataset in the making
Features = dict[str, list[bytes] | np.ndarray]  # a record's, by key


@dataclass(frozen=True)
class Written:
    """What `write_rlds` wrote."""

    place: Path
    episodes: int
    steps: int
    notes: dict[str, int]  # what the schema could not say, or not exactly: how many times


def write_rlds(
    source: EpisodeSource, out: Path, name: str | None = None, per_shard: int = PER_SHARD
) -> Written:
    """Writes all episodes of a source, seen by its first camera.

    Episodes of RT-1's own dataset are copied with all that they hold. Of others, frames of RT-1's
    aspect (4:5) get its size, 256×320, and others keep theirs; JPEGs stay as they are where the
    size does. Of what the schema has and the source has not, zeros are written. `name` None is
    NAME for RT-1's robot. Raises UserError if the dataset exists.
    """
    robot = source.embodiment.name
    is_rt1 = robot == FRACTAL.embodiment.name
    name = name or (NAME if is_rt1 else re.sub(r"\W", "_", f"{robot}_in_fractal_schema"))
    if not re.fullmatch(r"\w+", name):
        raise UserError(f"name={name}: a dataset's name has letters, digits and _ only")
    if name == NAME and not is_rt1:
        raise UserError(f"name={NAME}: is read as RT-1's robot, this is {robot}; give another name")
    if len(source) == 0 or per_shard < 1:
        raise UserError(f"{source.name}: {len(source)} episodes, {per_shard} a shard: nothing")
    parts = np.array_split(np.arange(len(source)), -(-len(source) // per_shard))
    steps = sum(source.length(i) for i in range(len(source)))
    size = written_size(source.frames(0, [0])[0])
    schema = {**SCHEMA, IMAGE: image(*size)}
    place = out / name / VERSION
    plan = {"source": source.name, "episodes": len(source), "steps": steps, "shards": len(parts)}
    draft, done = begin(place, plan)
    with Progress() as progress:
        bar = progress.add_task(f"writing {name}", total=len(source))
        for part, path in zip(parts, shard_paths(draft, name, len(parts)), strict=True):
            if path.name not in done or not path.exists():
                notes: Counter[str] = Counter()
                write_shard(path, (_example(source, int(i), schema, notes) for i in part))
                done[path.name] = dict(notes)
                _write_json(draft / PLAN, {"plan": plan, "done": done})
            progress.advance(bar, len(part))
    owner = {"embodiment": asdict(source.embodiment), "camera": source.cameras[0]}
    _write_json(draft / OWNER, owner)
    finish(draft, place, name, schema, f"{source.name}, written by selfflow.")
    total = sum((Counter(notes) for notes in done.values()), Counter())
    return Written(place, len(source), steps, dict(total))


def written_spec(folder: Path) -> DatasetSpec | None:
    """The spec of a dataset that `write_rlds` wrote, None of any other."""
    path = folder / OWNER
    if not path.exists():
        return None
    try:
        owner = json.loads(path.read_text())
        robot, camera = owner["embodiment"], str(owner["camera"])
        lists = {key: tuple(robot[key]) for key in ("cameras", "limits")}
        embodiment = Embodiment(**robot | lists)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not what selfflow wrote ({e!r})") from e
    return replace(FRACTAL, embodiment=embodiment, cameras={camera: IMAGE})


def begin(place: Path, plan: Mapping[str, Any]) -> tuple[Path, dict[str, dict[str, int]]]:
    """The folder to write shards into, and what it holds of an earlier try: notes by shard.

    Raises UserError if `place` exists, or another plan was begun there.
    """
    if place.exists():
        raise UserError(f"{place}: already there; give another folder, or remove it")
    draft = place.with_name(f".{place.name}.part")
    begun = draft / PLAN
    if begun.exists():
        earlier = json.loads(begun.read_text())
        if earlier["plan"] != plan:
            raise UserError(f"{draft}: was begun with {earlier['plan']}, now {plan}; remove it")
        return draft, earlier["done"]
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _write_json(begun, {"plan": plan, "done": {}})
    return draft, {}


def shard_paths(folder: Path, name: str, count: int) -> list[Path]:
    """TFDS's names of the files of a split."""
    return [folder / f"{name}-train.tfrecord-{n:05d}-of-{count:05d}" for n in range(count)]


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """A TFRecord file, there when it is whole."""
    draft = path.with_name(f".{path.name}")
    write_records(draft, records)
    os.replace(draft, path)


def finish(draft: Path, place: Path, name: str, schema: Schema, description: str) -> None:
    """Adds what TFDS wants to know, and gives the folder its name."""
    shards = sorted(draft.glob("*.tfrecord*"))
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "numBytes": str(sum(path.stat().st_size for path in shards)),
        "shardLengths": [str(len(scan(mapped(path))[0])) for path in shards],
    }
    info = {
        "description": description,
        "fileFormat": "tfrecord",
        "name": name,
        "splits": [split],
        "version": VERSION,
    }
    _write_json(draft / "dataset_info.json", info)
    _write_json(draft / "features.json", described(schema), indent=4)
    (draft / PLAN).unlink()
    os.replace(draft, place)


def filled(known: Mapping[str, Any], schema: Schema, steps: int) -> Features:
    """All features of a record: the known ones, and zeros or empty texts for the rest."""
    return {
        key: _filled(known.get(key), leaf, steps if key.startswith(STEPS) else 1)
        for key, leaf in schema.items()
    }


def written_size(frame: UInt8[np.ndarray, "_ _ 3"]) -> tuple[int, int]:
    """(height, width) of the frames to write: RT-1's where the aspect is its."""
    height, width = frame.shape[:2]
    return (256, 320) if height * 5 == width * 4 else (height, width)


def _example(source: EpisodeSource, i: int, schema: Schema, notes: Counter[str]) -> bytes:
    signals, about, steps = source.signals(i), source.metadata(i), source.length(i)
    known: dict[str, Any] = _flags(signals, about) | {
        key: value for key, value in about.items() if key in schema
    }
    if isinstance(source, RldsSource) and source.spec.numbers == FRACTAL.numbers:
        known |= {key: source.measured(i, key) for key in source.measures if key in schema}
    else:
        known |= invert(signals)
        _note(signals, notes)
    known[INSTRUCTION] = [text.encode() for text in signals.instruction]
    known[IMAGE] = _jpegs(source, i, schema[IMAGE].shape[:2], notes)
    return encode_example(filled(known, schema, steps))


def _flags(signals: Signals, about: Metadata) -> dict[str, Any]:
    """What RLDS and RT-1's schema say of the episode's course."""
    steps = len(signals.terminate)
    last = np.arange(steps) == steps - 1
    success = about.get("success")
    return {
        "aspects/has_aspects": success is not None,
        "aspects/success": bool(success),
        "steps/is_first": np.arange(steps) == 0,
        "steps/is_last": last,
        "steps/is_terminal": last & signals.terminate,
        "steps/reward": last * float(bool(success)),
    }


def _note(signals: Signals, notes: Counter[str]) -> None:
    """Counts what `invert` could not say."""
    opening = signals.actions[signals.action_valid, GRIPPER]
    notes["steps without a valid action, written as no motion"] += int(
        (~signals.action_valid).sum()
    )
    notes["gripper targets between open and closed, rounded"] += int((opening % 1 > 0).sum())
    notes["poses that are not valid, written as zeros"] += int((~signals.proprio_valid).sum())


def _jpegs(source: EpisodeSource, i: int, size: Sequence[int], notes: Counter[str]) -> list[bytes]:
    steps = range(source.length(i))
    if isinstance(source, RldsSource):
        originals = [bytes(data) for data in source.encoded(i, steps)]
        if all(_is_jpeg(data, size) for data in originals):
            return originals
    jpegs = []
    for step in steps:  # one by one: an episode of decoded frames may be large
        (frame,) = source.frames(i, [step])
        if frame.shape[:2] != tuple(size):
            notes[f"frames resized to {size[0]}×{size[1]}"] += 1
            picture = Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BOX)
            frame = np.asarray(picture)
        jpegs.append(simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=QUALITY))
    return jpegs


def _is_jpeg(data: bytes, size: Sequence[int]) -> bool:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return (height, width) == tuple(size)


def _filled(value: Any, leaf: Leaf, count: int) -> list[bytes] | np.ndarray:
    if leaf == TEXT or leaf.dtype == "image":
        texts = [b""] * count if value is None else value
        return [texts.encode()] if isinstance(texts, str) else texts
    size = count * int(np.prod(leaf.shape))
    values = np.zeros(size) if value is None else np.asarray(value)
    if values.size != size:
        raise ValueError(f"{values.size} values of {leaf} in {count} steps")
    return values.astype(np.float32 if leaf.dtype.startswith("float") else np.int64).ravel()


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(content, indent=indent))
    os.replace(draft, path)
