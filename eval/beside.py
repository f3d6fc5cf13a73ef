"""What a policy imagined beside what happened, frame by frame, for a rollout's film."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from selfflow.eval.video import MIN_WIDTH
from selfflow.policies.base import Imagines

GAP = 8  # pixels between the two
DARK = 24


class Beside:
    """Follows one episode; call it at every step in turn, from step 0 on."""

    def __init__(self, policy: Imagines) -> None:
        self._policy = policy
        self._shown: tuple[np.ndarray, int] | None = None
        self._since = 0  # the step of the decision that imagined it

    def __call__(self, real: UInt8[np.ndarray, "h w 3"], step: int) -> UInt8[np.ndarray, "H W 3"]:
        """real | imagined: the frame imagined for this step, or else the next one after it; dark
        before the first decision."""
        if self._policy.imagined is not self._shown:  # decided before the step that led here
            self._shown, self._since = self._policy.imagined, step - 1
        factor = max(1, -(-MIN_WIDTH // real.shape[1]))
        height, width = factor * real.shape[0], factor * real.shape[1]
        other = np.full_like(real, DARK)
        if self._shown is not None:
            frames, stride = self._shown
            nearest = min(max(-(-(step - self._since) // stride), 1), len(frames))
            other = frames[nearest - 1]
        left, right = (_resized(picture, width, height) for picture in (real, other))
        return np.concatenate([left, np.full((height, GAP, 3), DARK, np.uint8), right], 1)


def _resized(picture: UInt8[np.ndarray, "h w 3"], width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
