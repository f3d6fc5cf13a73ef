"""A source seen by one of its cameras only."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from selfflow.datasets.episodes import EpisodeSource, Metadata, Signals, check_camera


class OneCamera:
    """`source` as an EpisodeSource whose only camera is `camera`."""

    def __init__(self, source: EpisodeSource, camera: str) -> None:
        self._source = source
        self.name, self.embodiment, self.skipped = source.name, source.embodiment, source.skipped
        self.cameras = (check_camera(camera, source.cameras, source.name),)

    def __len__(self) -> int:
        return len(self._source)

    def length(self, i: int) -> int:
        """T of episode i."""
        return self._source.length(i)

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of the camera."""
        name = check_camera(camera, self.cameras, self.name)
        return self._source.frames(i, steps, name)

    def signals(self, i: int) -> Signals:
        """Those of the source."""
        return self._source.signals(i)

    def metadata(self, i: int) -> Metadata:
        """That of the source."""
        return self._source.metadata(i)
