"""What the outside sees of a policy: observations in, action chunks out, no simulator."""

from typing import Protocol, runtime_checkable

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
