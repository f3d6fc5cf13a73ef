"""A policy that samples chunks, in the loop: what `decode=head` and `decode=joint` share.

K actions, C = 8 channels.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfflow.datasets.normalize import (
    check_conventions,
    denormalize_action,
    from_json,
    of_embodiment,
)
from selfflow.datasets.spec import (
    ACTION_DIM,
    ACTION_NAMES,
    EMBODIMENTS,
    GRIPPER,
    ActionChunk,
    Embodiment,
    Observation,
    UserError,
)
from selfflow.policies.decoding import TERMINATE, Decoding, Planned, ensembled, soft_mask
from selfflow.policies.observing import Observer, Parts
from selfflow.worldmodel.checkpoint import Checkpoint, CheckpointError, read_json
from selfflow.worldmodel.transformer import Tokens

Pin = tuple[Tensor, Tensor]  # what a chunk shall agree with (K, C), and how firmly (K, 1)


class ChunkPolicy:
    """Samples a chunk of actions a decision; fixed by its checkpoint, its decoding and its seed.

    It counts the control steps between its decisions as the actions it returned, up to the first
    with `terminate`, where the rest is dropped. Where the environment advances to the next subtask
    by itself amid a chunk, fewer were executed: the count is then up to execute - 1 steps ahead,
    and of a history (layout.context > 1) the frames before that pass for so much older.
    What was planned for one subtask is forgotten when the next begins.

    With `delay` d, a decision returns d actions of the last chunk and then `execute` - d of the new
    one, which is what a robot does that computes while it moves; the next decision is then made at
    the step at which such a robot would start to compute. Where there is no last chunk the robot
    would wait: here the new one is executed from its beginning.
    """

    def __init__(
        self, parts: Parts[Any], robot: Embodiment, decoding: Decoding, seed: int = 0
    ) -> None:
        execute, steps = decoding.execute, decoding.steps
        if execute is None or steps is None:
            raise ValueError("execute and steps must be known: see Decoding.settled")
        if decoding.guidance != 1 and not parts.text_dropout:
            raise UserError(
                f"guidance={decoding.guidance}: the checkpoint was trained without text dropout "
                "and does not know acting without text; leave guidance=1, or train with "
                "text_dropout=0.1"
            )
        self.parts, self.robot, self.embodiment = parts, robot, robot.name
        self.decoding, self.steps, self.execute, self.seed = decoding, steps, execute, seed
        self._observer = Observer(parts, robot)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Forgets the episode; the noise follows from the seed (None: the policy's own)."""
        self._random = torch.Generator().manual_seed(self.seed if seed is None else seed)
        self._step = 0
        self._told = ""
        self._chunks: deque[Planned] = deque()  # sampled ones that reach into the future
        self._observer.reset()

    def act(self, observation: Observation) -> ActionChunk:
        """The next `execute` actions in physical units, gripper within 0 .. 1."""
        self._forget(observation["instruction"])
        left = self._left()
        # inference mode spares bookkeeping, but what is made in it cannot be pinned by gradients
        with torch.no_grad(), torch.inference_mode(not self.decoding.delay):
            tokens, valid = self._observer.tokens(observation, self._step)
            chunk = self._sample(tokens, valid, self._pin(left))
        self._chunks.append((self._step, chunk))
        rows = self._joined(chunk, left)
        ends = rows[:, TERMINATE] > 0
        self._step += int(ends.argmax()) if ends.any() else self.execute
        if ends.any():
            self._chunks.clear()
        actions = denormalize_action(rows[:, :ACTION_DIM], self.parts.statistics)
        actions[:, GRIPPER] = np.clip(actions[:, GRIPPER], 0, 1)
        return ActionChunk(actions.astype(np.float32), ends)

    def _sample(self, tokens: Tokens, valid: Tokens, pin: Pin | None) -> np.ndarray:
        """A normalised chunk (K, C) after these conditions, led to agree with `pin`."""
        raise NotImplementedError

    def _forget(self, instruction: str) -> None:
        """Drops chunks that are over, or were planned for another instruction."""
        if instruction != self._told:
            self._chunks.clear()
        self._told = instruction
        while self._chunks and self._chunks[0][0] + self.parts.layout.chunk <= self._step:
            self._chunks.popleft()

    def _left(self) -> np.ndarray:
        """With a delay, the actions of the last chunk from now on: maybe none."""
        if not (self.decoding.delay and self._chunks):
            return np.zeros((0, ACTION_DIM + 1), np.float32)
        at, chunk = self._chunks[-1]
        return chunk[self._step - at :]

    def _pin(self, left: np.ndarray) -> Pin | None:
        if len(left) == 0:
            return None
        chunk = self.parts.layout.chunk
        aim = torch.zeros(chunk, left.shape[1])
        aim[: len(left)] = torch.from_numpy(left)
        return aim, soft_mask(chunk, self.decoding.delay, len(left))[:, None]

    def _joined(self, chunk: np.ndarray, left: np.ndarray) -> np.ndarray:
        """The rows to execute, (execute, C)."""
        if self.decoding.ensemble is not None:
            steps = range(self._step, self._step + self.execute)
            return np.stack([ensembled(self._chunks, s, self.decoding.ensemble) for s in steps])
        going_on = left[: self.decoding.delay]
        return np.concatenate([going_on, chunk[len(going_on) : self.execute]])


def robot_of(given: Checkpoint, embodiment: str) -> Embodiment:
    """The robot of this name: the checkpoint's own, else the project's. Raises UserError."""
    own = given.config.get("robots", {})
    if embodiment in own:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in own[embodiment].items()
        }
        return Embodiment(**values)
    if embodiment not in EMBODIMENTS:
        choices = ", ".join([*EMBODIMENTS, *own])
        raise UserError(f"embodiment={embodiment}: choose one of {choices}")
    return EMBODIMENTS[embodiment]


def check_contract(given: Checkpoint, robot: Embodiment) -> None:
    """Raises UserError unless the checkpoint acts as selfflow.datasets.spec says."""
    have, want = (
        given.config["action"],
        {
            "names": list(ACTION_NAMES),
            "dim": ACTION_DIM,
            "frame": robot.frame,
            "rotation": robot.rotation,
            "gripper": robot.gripper,
        },
    )
    differ = [f"{k} is {have.get(k)}, not {v}" for k, v in want.items() if have.get(k) != v]
    if differ:
        raise UserError(f"checkpoint {given.path} has another action space: {'; '.join(differ)}")
    check_conventions(of_embodiment(from_json(given.statistics), robot.name), robot)


def text_dropout_of(given: Checkpoint) -> float:
    """Share of the training samples that had no text: as the checkpoint says, or its run folder;
    0 where neither does."""
    if "text_dropout" in given.config:
        return float(given.config["text_dropout"])
    run = given.path.parent.parent / "config.json"
    try:
        return float(read_json(run).get("text_dropout", 0.0))
    except CheckpointError:  # a checkpoint by itself
        return 0.0
