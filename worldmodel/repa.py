"""Frozen external teachers for objective=repa: features of clean frames on the model's token grid.

The representation loss then compares the student's feature of every video target token with the
teacher's feature at its place (REPA, arXiv 2410.06940). A teacher is no part of the student: it is
in none of its checkpoints, in eval mode and without gradients.

B batch, T frames, H W pixels, L tokens, D teacher's width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from selfflow.worldmodel.checkpoint import RunError

AT_ONCE = 64  # frames that go through a vision encoder together


@runtime_checkable
class Teacher(Protocol):
    """What gives the features."""

    width: int  # D

    def features(
        self, frames: UInt8[Tensor, "B T H W 3"]
    ) -> Float[Tensor, "B time rows columns D"]:
        """A grid of features for every frame, or for fewer than frames if it compresses time."""
        ...


class ModuleTeacher:
    """A given module or function of uint8 frames (B, T, H, W, 3) -> (B, times · rows · columns, D).

    Its tokens lie frame by frame, row by row on `grid` (rows, columns). What else a teacher needs
    it closes over: a trained world model becomes one as a function that encodes the frames as its
    context tokens and returns their features after a block.
    """

    def __init__(
        self, module: Callable[[Tensor], Tensor], width: int, grid: tuple[int, int]
    ) -> None:
        self.module = frozen(module) if isinstance(module, nn.Module) else module
        self.width, self.grid = width, grid

    @torch.no_grad()
    def features(
        self, frames: UInt8[Tensor, "B T H W 3"]
    ) -> Float[Tensor, "B time rows columns D"]:
        """See Teacher. Raises RunError if the module's answer does not fill the grid."""
        x, (rows, columns) = self.module(frames), self.grid
        if x.ndim != 3 or x.shape[1] % (rows * columns) or x.shape[2] != self.width:
            raise RunError(
                f"teacher: features {tuple(x.shape)} do not fill grids of {rows} x {columns} x "
                f"{self.width}; give the module's own grid and width"
            )
        return rearrange(x, "b (t r c) d -> b t r c d", r=rows, c=columns)


class VisionTeacher:
    """A vision transformer of `transformers` from a local folder or hub id, applied frame by frame.

    ViT, DINOv2 and 3, CLIP, SigLIP and the like. Frames are squeezed, not cropped, to the size of
    its image processor, so that its grid of patches covers the whole frame, and normalised with the
    processor's mean and standard deviation. Class and register tokens are dropped.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        model, processor = _pretrained(name)
        self.model, self.name = frozen(model).to(device), name
        config: Any = model.config
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or not {"image_mean", "image_std"} <= processor.keys():
            raise RunError(
                f"teacher={name}: needs a model with square patches and a preprocessor_config.json "
                "with image_mean and image_std, such as ViT, DINOv2, CLIP or SigLIP"
            )
        self.width = config.hidden_size
        self.size = _size(processor, config.image_size)
        self.grid = (self.size[0] // patch, self.size[1] // patch)
        self.mean = torch.tensor(processor["image_mean"]).view(3, 1, 1)
        self.std = torch.tensor(processor["image_std"]).view(3, 1, 1)

    @torch.no_grad()
    def features(
        self, frames: UInt8[Tensor, "B T H W 3"]
    ) -> Float[Tensor, "B time rows columns D"]:
        """The last hidden state of every frame's patches, fp32, on the frames' device."""
        flat = rearrange(frames, "b t h w c -> (b t) c h w")
        parts = [self._patches(part) for part in flat.split(AT_ONCE)]
        rows, columns = self.grid
        return rearrange(
            torch.cat(parts), "(b t) (r c) d -> b t r c d", t=frames.shape[1], r=rows, c=columns
        )

    def prepare(self, images: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 height width"]:
        """Pixels as the model was trained on them."""
        x = F.interpolate(images.float() / 255, self.size, mode="bilinear", antialias=True)
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def _patches(self, images: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        pixels = self.prepare(images.to(weight.device)).to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            states = self.model(pixel_values=pixels).last_hidden_state
        count = self.grid[0] * self.grid[1]
        if states.ndim != 3 or states.shape[1] < count:
            raise RunError(
                f"teacher={self.name}: states {tuple(states.shape)} for a grid of {self.grid}; "
                "choose an encoder with one token a patch, such as ViT, DINOv2, CLIP or SigLIP"
            )
        return states[:, -count:].float().to(images.device)  # class and registers come first


def frozen(module: nn.Module) -> nn.Module:
    """In eval mode, without gradients."""
    return module.requires_grad_(False).eval()


def align_grid(
    features: Float[Tensor, "B T r c D"], grid: tuple[int, int, int]
) -> Float[Tensor, "B time rows columns D"]:
    """Features on the token grid (times, rows, columns).

    Rows and columns: bilinear, averaging where the token grid is coarser. Times: a causal codec's
    1 + (T - 1) / n latent frames take the first frame and then the means of n; other numbers of
    latent frames take means over equal (overlapping where need be) stretches.
    """
    batch, frames = features.shape[:2]
    x = rearrange(features, "b t r c d -> (b t) d r c")
    if x.shape[2:] != grid[1:]:
        x = F.interpolate(x, grid[1:], mode="bilinear", antialias=True)
    x = rearrange(x, "(b t) d r c -> b (r c d) t", b=batch)
    if frames != grid[0]:
        causal = 1 < grid[0] < frames and (frames - 1) % (grid[0] - 1) == 0
        first, rest = (x[..., :1], x[..., 1:]) if causal else (x[..., :0], x)
        pooled = F.adaptive_avg_pool1d(rest, grid[0] - first.shape[-1])
        x = torch.cat([first, pooled], -1)
    return rearrange(x, "b (r c d) t -> b t r c d", r=grid[1], c=grid[2])


def _pretrained(name: str) -> tuple[Any, dict[str, Any]]:
    """The vision part of a pretrained model, and its image processor's settings."""
    try:
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as e:
        raise RunError(f"teacher={name} needs transformers: pip install 'selfflow[repa]'") from e
    local = Path(name).exists()
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=local)
        # safetensors only: the other format is a pickle
        model = AutoModel.from_pretrained(name, use_safetensors=True, local_files_only=local)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise RunError(
            f"teacher={name} does not load ({reason}); give a hub id or a folder with config.json, "
            "preprocessor_config.json and model.safetensors"
        ) from e
    return getattr(model, "vision_model", model), processor


def _size(processor: dict[str, Any], default: int) -> tuple[int, int]:
    """(height, width) of what an image processor hands to its model."""
    size = processor.get("crop_size") or processor.get("size") or default
    if isinstance(size, int):
        return size, size
    side = size.get("shortest_edge", default)
    return size.get("height", side), size.get("width", side)
