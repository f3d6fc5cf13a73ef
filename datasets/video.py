"""A video file as a source of one episode: frames and an instruction, nothing else."""

import re
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from selfflow.datasets.episodes import Metadata, Signals, check_camera, no_signals
from selfflow.datasets.spec import EMBODIMENTS, TASKS, Embodiment, UserError

MAX_BYTES = 256 * 2**20  # of decoded frames held in memory


class VideoClip:
    """One mp4 as an EpisodeSource. One frame is one control step; the file's own rate is ignored
    (the RT-1 clip is stored at 16.7 frames/s but holds 3 Hz steps).

    Clips are short: all frames are decoded once and kept. `instruction` None takes the task
    instruction whose words the file name has most of, else the words of the file name. Raises
    UserError if it cannot be decoded or is too long.
    """

    def __init__(
        self,
        path: str | Path,
        embodiment: Embodiment = EMBODIMENTS["google_robot"],
        instruction: str | None = None,
    ) -> None:
        path = Path(path)
        self.name = path.name
        self.embodiment = embodiment
        self.cameras = self.embodiment.cameras[:1]
        self.skipped = 0
        self.instruction = guess_instruction(path.stem) if instruction is None else instruction
        self._frames = _decode(path)

    def __len__(self) -> int:
        return 1

    def length(self, i: int) -> int:
        """Number of frames."""
        return len(self._frames)

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames at these steps, native size."""
        check_camera(camera, self.cameras, self.name)
        return [self._frames[step] for step in steps]

    def signals(self, i: int) -> Signals:
        """Nothing but the instruction is valid."""
        return no_signals([self.instruction] * len(self._frames))

    def metadata(self, i: int) -> Metadata:
        """The file's name; its own rate is not that of its steps."""
        return {"file": self.name}


def is_mp4(path: Path) -> bool:
    """Whether the file begins as an mp4 does."""
    with open(path, "rb") as file:
        return file.read(12)[4:8] == b"ftyp"


def guess_instruction(stem: str) -> str:
    """An instruction from a file name: "rt1_real_standing_coke_can_1" -> "pick coke can".

    The task instruction with most words in the name, at least two and half of its own; else the
    words of the name without numbers.
    """
    words = re.findall(r"[a-z]+", stem.lower())
    instructions = [
        text for task in TASKS.values() for text in task.instructions if "{" not in text
    ]
    best = max(instructions, key=lambda text: len(set(text.split()) & set(words)))
    shared = len(set(best.split()) & set(words))
    return best if shared >= 2 and shared >= len(best.split()) / 2 else " ".join(words)


def _decode(path: Path) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    frames: list[np.ndarray] = []
    size = 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                size += frames[-1].nbytes
                if size > MAX_BYTES:
                    limit = f"more than {MAX_BYTES >> 20} MiB of frames"
                    raise UserError(f"{path}: {limit}; cut it into shorter clips")
    except (FFmpegError, IndexError) as e:
        raise UserError(f"{path}: not a video that can be decoded ({e})") from e
    if not frames:
        raise UserError(f"{path}: a video without frames")
    return frames
