"""Latents on disk: frames that were encoded once, to be read instead of encoded in training.

    FOLDER/latents.json      Header: codec, sizes, and which frames make a row
    FOLDER/000.json          a source: its name and the number of steps of every episode
    FOLDER/000.rows          float16 rows of tokens, episode after episode; places follow from steps
    FOLDER/000.done.jsonl    one line [episode, crc32] for each episode whose rows are on the disk

A row is the frame at one step. With a codec that joins frames it is the clip of `frames` frames,
`stride` steps apart, that begins at a step t, for every `every`-th t; frames after the episode's
end repeat the last. Such codecs are causal, so a row's first latent frame is the frame at t encoded
by itself, and any shorter clip is the row's beginning.

An episode's line follows when its rows are on the disk, so whatever kills the writer, every line
that parses is a whole episode; the next writer does the others.

B batch, T frames, L tokens, C channels; n rows.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfflow.worldmodel.codec import CodecConfig, resolved, token_shape
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.video_codec import latent_frames

FORMAT = 1
HEADER = "latents.json"


@dataclass(frozen=True)
class Header:
    """What all rows of a store have in common. Raises ValueError if it does not go together."""

    codec: CodecConfig
    height: int  # pixels
    width: int
    patch: int  # cells a side of a token
    frames: int = 1  # of a row
    stride: int = 1  # control steps between them
    every: int = 1  # a row for every so many steps
    weights: str = "none"  # checksum of the codec's

    def __post_init__(self) -> None:
        token_shape(self.codec, self.height, self.width, self.patch)
        if min(self.stride, self.every) < 1:
            raise ValueError(f"stride={self.stride}, every={self.every}: at least 1")
        latent_frames(self.frames, self.temporal)
        if self.temporal == 1 and (self.frames, self.every) != (1, 1):
            raise ValueError(
                f"frames={self.frames}, every={self.every}: codec.kind={self.codec.kind} encodes "
                "single frames, every step has its row; leave both at 1"
            )

    @cached_property
    def temporal(self) -> int:
        """Frames a latent frame."""
        return resolved(self.codec).temporal

    @cached_property
    def cells(self) -> int:
        """Tokens of a latent frame."""
        rows, columns, _ = token_shape(self.codec, self.height, self.width, self.patch)
        return rows * columns

    @cached_property
    def row(self) -> tuple[int, int]:
        """L and C of a row."""
        channels = token_shape(self.codec, self.height, self.width, self.patch)[2]
        return latent_frames(self.frames, self.temporal) * self.cells, channels

    @property
    def row_bytes(self) -> int:
        """In float16."""
        return 2 * self.row[0] * self.row[1]

    def rows(self, steps: int) -> int:
        """Number of rows of an episode of so many steps."""
        return -(-steps // self.every)

    def same_latents(self) -> dict[str, Any]:
        """What decides what a token means, but for the weights themselves."""
        known = resolved(self.codec)
        values = {"kind": self.codec.kind, "cls": known.cls, "channels": known.channels}
        values |= {"spatial": known.spatial, "temporal": known.temporal}
        values |= {"scale": known.scale, "shift": known.shift}
        return values | {"height": self.height, "width": self.width, "patch": self.patch}

    def identity(self) -> dict[str, Any]:
        """All that must agree for rows to lie in one store."""
        clips = {"frames": self.frames, "stride": self.stride, "every": self.every}
        return self.same_latents() | clips | {"weights": self.weights}


@dataclass
class Shard:
    """The files of one source."""

    folder: Path
    number: int
    name: str
    steps: list[int]  # of each episode
    header: Header
    done: dict[int, int] = field(default_factory=dict)  # episode -> crc32

    def __post_init__(self) -> None:
        counts = [self.header.rows(steps) for steps in self.steps]
        self.starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]  # row numbers
        for line in _lines(self.log):
            if isinstance(line, list) and len(line) == 2 and line[0] in range(len(self.steps)):
                self.done[line[0]] = line[1]

    @property
    def log(self) -> Path:
        """Of finished episodes."""
        return self.folder / f"{self.number:03d}.done.jsonl"

    @property
    def file(self) -> Path:
        """Of rows."""
        return self.folder / f"{self.number:03d}.rows"

    def open_rows(self) -> np.ndarray:
        """Float16 (n, L, C), mapped into memory; as far as they are on the disk."""
        size = self.file.stat().st_size if self.file.exists() else 0
        shape = (size // self.header.row_bytes, *self.header.row)
        if shape[0] == 0:
            return np.zeros(shape, "<f2")
        return np.memmap(self.file, "<f2", "r", shape=shape)

    def whole(self, episode: int) -> bool:
        """Whether the episode's bytes are those that were written."""
        rows = self.open_rows()[self.starts[episode] : self.starts[episode + 1]]
        full = len(rows) == self.header.rows(self.steps[episode])
        return full and zlib.crc32(rows.tobytes()) == self.done.get(episode)


