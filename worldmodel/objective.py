"""The pretraining loss: what the student is asked, and what its moving average answers for it.

B batch, L tokens, D width of the student, W width of the teacher; t = 1 noise, t = 0 data.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from selfflow.datasets.windows import Batch
from selfflow.worldmodel import flow
from selfflow.worldmodel.batches import Inputs, autocast
from selfflow.worldmodel.layers import Projector
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.repa import Teacher, align_grid
from selfflow.worldmodel.train_config import TrainConfig
from selfflow.worldmodel.transformer import Tokens, VideoActionTransformer

Responds = Callable[..., tuple[Tokens, Tensor | None]]  # a Student, or a policy that keeps its loss


class Student(nn.Module):
    """What is trained. Its moving average is the teacher and needs no projector, but has one."""

    def __init__(self, config: ModelConfig, aim: int | None = None, layers: int = 2) -> None:
        super().__init__()
        self.backbone = VideoActionTransformer(config)
        self.projector = Projector(config.hidden, aim, layers)

    def forward(
        self, seen: flow.Noised, valid: Tokens, block: int | None, rows: slice, raw: bool = False
    ) -> tuple[Tokens, Tensor | None]:
        """`respond` of this backbone and projector."""
        return respond(self.backbone, self.projector, seen, valid, block, rows, raw)


def respond(
    backbone: VideoActionTransformer,
    projector: nn.Module,
    seen: flow.Noised,
    valid: Tokens,
    block: int | None,
    rows: slice,
    raw: bool = False,
) -> tuple[Tokens, Tensor | None]:
    """Velocities, and the projected feature of those rows after `block` if one is named.

    raw: no velocities, and the feature as it is, later blocks not run: what a teacher is for.
    """
    inputs = seen.tokens, seen.tau, seen.group, valid
    if raw and block:
        return {}, backbone.features(*inputs, block=block, by_role=True)[:, rows]
    velocity, feature = backbone.forward_with_feature(*inputs, block=block)
    return velocity, None if feature is None else projector(feature[:, rows])


def losses(
    student: Responds,
    average: Responds,
    inputs: Inputs,
    config: TrainConfig,
    random: torch.Generator,
    external: Tensor | None = None,
) -> dict[str, Tensor]:
    """`loss` and its terms for one batch, all with one draw of times, mask and noise.

    `student` and `average` answer as `Student` does. `external` (B, rows, W) is what an external
    teacher says of the tokens `config.aligned`.
    """
    model, schedule, rows = config.transformer, config.noise, config.aligned
    noised = flow.draw(inputs.tokens, model, schedule, random)
    shares = {m.name: config.text_dropout for m in model.conditions if m.name == "text"}
    valid = flow.dropped(inputs.tokens, inputs.valid, shares, random)
    student_block, teacher_block = config.blocks
    with autocast(config, noised.tau.device):
        aligned = schedule.alignment != "none"
        velocity, feature = student(noised, valid, student_block if aligned else None, rows)
        terms = flow.flow_loss(velocity, noised.velocity, inputs.mask)
        loss = torch.stack([m.weight * terms[m.name] for m in model.targets]).sum()
        if schedule.alignment == "ema":
            seen = flow.teacher_view(noised, inputs.tokens, model)
            with torch.no_grad():
                _, external = average(seen, valid, teacher_block, rows, raw=True)
        if external is not None:
            assert feature is not None
            real = replace(inputs, valid=valid).all_valid(model)[:, rows]
            terms["rep"] = flow.representation_loss(feature, external.to(feature.device), real)
            terms["cosine"] = 1 - terms["rep"].detach()
            loss = loss + config.gamma * terms["rep"]
    return {"loss": loss} | terms


def external_aim(teacher: Teacher, batch: Batch, config: TrainConfig) -> Tensor:
    """The teacher's features of the clean target frames, on the grid of the video tokens."""
    frames = torch.from_numpy(batch.frames)[:, config.layout.first_target :]
    video = next(m for m in config.transformer.targets if m.name == "video")
    return align_grid(teacher.features(frames), video.grid).flatten(1, 3)
