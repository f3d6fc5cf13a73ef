"""Baselines that look at nothing: what a task scores without a policy."""

import numpy as np

from selfflow.datasets.spec import (
    ACTION_DIM,
    GRIPPER,
    OPENING,
    POSITION,
    ROTATION,
    ActionChunk,
    Observation,
)


class HoldStill:
    """Keeps the pose and the gripper as they are."""

    def __init__(self, embodiment: str = "google_robot", chunk: int = 4) -> None:
        self.embodiment, self.chunk = embodiment, chunk

    def reset(self, seed: int | None = None) -> None:
        """Nothing to forget."""

    def act(self, observation: Observation) -> ActionChunk:
        """Zero motion, the sensed gripper opening as its target."""
        actions = np.zeros((self.chunk, ACTION_DIM), np.float32)
        actions[:, GRIPPER] = np.clip(observation["proprio"][OPENING], 0, 1)
        return ActionChunk(actions)


class RandomWalk:
    """Normal motion of a given step size (m, rad), uniform gripper."""

    def __init__(
        self,
        embodiment: str = "google_robot",
        chunk: int = 4,
        metres: float = 0.02,
        radians: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.embodiment, self.chunk = embodiment, chunk
        self.metres, self.radians = metres, radians
        self.rng = np.random.default_rng(seed)

    def reset(self, seed: int | None = None) -> None:
        """Without a seed the stream of draws goes on."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)

    def act(self, observation: Observation) -> ActionChunk:
        """A fresh draw for every action."""
        actions = self.rng.standard_normal((self.chunk, ACTION_DIM)).astype(np.float32)
        actions[:, POSITION] *= self.metres
        actions[:, ROTATION] *= self.radians
        actions[:, GRIPPER] = self.rng.random(self.chunk)
        return ActionChunk(actions)
