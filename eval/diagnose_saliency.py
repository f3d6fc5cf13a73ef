"""Where a policy looks: how much its next actions change when a part of the picture is covered.

R rows and C columns of parts, K actions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from selfflow.datasets.spec import GRIPPER, POSITION, ROTATION, ActionChunk, Observation
from selfflow.envs.base import RobotEnv
from selfflow.eval.rollout import Episode, Info, run_episode
from selfflow.policies.base import Policy
from selfflow.policies.limits import Limiter

Decide = Callable[[Observation], Float[np.ndarray, "K 7"]]
KINDS = ("position", "rotation", "opening")  # of a change: m, rad, and the gripper's share
GLOW = np.array([255.0, 40.0, 0.0])


class Noted:
    """A policy that keeps what it was asked: (step, observation) by decision."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.embodiment = policy, policy.embodiment
        self.step = 0
        self.decisions: list[tuple[int, Observation]] = []

    def reset(self, seed: int | None = None) -> None:
        """Forgets them."""
        self._policy.reset(seed)
        self.step, self.decisions = 0, []

    def act(self, observation: Observation) -> ActionChunk:
        """As the policy itself."""
        self.decisions.append((self.step, observation))
        return self._policy.act(observation)


def run_again(
    env: RobotEnv, policy: Policy, seed: int, limiter: Limiter | None
) -> tuple[Episode, list[tuple[int, Observation]], Observation]:
    """The seed's episode once more, what the policy was asked, and what was seen last."""
    noted, last = Noted(policy), {}

    def record(observation: Observation, info: Info, step: int) -> None:
        noted.step = step
        last["seen"] = observation

    episode = run_episode(env, noted, seed, record, limiter=limiter)
    return episode, noted.decisions, last["seen"]


def same(one: Episode, other: Episode) -> bool:
    """Whether two runs of a seed came to the same; times taken do not count."""
    return replace(one, latencies=()) == replace(other, latencies=())


def decider(policy: Policy, before: Sequence[Observation], seed: int) -> Decide:
    """The decision after these observations, always with the seed's noise."""

    def decide(observation: Observation) -> np.ndarray:
        policy.reset(seed)
        for earlier in before:
            policy.act(earlier)
        return policy.act(observation).actions

    return decide


def saliency(
    decide: Decide, observation: Observation, camera: str, rows: int, columns: int
) -> Float[np.ndarray, "3 R C"]:
    """By kind, the norm of the change of the decision, mean over its actions, when this part of the
    camera's picture is painted in the picture's mean colour. Rotations are compared as axis-angle
    vectors, which is exact to third order in such small ones."""
    plain = decide(observation).astype(np.float64)
    found = np.zeros((len(KINDS), rows, columns))
    for (row, column), picture in covered(observation["images"][camera], rows, columns):
        images = {**observation["images"], camera: picture}
        change = decide({**observation, "images": images}) - plain
        found[:, row, column] = (
            np.linalg.norm(change[:, POSITION], axis=1).mean(),
            np.linalg.norm(change[:, ROTATION], axis=1).mean(),
            np.abs(change[:, GRIPPER]).mean(),
        )
    return found


def covered(
    image: UInt8[np.ndarray, "H W 3"], rows: int, columns: int
) -> Iterator[tuple[tuple[int, int], UInt8[np.ndarray, "H W 3"]]]:
    """The picture with one part after the other in its mean colour; parts tile it exactly."""
    colour = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
    ys = np.linspace(0, image.shape[0], rows + 1).round().astype(int)
    xs = np.linspace(0, image.shape[1], columns + 1).round().astype(int)
    for row in range(rows):
        for column in range(columns):
            picture = image.copy()
            picture[ys[row] : ys[row + 1], xs[column] : xs[column + 1]] = colour
            yield (row, column), picture


def overlaid(
    image: UInt8[np.ndarray, "H W 3"], heat: Float[np.ndarray, "R C"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in grey, red where the heat is greatest."""
    height, width = image.shape[:2]
    share = heat / max(float(heat.max()), 1e-12)
    map_ = Image.fromarray((255 * share).round().astype(np.uint8))
    glow = np.asarray(map_.resize((width, height), Image.Resampling.NEAREST))[..., None] / 255
    grey = np.repeat(image.mean(2, keepdims=True) * 0.7 + 60, 3, 2).clip(0, 255)
    return (grey + 0.8 * glow * (GLOW - grey)).round().clip(0, 255).astype(np.uint8)
