"""`decode=joint`: video and actions denoised together by the whole backbone, as in the paper.

Conditions are run once a decision where attention is `prefix`. B = 1 batch, K actions, C channels,
F future frames.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from selfflow.policies.judging import Eyes, Judge, Sharing, load_judge, repeated
from selfflow.policies.observing import Parts
from selfflow.policies.quick import quicken
from selfflow.worldmodel.batches import codec_of
from selfflow.worldmodel.checkpoint import Checkpoint, CheckpointError, fill, load, parts_of
from selfflow.worldmodel.dream import Sampling, dream
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.sampler import Velocity, pack
from selfflow.worldmodel.transformer import ModelConfig, Tokens, VideoActionTransformer


class JointPolicy(ChunkPolicy):
    """Acts with the action tokens of a world model; by default it executes all of them.

    While `imagine` is set, `imagined` holds the last decision's video: frames (F, H, W, 3) and the
    control steps between two of them, of which the first lies so long after the decision.
    """

    def __init__(
        self,
        parts: Parts[VideoActionTransformer],
        robot: Embodiment,
        decoding: Decoding,
        seed: int = 0,
        judge: Judge | None = None,
    ) -> None:
        if decoding.best_of > 1 and judge is None:
            raise ValueError("best_of above 1 needs a judge: see JointPolicy.load")
        self.imagine, self._judge = False, judge
        super().__init__(parts, robot, decoding, seed)

    @classmethod
    def load(
        cls, path: str | Path, embodiment: str = "google_robot", seed: int = 0, **decoding: Any
    ) -> "JointPolicy":
        """From a run or checkpoint folder of worldmodel/train.py, or any that holds the whole
        backbone; `decoding` as of FlowPolicy.load. Raises UserError."""
        wanted = Decoding(**decoding)
        try:
            given = load(path)
            with parts_of(given.path):
                check_whole(given)
                robot = robot_of(given, embodiment)
                check_contract(given, robot)
                parts = assemble_whole(given, embodiment)
            quicken(parts.model)
            eyes, best_of = Eyes(parts.model, parts.layout, parts.codec), wanted.best_of
            judge = load_judge(given, eyes, best_of) if best_of > 1 else None
        except CheckpointError as e:
            raise UserError(str(e)) from e
        chunk = parts.layout.chunk
        settled = wanted.settled(Sampling().steps, chunk, chunk)
        return cls(parts, robot, settled, seed, judge)

    def reset(self, seed: int | None = None) -> None:
        """Forgets the episode and what was imagined in it."""
        super().reset(seed)
        self.imagined: tuple[np.ndarray, int] | None = None

    def _sample(self, tokens: Tokens, valid: Tokens, pin: Pin | None) -> np.ndarray:
        def steer(field: Velocity, like: Tokens) -> Velocity:
            assert pin is not None
            aim, weight = ({m: torch.zeros_like(x) for m, x in like.items()} for _ in range(2))
            aim["action"] += pin[0]
            weight["action"] += pin[1]
            return pinned(field, pack(aim), pack(weight))

        count = self.decoding.best_of
        rows = repeated(tokens, count)
        found = dream(
            Sharing(self.parts.model),
            rows,
            repeated(valid, count),
            self.decoding.sampling,
            self._random,
            steer=steer if pin else None,
        )
        layout = self.parts.layout
        best, frames = 0, None
        if layout.future and (self.imagine or count > 1):
            frames = self.parts.codec.decode(found["video"])
        if count > 1:
            assert self._judge
            assert frames is not None
            best = int(self._judge.worth(frames[:, -1], rows).argmax())
        if self.imagine and frames is not None:
            self.imagined = frames[best, -layout.future :].numpy(), layout.stride
        return found["action"][best].numpy()


def check_whole(given: Checkpoint) -> None:
    """Raises CheckpointError unless the checkpoint can denoise actions with its backbone."""
    if given.config["kind"] not in ("worldmodel", "policy"):
        raise CheckpointError(f"checkpoint {given.path} is no world model; give one that acts")
    model = ModelConfig.from_dict(given.config["model"])
    if "action" not in [m.name for m in model.targets]:
        raise CheckpointError(
            f"checkpoint {given.path} holds only the backbone's first {model.depth} blocks, which "
            "read conditions; decode=joint needs all of it: give a run of worldmodel/train.py, or "
            "decode=head"
        )


def assemble_whole(given: Checkpoint, embodiment: str) -> Parts[VideoActionTransformer]:
    """Modules with the checkpoint's weights, in fp32 on the CPU."""
    config = given.config
    layout = Layout.from_dict(config["layout"])
    model = VideoActionTransformer(ModelConfig.from_dict(config["model"]))
    fill(model, given.part("backbone"), str(given.path))
    robots = Robots(*(tuple(config["embodiments"][key]) for key in ("names", "rates")))
    return Parts(
        model.eval().requires_grad_(False),
        layout,
        codec_of(layout),
        recorded_encoder(config["text_encoder"], given.path / "text.safetensors"),
        robots,
        from_json(given.statistics)[embodiment],
        {},
        text_dropout_of(given),
    )
