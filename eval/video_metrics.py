"""How like the real ones predicted frames are: PSNR, SSIM, LPIPS by frame, FVD by set of clips.

LPIPS and FVD compare features of a trained network, which is loaded from a local path:

| metric | of | path |
|---|---|---|
| lpips_alex | LPIPS 0.1, its linear layers from torchmetrics | torchvision's AlexNet: a file |
| fvd_NAME | its last features, mean-pooled | a `transformers` video encoder: the folder NAME |

Without a path a small frozen network with random weights stands in, and the metric is called
`lpips_random` or `fvd_random`. It orders blur, noise and wrong motion sensibly, but its numbers
compare with nothing outside the same report.

N images or clips, T frames, C channels, F features.
"""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfflow.datasets.spec import UserError

Images = UInt8[Tensor, "N H W 3"]
Clips = UInt8[Tensor, "N T H W 3"]
RANDOM_FEATURES = 64  # few, so that some hundred clips give a covariance of full rank
CHUNK = 16  # images or clips at a time


def psnr(images: Images, real: Images) -> Float[Tensor, "N"]:
    """Decibels; infinite for equal images."""
    error = (images.float() - real.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def ssim(images: Images, real: Images) -> Float[Tensor, "N"]:
    """Structural similarity over windows of 11 x 11, 1 for equal images."""
    functional = torchmetrics_images()
    scaled = (_channels_first(images), _channels_first(real))
    return functional.structural_similarity_index_measure(
        *scaled, data_range=1.0, reduction="none"
    ).reshape(-1)


class Lpips(nn.Module):
    """AlexNet's five rectified maps, normalised over channels; weighted squared differences."""

    LAYERS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1))
    LAYERS += ((384, 256, 3, 1, 1), (256, 256, 3, 1, 1))  # in, out, kernel, stride, padding
    INDEX = (0, 3, 6, 8, 10)  # of these convolutions in torchvision's `features`

    def __init__(self, path: str | None = None) -> None:
        """Random weights, always the same, without a path. Raises UserError."""
        super().__init__()
        self.name = "lpips_alex" if path else "lpips_random"
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, k, stride=s, padding=p) for i, o, k, s, p in self.LAYERS
        )
        if path:
            self._fill(Path(path).expanduser())
        else:
            freeze_random(self)
            self.weights = [torch.full((o,), 1.0) for _, o, _, _, _ in self.LAYERS]
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Images, real: Images) -> Float[Tensor, "N"]:
        """0 for equal images."""
        pairs = zip(images.split(CHUNK), real.split(CHUNK), strict=True)
        return torch.cat([self._distance(a, b) for a, b in pairs])

    def _distance(self, images: Tensor, real: Tensor) -> Tensor:
        total = torch.zeros(len(images))
        maps = zip(self._maps(images), self._maps(real), self.weights, strict=True)
        for a, b, weight in maps:
            total += ((a - b).square() * weight[:, None, None]).sum(1).mean((1, 2))
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        x, maps = (_channels_first(images) * 2 - 1 - shift) / scale, []
        for number, layer in enumerate(self.layers):
            if number in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(layer(x))
            maps.append(x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return maps

    def _fill(self, path: Path) -> None:
        found = _official(path)
        for index, layer in zip(self.INDEX, self.layers, strict=True):
            for part in ("weight", "bias"):
                key, own = f"features.{index}.{part}", getattr(layer, part)
                if key not in found or found[key].shape != own.shape:
                    raise UserError(f"lpips={path}: no {key} of {tuple(own.shape)}: not AlexNet's")
                own.data.copy_(found[key])
        package = importlib.util.find_spec("torchmetrics")
        if package is None or package.origin is None:
            raise UserError("lpips=...: needs torchmetrics; pip install 'selfflow[metrics]'")
        linear = _official(Path(package.origin).parent / "functional/image/lpips_models/alex.pth")
        self.weights = [linear[f"lin{i}.model.1.weight"].flatten() for i in range(5)]


class RandomVideoNet(nn.Module):
    """Three 3-D convolutions with random weights, always the same; mean over space and time."""

    name = "fvd_random"

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, RANDOM_FEATURES)
        self.layers = nn.ModuleList(
            nn.Conv3d(i, o, (2, 3, 3), stride=(1, 2, 2), padding=(1, 1, 1))
            for i, o in pairwise(widths)
        )
        freeze_random(self)

    def forward(self, clips: Clips) -> Float[Tensor, "N F"]:
        """Features of clips, made 64 x 80 pixels."""
        x = _channels_first(clips.flatten(0, 1)) * 2 - 1
        x = F.interpolate(x, (64, 80), mode="area")
        x = x.unflatten(0, clips.shape[:2]).transpose(1, 2)
        for layer in self.layers:
            x = F.relu(layer(x))
        return 100 * x.mean((2, 3, 4))  # so that distances are of a size that is easily read


