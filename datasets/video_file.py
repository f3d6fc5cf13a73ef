"""Single frames of long mp4 files: seek to the keyframe before, decode up to what is asked for.

Files are kept open per thread, since a decoder has a position: a window of 16 frames then costs one
or a few seeks, not an open file.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from selfflow.datasets.spec import UserError

OPEN = 4  # files a thread keeps open, some 10 MB each


class VideoFile:
    """An mp4 that is read at random. Not for several threads at once. Raises UserError if it cannot
    be decoded."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (FFmpegError, IndexError) as e:
            raise self._broken(e) from e
        # One frame at a time: threads would decode ahead what nobody wants.
        self._stream.codec_context.thread_count = 1
        self._start = self._stream.start_time or 0
        self._base = float(self._stream.time_base or 1)
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._at: int | None = None  # pts of the frame decoded last

    def at(self, times: Sequence[float], tolerance: float) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """The frames at these times (s from the first frame), RGB.

        Raises UserError if one has no frame within `tolerance` seconds.
        """
        found = {time: self._frame(time, tolerance) for time in sorted(set(times))}
        return [found[time] for time in times]

    def close(self) -> None:
        """Frees the decoder and the file."""
        self._container.close()

    def _frame(self, time: float, tolerance: float) -> UInt8[np.ndarray, "_ _ 3"]:
        wanted, slack = self._start + round(time / self._base), tolerance / self._base
        try:
            if not self._is_next(wanted):
                self._container.seek(wanted, stream=self._stream)  # the keyframe at or before it
                self._frames = self._container.decode(self._stream)
            for frame in self._frames:
                self._at = frame.pts
                if frame.pts is not None and frame.pts >= wanted - slack:
                    if frame.pts > wanted + slack:
                        break
                    return frame.to_ndarray(format="rgb24")
        except FFmpegError as e:
            self._at = None
            raise self._broken(e) from e
        self._at = None
        raise UserError(
            f"{self.path}: no frame at {time:.3f} s; the file is short or not the data's"
        )

    def _is_next(self, wanted: int) -> bool:
        """Whether decoding on costs less than a seek: no keyframe between but the next frame."""
        if self._at is None or wanted <= self._at:
            return False
        index = self._stream.index_entries
        key = index.search_timestamp(wanted)
        return key <= index.search_timestamp(self._at, any_frame=True) + 1

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: not a video that can be decoded ({error})")


class _Thread(threading.local):
    def __init__(self) -> None:
        self.process = os.getpid()
        self.files: OrderedDict[str, VideoFile] = OrderedDict()
        self.inherited: OrderedDict[str, VideoFile] | None = None


_open = _Thread()


def open_video(path: str | Path) -> VideoFile:
    """The file, open in this thread; the OPEN ones used last stay open."""
    if _open.process != os.getpid():
        # Forked: the parent's files share their position with it, and the decoders' threads are
        # not there. They are kept, for freeing a decoder waits for its threads.
        _open.process, _open.inherited, _open.files = os.getpid(), _open.files, OrderedDict()
    key = str(path)
    files = _open.files
    if key not in files:
        files[key] = VideoFile(path)
        if len(files) > OPEN:
            files.popitem(last=False)[1].close()
    files.move_to_end(key)
    return files[key]
