"""What the outside sees of a policy: observations in, action chunks out, no simulator."""

from typing import Protocol, runtime_checkable

import numpy as np

from selfflow.datasets.spec import ActionChunk, Observation


@runtime_checkable  # so that beartype can check arguments in tests
class Policy(Protocol):
    """A controller of one embodiment; see selfflow.datasets.spec for observations and actions."""

    embodiment: str

    def reset(self, seed: int | None = None) -> None:
        """Forgets the last episode; a seed fixes every random draw of the next one."""
        ...

    def act(self, observation: Observation) -> ActionChunk:
        """The actions to execute before asking again."""
        ...


@runtime_checkable
class Imagines(Protocol):
    """A policy that can show what it expects to see.

    While `imagine` is set, `imagined` is the last decision's video: uint8 frames (F, H, W, 3) and
    the control steps from the decision to the first of them, and from each to the next.
    """

    imagine: bool
    imagined: tuple[np.ndarray, int] | None
