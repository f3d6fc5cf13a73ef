"""Encoding of a camera's frames into mp4 files that hold many episodes each."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from selfflow.datasets.spec import UserError

CODECS = {  # name -> encoder, crf; a keyframe every second frame makes random access cheap
    "h264": ("libx264", 23, {"g": "2", "bf": "0", "preset": "fast"}),
    "av1": ("libsvtav1", 30, {"g": "2", "preset": "8"}),  # presets above 10 lose whole regions
}
VIDEO_MB, CHUNK = 200, 1000  # at which the next file begins; files a folder


class VideoFiles:
    """The files of one camera. Raises UserError if the size of its frames changes."""

    def __init__(
        self, folder: Path, template: str, key: str, rate: Fraction, codec: str, crf: int | None
    ) -> None:
        self.folder, self.template, self.key = folder, template, key
        self.rate, self.codec = rate, codec
        self.encoder, default, options = CODECS[codec]
        self.options = options | {"crf": str(default if crf is None else crf)}
        self.size: tuple[int, int] | None = None  # height, width
        self.number, self.count = -1, 0  # of the file, of frames in it
        self._container: Any = None
        self._stream: Any = None
        self._bytes = 0  # of the file

    def begin(self) -> int:
        """Starts an episode. Returns the number of its first frame in its file."""
        if self._container is None or self._bytes > VIDEO_MB << 20:
            self.close()
            self.number, self.count, self._bytes = self.number + 1, 0, 0
        return self.count

    def add(self, frame: UInt8[np.ndarray, "_ _ 3"]) -> None:
        """Encodes the next frame."""
        size = frame.shape[0], frame.shape[1]
        if self.size is None:
            self.size = size
        if size != self.size:
            have, new = ("×".join(map(str, s)) for s in (self.size, size))
            raise UserError(f"{self.key}: frames of {have} and of {new} pixels; LeRobot wants one")
        if self._container is None:
            self._container = self._open()
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self.count, 1 / self.rate
        packets = self._stream.encode(picture)
        self._container.mux(packets)
        self._bytes += sum(packet.size for packet in packets)
        self.count += 1

    def end(self) -> tuple[int, int]:
        """Ends an episode. Returns chunk and number of its file."""
        return divmod(self.number, CHUNK)

    def close(self) -> None:
        """Ends the file."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
        self._container = None

    def feature(self) -> dict[str, Any]:
        """What info.json says of the camera."""
        height, width = self.size or (0, 0)
        return {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": self.codec,
                "video.pix_fmt": self._pixels(),
                "video.fps": float(self.rate),
                "video.channels": 3,
                "is_depth_map": False,
                "has_audio": False,
            },
        }

    def _open(self) -> Any:
        chunk, file = divmod(self.number, CHUNK)
        place = {"video_key": self.key, "chunk_index": chunk, "file_index": file}
        path = self.folder / self.template.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints its settings otherwise
        container = av.open(str(path), "w")
        stream: Any = container.add_stream(self.encoder, rate=self.rate, options=self.options)
        assert self.size is not None
        stream.height, stream.width = self.size
        stream.pix_fmt = self._pixels()
        self._stream = stream
        return container

    def _pixels(self) -> str:
        if self.size is None or not (self.size[0] % 2 or self.size[1] % 2):
            return "yuv420p"
        if self.codec == "av1":
            raise UserError(f"{self.key}: frames of odd size {self.size}; use codec=h264")
        return "yuv444p"