class TransformersVideoNet(nn.Module):
    """A `transformers` video encoder from a local folder; mean over its last hidden states."""

    def __init__(self, path: str) -> None:
        super().__init__()
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"fvd={path}: no config.json; give the folder of a video encoder")
        try:
            from transformers import AutoModel
        except ModuleNotFoundError as e:
            raise UserError("fvd=...: needs transformers; pip install 'selfflow[metrics]'") from e
        try:
            self.model = AutoModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as e:
            raise UserError(f"fvd={path}: {' '.join(str(e).split())[:300]}") from e
        self.name = f"fvd_{folder.resolve().name}"
        self.mean, self.std = _normalisation(folder)
        self.eval().requires_grad_(False)

    def forward(self, clips: Clips) -> Float[Tensor, "N F"]:
        """Features of clips, resized and with frames repeated to what the encoder takes."""
        config: Any = self.model.config
        frames = int(getattr(config, "num_frames", clips.shape[1]))
        at = torch.linspace(0, clips.shape[1] - 1, frames).round().long()
        x = _channels_first(clips[:, at].flatten(0, 1))
        size = (config.image_size, config.image_size)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.std).unflatten(0, (len(clips), frames))
        return self.model(pixel_values=x).last_hidden_state.mean(1)


VideoNet = RandomVideoNet | TransformersVideoNet


def video_net(path: str | None) -> VideoNet:
    """The encoder of that folder, or the random one. Raises UserError."""
    return TransformersVideoNet(path) if path else RandomVideoNet()


@torch.no_grad()
def clip_features(net: VideoNet, clips: Clips) -> Float[np.ndarray, "N F"]:
    """Features in float64, some clips at a time."""
    return torch.cat([net(part) for part in clips.split(CHUNK)]).double().numpy()


def weighted_moments(
    x: Float[np.ndarray, "N F"], weights: Float[np.ndarray, "N"]
) -> tuple[Float[Tensor, "F"], Float[Tensor, "F F"]]:
    """Mean and covariance of rows that count so often each, for eval.images.frechet.

    The distance is biased upwards by about F² / N: compare sets of one size only.
    """
    mean = weights @ x / weights.sum()
    centred = x - mean
    covariance = (centred.T * weights) @ centred / max(weights.sum() - 1, 1)
    return torch.from_numpy(mean), torch.from_numpy(covariance)


def freeze_random(module: nn.Module, seed: int = 0) -> None:
    """He-normal weights and small biases from the seed; nothing learns."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data.normal_(0, (2 / fan) ** 0.5, generator=generator)
    module.eval().requires_grad_(False)


def _channels_first(images: Tensor) -> Float[Tensor, "N 3 H W"]:
    return images.permute(0, 3, 1, 2).float() / 255


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of colours that the encoder expects; ImageNet's where it says nothing."""
    values = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    own = folder / "preprocessor_config.json"
    if own.is_file():
        values |= {k: v for k, v in json.loads(own.read_text()).items() if k in values}
    mean, std = (torch.tensor(values[k])[:, None, None] for k in ("image_mean", "image_std"))
    return mean, std


def _official(path: Path) -> dict[str, Tensor]:
    """Published weights; a .pth is read as tensors only."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as e:
        raise UserError(f"{path}: no file of weights that loads safely as tensors") from e


def torchmetrics_images() -> Any:
    """torchmetrics.functional.image. Raises UserError where the package is missing."""
    try:
        from torchmetrics.functional import image
    except ModuleNotFoundError as e:
        raise UserError("SSIM needs torchmetrics; pip install 'selfflow[metrics]'") from e
    return image
