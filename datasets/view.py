"""One camera of a source as its default, or a part of its pictures.

    path?camera:wrist?crop:5-0-95-90

A crop is left-top-right-bottom in percent of the picture's sides, for all cameras: black borders
cut off, or a field of view that fits the other sources. It says what the data are; a policy trained
on it must be shown such pictures too.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from selfflow.datasets.episodes import EpisodeSource, Measures, Metadata, Signals, check_camera
from selfflow.datasets.spec import UserError


class View:
    """An EpisodeSource seen so. Raises UserError for a camera that it has not, or no such crop."""

    def __init__(
        self, source: EpisodeSource, camera: str | None = None, crop: str | None = None
    ) -> None:
        first = check_camera(camera, source.cameras, source.name)
        self.source = source
        self.cameras = (first, *(name for name in source.cameras if name != first))
        chosen = (("camera", camera), ("crop", crop))
        # another name, since its frames and their latents are others
        self.name = source.name + "".join(f"?{k}:{v}" for k, v in chosen if v is not None)
        self.embodiment, self.skipped = source.embodiment, source.skipped
        self.measures = source.measures if isinstance(source, Measures) else ()
        self.photographs = getattr(source, "photographs", ())  # of a store; others cannot say
        self._box = (0, 0, 100, 100) if crop is None else _box(crop)

    def __len__(self) -> int:
        return len(self.source)

    def length(self, i: int) -> int:
        """As the source's."""
        return self.source.length(i)

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """The part of each frame."""
        left, top, right, bottom = self._box
        found = []
        for image in self.source.frames(i, steps, camera or self.cameras[0]):
            h, w = image.shape[:2]
            rows = slice(round(top * h / 100), round(bottom * h / 100))
            found.append(image[rows, round(left * w / 100) : round(right * w / 100)])
        return found

    def signals(self, i: int) -> Signals:
        """As the source's."""
        return self.source.signals(i)

    def metadata(self, i: int) -> Metadata:
        """As the source's."""
        return self.source.metadata(i)

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """As the source's, None where it measures nothing."""
        return self.source.measured(i, key) if isinstance(self.source, Measures) else None


def _box(text: str) -> tuple[int, ...]:
    found = re.fullmatch(r"(\d+)-(\d+)-(\d+)-(\d+)", text)
    box = tuple(map(int, found.groups())) if found else (0, 0, 0, 0)
    if not (0 <= box[0] < box[2] <= 100 and 0 <= box[1] < box[3] <= 100):
        raise UserError(f"crop:{text}: give left-top-right-bottom in percent, e.g. crop:5-0-95-90")
    return box
