"""Frames as an mp4."""

import os
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from jaxtyping import UInt8


class Film:
    """An mp4 that is written frame by frame, and appears under its name when closed.

    h264 where PyAV has libx264, else MPEG-4 part 2. Sides must be even. Leaving the `with` block by
    an error discards the file.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._part = path, path.with_name(f".{path.stem}.part.mp4")
        self._container = av.open(str(self._part), "w")
        stream = self._container.add_stream(_codec(), rate=round(fps))
        assert isinstance(stream, av.VideoStream), stream
        self._stream = stream
        self._sized = False

    def add(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Appends a frame; all must have the first one's size."""
        if not self._sized:
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._sized = True
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> "Film":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sized:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if kind is None and self._sized:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)


def _codec() -> str:
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"
