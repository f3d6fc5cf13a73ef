"""A trained world model as the frozen teacher of objective=repa, of the student's own size, say.

Every frame is shown as the context, clean and alone: text, robot, proprioception and earlier frames
are absent (their learned nulls), so that a feature tells of its frame only. The teacher's feature
is the raw residual stream after the block at `share` of its depth, as an EMA teacher's.

B batch, T frames, L tokens, C channels, D width.
"""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from selfflow.worldmodel import checkpoint
from selfflow.worldmodel.codec import make_codec
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.repa import ModuleTeacher, Teacher, VisionTeacher, frozen
from selfflow.worldmodel.transformer import VideoActionTransformer


def make_teacher(name: str, share: float, size: tuple[int, int], device: torch.device) -> Teacher:
    """A run or checkpoint folder of worldmodel/train.py as a world model, all else as a vision
    encoder of transformers; `size` are the frames' height and width. Raises RunError."""
    path = Path(name)
    ours = checkpoint.last(path) is not None or (path / "stats.json").is_file()
    return world_teacher(path, share, size, device) if ours else VisionTeacher(name, device)


def world_teacher(
    path: Path, share: float, size: tuple[int, int], device: torch.device
) -> ModuleTeacher:
    """See the module's docstring. Raises RunError where its frames have another size."""
    given = checkpoint.load(path, "worldmodel")
    with checkpoint.parts_of(given.path):
        config = ModelConfig.from_dict(given.config["model"])
        layout = Layout.from_dict(given.config["layout"])
        model = VideoActionTransformer(config)
        checkpoint.fill(model, given.part("backbone"), str(given.path))
        codec = make_codec(layout.codec, layout.height, layout.width, layout.patch, device)
    if (layout.height, layout.width) != size:
        raise RunError(
            f"teacher={path} sees {layout.height} x {layout.width} pixels, this run {size[0]} x "
            f"{size[1]}: give layout.height and layout.width of the teacher"
        )
    frozen(model).to(device)
    block, (_, rows, columns) = config.block_at(share), layout.grid(1)

    def features(frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B L D"]:
        shown = codec.encode(frames.flatten(0, 1)[:, None].to(device))
        found = _alone(model, shown, block).unflatten(0, frames.shape[:2])
        return found.flatten(1, 2).float().to(frames.device)

    return ModuleTeacher(features, config.hidden, (rows, columns))


def _alone(
    model: VideoActionTransformer, frame: Float[Tensor, "N L C"], block: int
) -> Float[Tensor, "N L D"]:
    """Features of frames whose tokens are the last ones of the context; all else is absent."""
    tokens, valid, length = {}, {}, frame.shape[1]
    for m in model.config.conditions:
        tokens[m.name] = frame.new_zeros(len(frame), m.length, m.channels)
        valid[m.name] = torch.zeros(len(frame), m.length, dtype=torch.bool, device=frame.device)
    tokens["context"][:, -length:], valid["context"][:, -length:] = frame, True
    names = [m.name for m in model.config.conditions]
    behind = sum(m.length for m in model.config.conditions[names.index("context") + 1 :])
    now = frame.new_zeros(len(frame))
    with torch.autocast(frame.device.type, enabled=False):
        found = model.condition_features(tokens, now, valid, block)
    return found[:, found.shape[1] - behind - length : found.shape[1] - behind]
