"""python worldmodel/encode.py data=[data/open_drawer_place] codec.path=FOLDER out=data/latents

Encodes every frame of the data once, by default with the TAEF2 weights in codec.path, and keeps the
latents in `out`, for training with `latents=OUT`. Every key is explained in configs/encode.yaml.
Stop it as you like: the same command goes on, also with more data.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from selfflow.configs.entry import launch
from selfflow.datasets.source import EpisodeSource, open_sources
from selfflow.datasets.windows import resize
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.codec import (
    Codec,
    CodecConfig,
    make_codec,
    weights_checksum,
    weights_path,
)
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.latent_writer import LatentWriter
from selfflow.worldmodel.latents import Header
from selfflow.worldmodel.parallel import place


@dataclass(frozen=True)
class EncodeConfig:
    """Every key of configs/encode.yaml, which explains them."""

    data: Any = field(default_factory=list)
    out: str = "data/latents"
    codec: CodecConfig = field(default_factory=CodecConfig)
    height: int = 128
    width: int = 160
    patch: int = 2
    frames: int = 1
    stride: int = 1
    every: int = 1
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        self.header()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device}: choose one of auto, cpu, cuda, cuda:N")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: must not be negative")

    def header(self, weights: str = "none") -> Header:
        """Of the store."""
        sizes = (self.height, self.width, self.patch)
        return Header(self.codec, *sizes, self.frames, self.stride, self.every, weights)


@user_errors()
def check(config: EncodeConfig) -> None:
    """Raises UserError for what can be known before anything is read or written."""
    place("none", config.device)
    if config.codec.kind != "patch":
        weights_path(config.codec)


@user_errors()
def main(config: EncodeConfig) -> None:
    """Encodes what is not encoded yet."""
    if config.threads:
        torch.set_num_threads(config.threads)
    paths = [config.data] if isinstance(config.data, str) else [str(path) for path in config.data]
    sources, _ = open_sources(paths)
    sizes = (config.height, config.width, config.patch)
    codec = make_codec(config.codec, *sizes, place("none", config.device).device)
    steps = [(s.name, [s.length(i) for i in range(len(s))]) for s in sources]
    with LatentWriter(config.out, config.header(weights_checksum(codec)), steps) as writer:
        encode(writer, codec, {source.name: source for source in sources})
    print(f"latents: {config.out}; train with latents={config.out}")


def encode(writer: LatentWriter, codec: Codec, sources: dict[str, EpisodeSource]) -> None:
    """All pending episodes. Raises RunError if they would not fit on the disk."""
    header, pending = writer.header, writer.pending()
    rows = [header.rows(sources[name].length(i)) for name, i in pending]
    size, free = sum(rows) * header.row_bytes, shutil.disk_usage(writer.folder).free
    clips = f"clips of {header.frames} frames" if header.frames > 1 else "frames"
    print(
        f"to encode: {len(pending)} episodes, {sum(rows)} {clips} as {header.row[0]} x "
        f"{header.row[1]} numbers, {in_units(size)} in float16; {in_units(free)} are free"
    )
    if size > free:
        raise RunError(f"out={writer.folder}: too little space on the disk; choose another out")
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("rows", total=sum(rows))

        def shown(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
            for block in blocks:
                bar.advance(task, len(block))
                yield block

        for name, i in pending:
            writer.write(name, i, shown(encoded(sources[name], i, codec, header)))


def encoded(source: EpisodeSource, i: int, codec: Codec, header: Header) -> Iterator[Tensor]:
    """Rows of an episode, in blocks: of frames, or of single clips."""
    last = source.length(i) - 1
    at_once = header.codec.chunk if header.frames == 1 else 1
    clip = header.stride * np.arange(header.frames)
    starts = range(0, last + 1, header.every)
    for first in range(0, len(starts), at_once):
        steps = np.array(starts[first : first + at_once])[:, None] + clip
        steps = steps.clip(max=last)
        images = source.frames(i, steps.flatten().tolist())
        frames = np.stack([resize(image, header.height, header.width) for image in images])
        yield codec.encode(torch.from_numpy(frames.reshape(*steps.shape, *frames.shape[1:])))


def in_units(size: int) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    launch(EncodeConfig, main, "encode", check=check)
