"""What a policy is shown: observations become the condition tokens that its model reads.

T frames, L tokens, C channels.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from selfflow.datasets.normalize import Statistics, proprio_features
from selfflow.datasets.spec import Embodiment, Observation
from selfflow.datasets.text import TextEncoder
from selfflow.datasets.windows import resize
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.transformer import Tokens
from selfflow.worldmodel.video_codec import Codec

Model = TypeVar("Model")


@dataclass(frozen=True)
class Parts(Generic[Model]):
    """What a checkpoint holds, ready to run."""

    model: Model
    layout: Layout
    codec: Codec
    text: TextEncoder
    robots: Robots
    statistics: Statistics
    decision: dict[str, int]  # its own steps and execute
    text_dropout: float = 0.0  # share of the training samples without text


class Observer:
    """Keeps the frames of an episode, and makes tokens of what is seen now."""

    def __init__(self, parts: Parts[Any], robot: Embodiment) -> None:
        self._parts, self._robot = parts, robot
        self._texts: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the frames."""
        self._frames: deque[tuple[int, np.ndarray]] = deque()

    def tokens(self, observation: Observation, step: int) -> tuple[Tokens, Tokens]:
        """Condition tokens (1, L, C) and validity at this control step. Raises ValueError for an
        observation without the robot's camera."""
        parts, layout, camera = self._parts, self._parts.layout, self._robot.cameras[0]
        if camera not in observation["images"]:
            have = ", ".join(observation["images"])
            raise ValueError(
                f"{self._robot.name} needs camera {camera}; the observation has {have}"
            )
        image = resize(observation["images"][camera], layout.height, layout.width)
        frames, frame_valid = self.history(image, step)
        proprio = proprio_features(observation["proprio"], parts.statistics)
        context = parts.codec.encode(torch.from_numpy(frames)[:, None])
        return layout.condition_tokens(
            context.flatten(0, 1)[None],
            torch.from_numpy(frame_valid)[None],
            self._text(observation["instruction"]),
            parts.robots.tokens([self._robot.name]),
            torch.from_numpy(np.asarray(proprio, np.float32))[None],
            torch.ones(1, dtype=torch.bool),
        )

    def history(self, image: UInt8[np.ndarray, "H W 3"], now: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames at the layout's offsets: the latest that is old enough; none before step 0."""
        layout = self._parts.layout
        self._frames.append((now, image))
        wanted = [now + offset for offset in layout.frame_offsets[: layout.context]]
        while len(self._frames) > 1 and self._frames[1][0] <= wanted[0]:
            self._frames.popleft()
        shown = [_latest(self._frames, step) for step in wanted]
        return np.stack(shown), np.array([step >= 0 for step in wanted])

    def _text(self, instruction: str) -> Tensor:
        if instruction not in self._texts:
            self._texts[instruction] = torch.from_numpy(self._parts.text.embed([instruction]))
        return self._texts[instruction]


def _latest(frames: Sequence[tuple[int, np.ndarray]], step: int) -> np.ndarray:
    old_enough = [image for at, image in frames if at <= step]
    return old_enough[-1] if old_enough else frames[0][1]