class LatentStore:
    """Reads a store; it shows what was encoded when it was opened."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.header = read_header(self.folder)
        self.shards = {s.name: s for s in shards(self.folder, self.header)}
        self._rows = {name: shard.open_rows() for name, shard in self.shards.items()}

    def check(self, layout: Layout) -> None:
        """Raises RunError unless the rows are what this layout needs."""
        have = self.header
        codec, clip = layout.codec, 1 + layout.future
        frames = clip if resolved(codec).temporal > 1 else 1
        want = Header(codec, layout.height, layout.width, layout.patch, frames, layout.stride)
        pairs = {k: (v, want.same_latents()[k]) for k, v in have.same_latents().items()}
        if have.temporal > 1:
            pairs["stride"] = (have.stride, layout.stride)
            pairs["frames"] = (have.frames, max(clip, have.frames))
            if layout.context > 1 and layout.stride % have.every:
                pairs["every"] = (have.every, layout.stride)
        wrong = [f"{k} is {a} there and {b} here" for k, (a, b) in pairs.items() if a != b]
        if wrong:
            raise RunError(
                f"latents={self.folder}: not the layout's: {', '.join(wrong)}; change the layout, "
                "or encode once more into another folder (worldmodel/encode.py)"
            )

    def check_source(self, name: str, steps: Sequence[int]) -> None:
        """Raises RunError unless all episodes of this source, of so many steps, are there."""
        shard = self._shard(name)
        if list(steps) != shard.steps[: len(steps)]:
            raise RunError(
                f"latents={self.folder}: {name} has {len(shard.steps)} episodes there, which are "
                f"not the {len(steps)} of the data; encode the data into another folder"
            )
        missing = [i for i in range(len(steps)) if i not in shard.done]
        if missing:
            raise self._not_encoded(name, missing[0])

    def rows(
        self, ids: Sequence[tuple[str, int, int]], offsets: Sequence[int]
    ) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B T"]]:
        """Tokens of the frames at t + offsets for each (source, episode, t), and which are real.

        A frame before the first or after the last is that one, not valid, as in datasets/windows.
        In a store of clips they are one frame's, or 0, stride, 2 stride, ... of a clip that makes
        whole latent frames. Raises RunError for what the store does not hold.
        """
        wanted = np.asarray(offsets)
        if self.header.temporal > 1:
            self._check_clip(wanted)
        tokens, valid = [], []
        for name, episode, t in ids:
            shard = self._shard(name)
            if episode not in shard.done:
                raise self._not_encoded(name, episode)
            last = shard.steps[episode] - 1
            if not 0 <= t <= last:
                raise ValueError(f"step {t} of an episode of {last + 1}")
            valid.append((t + wanted >= 0) & (t + wanted <= last))
            tokens.append(self._tokens(shard, episode, (t + wanted).clip(0, last)))
        joined = torch.from_numpy(np.stack(tokens)).float()
        return joined, torch.from_numpy(np.stack(valid))

    def tokens(
        self, ids: Sequence[tuple[str, int, int]], layout: Layout
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B L C"] | None, Bool[Tensor, "B T"]]:
        """Context tokens, video target (None if none is to be predicted), validity of frames."""
        offsets, shown = layout.frame_offsets, layout.context
        context = [self.rows(ids, offsets[i : i + 1]) for i in range(shown)]
        coming = self.rows(ids, offsets[layout.first_target :]) if layout.future else None
        valid = [frame_valid for _, frame_valid in context]
        if coming is not None:  # a clip's first frame is the last one shown
            valid.append(coming[1][:, shown - layout.first_target :])
        tokens = torch.cat([frame for frame, _ in context], 1)
        return tokens, coming[0] if coming else None, torch.cat(valid, 1)

    def _tokens(self, shard: Shard, episode: int, steps: np.ndarray) -> np.ndarray:
        rows, start, every = self._rows[shard.name], shard.starts[episode], self.header.every
        if self.header.temporal == 1:
            return rows[start + steps].reshape(-1, self.header.row[1])
        if steps[0] % every:
            raise RunError(
                f"latents={self.folder}: clips begin at steps 0, {every}, {2 * every}, ...; "
                f"there is none at step {steps[0]} of episode {episode} of {shard.name}"
            )
        length = latent_frames(len(steps), self.header.temporal) * self.header.cells
        return rows[start + steps[0] // every, :length]

    def _check_clip(self, offsets: np.ndarray) -> None:
        count, stride = len(offsets), self.header.stride
        if count > 1 and (
            count > self.header.frames or (offsets != stride * np.arange(count)).any()
        ):
            raise RunError(
                f"latents={self.folder}: clips of {self.header.frames} frames, {stride} steps "
                f"apart, from step t on; not of steps t + {offsets.tolist()}"
            )

    def _shard(self, name: str) -> Shard:
        if name not in self.shards:
            raise RunError(
                f"latents={self.folder}: no source {name}; have {', '.join(self.shards)}; "
                f"add it: worldmodel/encode.py out={self.folder} data=..."
            )
        return self.shards[name]

    def _not_encoded(self, name: str, episode: int) -> RunError:
        return RunError(
            f"latents={self.folder}: episode {episode} of {name} is not encoded; "
            f"finish it: worldmodel/encode.py out={self.folder} data=..."
        )


def read_header(folder: Path) -> Header:
    """The store's header. Raises RunError if there is none that this version reads."""
    try:
        values = json.loads((folder / HEADER).read_text())
        if values.pop("format") != FORMAT:
            raise RunError(f"latents={folder}: of another version; this one reads format {FORMAT}")
        values.pop("selfflow")
        return Header(**values | {"codec": CodecConfig(**values["codec"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RunError(
            f"latents={folder}: not a folder of worldmodel/encode.py, {HEADER} cannot be read ({e})"
        ) from e


def shards(folder: Path, header: Header) -> list[Shard]:
    found = []
    for path in sorted(folder.glob("[0-9][0-9][0-9].json")):
        values = json.loads(path.read_text())
        found.append(Shard(folder, int(path.stem), values["name"], values["steps"], header))
    return found


def _lines(path: Path) -> list[Any]:
    """The JSON lines of a file; a torn one is left out."""
    values = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values
