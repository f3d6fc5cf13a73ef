"""`decode=head`: a trained policy in the loop, whose action head reads kept backbone features.

B = 1 batch, K actions, C = 8 action channels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfflow.datasets.normalize import from_json
from selfflow.datasets.spec import Embodiment, UserError
from selfflow.datasets.text import recorded_encoder
from selfflow.policies.acting import (
    ChunkPolicy,
    Pin,
    check_contract,
    robot_of,
    text_dropout_of,
)
from selfflow.policies.decoding import Decoding, pinned
from selfflow.policies.head import HeadConfig, Modulations, PolicyModel
from selfflow.policies.joint_policy import JointPolicy
from selfflow.policies.judging import Eyes, Judge, load_judge
from selfflow.policies.observing import Parts
from selfflow.policies.quick import quicken
from selfflow.worldmodel.batches import codec_of
from selfflow.worldmodel.checkpoint import Checkpoint, CheckpointError, fill, load, parts_of
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.sampler import SOLVERS, Velocity, guided
from selfflow.worldmodel.transformer import ModelConfig, Tokens


class FlowPolicy(ChunkPolicy):
    """Samples chunks by flow matching with the action head; the backbone is run once a decision."""

    def __init__(
        self,
        parts: Parts[PolicyModel],
        robot: Embodiment,
        decoding: Decoding,
        seed: int = 0,
        judge: Judge | None = None,
    ) -> None:
        if decoding.best_of > 1 and judge is None:
            raise ValueError("best_of above 1 needs a judge: see FlowPolicy.load")
        self._judge = judge
        self._head = parts.model.head
        self._modulations: dict[float, Modulations] = {}
        super().__init__(parts, robot, decoding, seed)

    @classmethod
    def load(
        cls, path: str | Path, embodiment: str = "google_robot", seed: int = 0, **decoding: Any
    ) -> "FlowPolicy":
        """From a run or a checkpoint folder; `decoding` are fields of Decoding, by default the
        checkpoint's own.

        `embodiment` is one of spec.py's, or one's own that the policy was fine-tuned on. Raises
        UserError where the checkpoint is missing or damaged, is no policy, was made for other
        actions, has no statistics of this embodiment, or cannot be decoded so.
        """
        wanted = Decoding(**decoding)
        try:
            given = load(path, "policy")
            with parts_of(given.path):
                robot = robot_of(given, embodiment)
                check_contract(given, robot)
                parts = assemble(given, embodiment)
            quicken(parts.model.backbone)
            quicken(parts.model.head, copies=True)
            eyes = Eyes(parts.model.backbone, parts.layout, parts.codec)
            best_of = wanted.best_of
            judge = load_judge(given, eyes, best_of) if best_of > 1 else None
        except CheckpointError as e:
            raise UserError(str(e)) from e
        own, chunk = parts.decision, parts.layout.chunk
        settled = wanted.settled(own["steps"], own["execute"], chunk)
        return cls(parts, robot, settled, seed, judge)

    def _sample(self, tokens: Tokens, valid: Tokens, pin: Pin | None) -> np.ndarray:
        field = self._field(tokens, valid)
        if self.decoding.guidance != 1:
            blank = valid | {"text": torch.zeros(tokens["text"].shape[:2], dtype=torch.bool)}
            field = guided(field, self._field(tokens, blank), self.decoding.guidance)
        if pin is not None:
            field = pinned(field, *pin)
        count = self.decoding.best_of
        shape = count, self.parts.layout.chunk, self._head.config.channels
        noise = torch.randn(shape, generator=self._random)
        solve = SOLVERS[self.decoding.solver]
        chunks = solve(field, noise, self.steps, generator=self._random)
        best = 0
        if count > 1:
            assert self._judge
            best = self._judge.best(tokens, valid, chunks, self._random)
        return chunks[best].numpy()

    def _field(self, tokens: Tokens, valid: Tokens) -> Velocity:
        """The head's velocity on a kept pass over these conditions."""
        memory = self._head.read(self.parts.model.memory(tokens, valid))

        def velocity(x: Tensor, t: float) -> Tensor:
            if t not in self._modulations:  # the times are the same at every decision
                self._modulations[t] = self._head.modulations(torch.tensor([t]))
            return self._head(x, self._modulations[t], memory)

        return velocity


def load_policy(
    path: str | Path, embodiment: str = "google_robot", seed: int = 0, **decoding: Any
) -> FlowPolicy | JointPolicy:
    """The policy of a run or checkpoint folder: see FlowPolicy.load, and with decode="joint"
    JointPolicy.load."""
    kind = JointPolicy if Decoding(**decoding).decode == "joint" else FlowPolicy
    return kind.load(path, embodiment, seed, **decoding)


def assemble(given: Checkpoint, embodiment: str) -> Parts[PolicyModel]:
    """Modules with the checkpoint's weights, in fp32 on the CPU."""
    config: dict[str, Any] = given.config
    encoder, head = ModelConfig.from_dict(config["model"]), HeadConfig(**config["head"])
    layout, decision = Layout.from_dict(config["layout"]), config["decision"]
    text = recorded_encoder(config["text_encoder"], given.path / "text.safetensors")
    own = layout.modalities(text=(text.tokens, text.channels), rope=encoder.positions == "rope")
    conditions = [m for m in own if m.role == "condition"]
    if list(encoder.conditions) != conditions or head.chunk != layout.chunk:
        raise ValueError("model, head and layout do not belong together")
    if not all(isinstance(decision.get(key), int) for key in ("steps", "execute")):
        raise ValueError(f"decision {decision} needs whole steps and execute")
    model = PolicyModel(encoder, head, config.get("read_block"))
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
        text_dropout_of(given),
    )
