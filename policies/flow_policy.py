"""A trained policy in the loop: observation -> conditions -> sampled action chunk -> robot units.

B = 1 batch, T frames, K actions, C = 8 action channels.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from selfflow.datasets.normalize import (
    Statistics,
    check_conventions,
    denormalize_action,
    from_json,
    of_embodiment,
    proprio_features,
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
from selfflow.datasets.text import TextEncoder, recorded_encoder
from selfflow.datasets.windows import resize
from selfflow.policies.head import HeadConfig, PolicyModel
from selfflow.worldmodel.batches import codec_of
from selfflow.worldmodel.checkpoint import Checkpoint, CheckpointError, fill, load, parts_of
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.sampler import euler, times
from selfflow.worldmodel.transformer import ModelConfig, Tokens
from selfflow.worldmodel.video_codec import Codec

TERMINATE = ACTION_DIM  # the channel after the action's own


@dataclass(frozen=True)
class Parts:
    """What a policy checkpoint holds, ready to run."""

    model: PolicyModel
    layout: Layout
    codec: Codec
    text: TextEncoder
    robots: Robots
    statistics: Statistics
    decision: dict[str, int]


class FlowPolicy:
    """Samples a chunk of actions by flow matching; fixed by its checkpoint and seed.

    It counts the control steps between its decisions as the actions it returned, up to the first
    with `terminate`, where the rest is dropped. Where the environment advances to the next subtask
    by itself amid a chunk, fewer were executed: the count is then up to execute - 1 steps ahead,
    and of a history (layout.context > 1) the frames before that pass for so much older.
    """

    def __init__(
        self, parts: Parts, robot: Embodiment, steps: int, execute: int, seed: int = 0
    ) -> None:
        if not 1 <= execute <= parts.layout.chunk or steps < 1:
            raise UserError(
                f"execute={execute}, steps={steps}: the chunk has {parts.layout.chunk} actions; "
                f"choose execute=1..{parts.layout.chunk} and steps >= 1"
            )
        self.parts, self.robot, self.embodiment = parts, robot, robot.name
        self.steps, self.execute, self.seed = steps, execute, seed
        self._texts: dict[str, Tensor] = {}
        with torch.inference_mode():
            self._modulations = {
                t: parts.model.head.modulations(torch.tensor([t])) for t in times(steps).tolist()
            }
        self.reset()

    @classmethod
    def load(
        cls,
        path: str | Path,
        embodiment: str = "google_robot",
        steps: int | None = None,
        execute: int | None = None,
        seed: int = 0,
    ) -> "FlowPolicy":
        """From a run or a checkpoint folder; steps (Euler) and execute default to the checkpoint's.

        `embodiment` is one of spec.py's, or one's own that the policy was fine-tuned on. Raises
        UserError where the checkpoint is missing or damaged, is no policy, was made for other
        actions, or has no statistics of this embodiment.
        """
        try:
            given = load(path, "policy")
            with parts_of(given.path):
                robot = robot_of(given, embodiment)
                check_contract(given, robot)
                parts = assemble(given, embodiment)
        except CheckpointError as e:
            raise UserError(str(e)) from e
        decision = parts.decision
        return cls(parts, robot, steps or decision["steps"], execute or decision["execute"], seed)

    def reset(self, seed: int | None = None) -> None:
        """Forgets the frames; the noise follows from the seed (None: the policy's own)."""
        chosen = self.seed if seed is None else seed
        self._random = torch.Generator().manual_seed(chosen)
        self._step = 0
        self._frames: deque[tuple[int, np.ndarray]] = deque()

    @torch.inference_mode()
    def act(self, observation: Observation) -> ActionChunk:
        """The next `execute` actions in physical units, gripper within 0 .. 1."""
        tokens, valid = self._conditions(observation)
        p = self.parts
        head = p.model.head
        memory = head.read(p.model.memory(tokens, valid))
        noise = torch.randn(1, p.layout.chunk, head.config.channels, generator=self._random)

        chunk = euler(lambda x, t: head(x, self._modulations[t], memory), noise, self.steps)[
            0, : self.execute
        ].numpy()
        ends = chunk[:, TERMINATE] > 0
        self._step += int(ends.argmax()) if ends.any() else self.execute
        actions = denormalize_action(chunk[:, :ACTION_DIM], p.statistics)
        actions[:, GRIPPER] = np.clip(actions[:, GRIPPER], 0, 1)
        return ActionChunk(actions.astype(np.float32), ends)

    def _conditions(self, observation: Observation) -> tuple[Tokens, Tokens]:
        layout = self.parts.layout
        camera = self.robot.cameras[0]
        if camera not in observation["images"]:
            have = ", ".join(observation["images"])
            raise ValueError(f"{self.embodiment} needs camera {camera}; the observation has {have}")
        image = resize(observation["images"][camera], layout.height, layout.width)
        frames, frame_valid = self._history(image)
        proprio = proprio_features(observation["proprio"], self.parts.statistics)
        context = self.parts.codec.encode(torch.from_numpy(frames)[:, None])
        return layout.condition_tokens(
            context.flatten(0, 1)[None],
            torch.from_numpy(frame_valid)[None],
            self._text(observation["instruction"]),
            self.parts.robots.tokens([self.embodiment]),
            torch.from_numpy(np.asarray(proprio, np.float32))[None],
            torch.ones(1, dtype=torch.bool),
        )

    def _history(self, image: UInt8[np.ndarray, "H W 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Frames at the layout's offsets: the latest that is old enough; none before step 0."""
        layout = self.parts.layout
        self._frames.append((self._step, image))
        wanted = [self._step + offset for offset in layout.frame_offsets[: layout.context]]
        while len(self._frames) > 1 and self._frames[1][0] <= wanted[0]:
            self._frames.popleft()
        shown = [_latest(self._frames, step) for step in wanted]
        return np.stack(shown), np.array([step >= 0 for step in wanted])

    def _text(self, instruction: str) -> Tensor:
        if instruction not in self._texts:
            self._texts[instruction] = torch.from_numpy(self.parts.text.embed([instruction]))
        return self._texts[instruction]


load_policy: Callable[..., FlowPolicy] = FlowPolicy.load


def robot_of(given: Checkpoint, embodiment: str) -> Embodiment:
    """The robot of this name: the checkpoint's own, else the project's. Raises UserError."""
    own = given.config.get("robots", {})
    if embodiment in own:
        return Embodiment(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in own[embodiment].items()}
        )
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


def assemble(given: Checkpoint, embodiment: str) -> Parts:
    """Modules with the checkpoint's weights, in fp32 on the CPU."""
    config: dict[str, Any] = given.config
    encoder, head = ModelConfig.from_dict(config["model"]), HeadConfig(**config["head"])
    layout, decision = Layout.from_dict(config["layout"]), config["decision"]
    text = recorded_encoder(config["text_encoder"], given.path / "text.safetensors")
    own = layout.modalities(text=(text.tokens, text.channels), rope=encoder.positions == "rope")
    conditions = [m for m in own if m.role == "condition"]
    if list(encoder.modalities) != conditions or head.chunk != layout.chunk:
        raise ValueError("model, head and layout do not belong together")
    if not all(isinstance(decision.get(key), int) for key in ("steps", "execute")):
        raise ValueError(f"decision {decision} needs whole steps and execute")
    model = PolicyModel(encoder, head)
    fill(model, given.weights, str(given.path))
    model.eval().requires_grad_(False)
    robots = Robots(*(tuple(v) for v in config["embodiments"].values()))
    return Parts(
        model,
        layout,
        codec_of(layout),
        text,
        robots,
        from_json(given.statistics)[embodiment],
        decision,
    )


def _latest(frames: Sequence[tuple[int, np.ndarray]], step: int) -> np.ndarray:
    old_enough = [image for at, image in frames if at <= step]
    return old_enough[-1] if old_enough else frames[0][1]
