"""The observation space of an instruction, which survives the shared memory of worker processes.

`gymnasium.vector.AsyncVectorEnv` reads its shared memory once, when it is made. Arrays see later
changes, as they are views of it; texts do not, and every observation would hold the first ones (so
gymnasium 1.4). `Instruction` is read as a sequence that decodes when it is looked at or copied.
"""

import string
from collections.abc import Sequence
from typing import Any, overload

import gymnasium
from gymnasium.vector.utils import read_from_shared_memory

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
_read_texts = read_from_shared_memory.dispatch(gymnasium.spaces.Text)


class Instruction(gymnasium.spaces.Text):
    """Up to 200 printable characters of ASCII."""

    def __init__(self) -> None:
        super().__init__(200, charset=CHARACTERS)


class LiveTexts(Sequence[str]):
    """The texts that the shared memory holds now; a copy is a tuple of them."""

    def __init__(self, space: Instruction, memory: Any, n: int) -> None:
        self._source = space, memory, n

    def now(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(map(str, _read_texts(*self._source)))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.now()[index]

    def __len__(self) -> int:
        return self._source[2]

    def __copy__(self) -> tuple[str, ...]:
        return self.now()

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return self.now()

    def __repr__(self) -> str:
        return repr(self.now())


@read_from_shared_memory.register(Instruction)
def _read_instructions(space: Instruction, shared_memory: Any, n: int = 1) -> Any:
    return LiveTexts(space, shared_memory, n)
