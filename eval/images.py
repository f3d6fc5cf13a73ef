"""Sets of images: the .npz of the ADM evaluation suite, streamed, and their Frechet distance.

N or _ images, H W pixels, D features.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from selfflow.datasets.spec import UserError
from selfflow.eval.video_metrics import freeze_random

Images = UInt8[np.ndarray, "_ H W 3"]
Features = Callable[[Tensor], Tensor]  # (N, 3, H, W) in 0 .. 255 -> (N, D)


def write_npz(path: Path, parts: Iterable[Images], labels: Int[np.ndarray, "M"]) -> None:
    """arr_0 the images, arr_1 their labels; uncompressed, piece by piece: 50000 take 10 GB."""
    draft = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            written = 0
            for part in parts:
                if not written:
                    _write_header(file, (len(labels), *part.shape[1:]), part.dtype)
                file.write(np.ascontiguousarray(part).tobytes())
                written += len(part)
        if written != len(labels):
            raise ValueError(f"{written} images for {len(labels)} labels")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels, allow_pickle=False)
    os.replace(draft, path)


def read_npz(path: Path, batch: int = 64) -> Iterator[Images]:
    """arr_0 of such a file in pieces of `batch`. Raises UserError."""
    if "arr_0.npy" not in _names(path):
        raise UserError(f"{path}: no arr_0 in it")
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, dtype = _read_header(file)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise UserError(f"{path}: arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3)")
        for start in range(0, shape[0], batch):
            count = min(batch, shape[0] - start)
            data = file.read(count * math.prod(shape[1:]))
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


class Moments:
    """Mean and covariance of features, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(())

    def add(self, features: Float[Tensor, "N D"]) -> None:
        """Chan's update: no difference of large sums."""
        x = features.double().cpu()
        n, mean = len(x), x.mean(0)
        if not self.count:
            self._mean, self._scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        apart, total = mean - self._mean, self.count + n
        within = (x - mean).T @ (x - mean)
        self._scatter = self._scatter + within + apart.outer(apart) * (self.count * n / total)
        self._mean = self._mean + apart * (n / total)
        self.count = total

    @property
    def mean(self) -> Float[Tensor, "D"]:
        """Of all features so far."""
        return self._mean

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Unbiased."""
        return self._scatter / (self.count - 1)


def frechet(
    mean_a: Float[Tensor, "D"],
    covariance_a: Float[Tensor, "D D"],
    mean_b: Float[Tensor, "D"],
    covariance_b: Float[Tensor, "D D"],
) -> float:
    """Squared Frechet distance of two Gaussians (FID, of features), in float64.

    |m_a - m_b|² + tr(A + B - 2 (A B)^½); the last trace is the nuclear norm of A^½ B^½, which needs
    no root of an unsymmetric matrix.
    """
    a, b = covariance_a.double(), covariance_b.double()
    overlap = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
    apart = (mean_a.double() - mean_b.double()).square().sum()
    return float(apart + a.trace() + b.trace() - 2 * overlap)


def _root(matrix: Tensor) -> Tensor:
    """Of a symmetric, positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def feature_network(path: str | None, device: torch.device) -> tuple[str, Features]:
    """The metric's name and the features it is taken of. Raises UserError.

    A TorchScript file, which torch reads without Python's pickle: images (N, 3, H, W) as floats in
    0 .. 255 -> (N, D), as the inception-2015-12-05.pt that StyleGAN's metrics made customary. None
    is a small frozen random network: it shows that the pipeline works, and its distances compare
    with nothing but themselves.
    """
    if path is None:
        return "fid_random", random_network().to(device)
    try:
        with warnings.catch_warnings():
            # deprecated, but torch.export's own reader falls back to unpickling
            warnings.simplefilter("ignore", DeprecationWarning)
            network: Any = torch.jit.load(path, map_location=device)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(
            f"features={path}: not a TorchScript file ({' '.join(str(e).split())[:120]})"
        ) from e
    network.eval()
    # StyleGAN's Inception answers class probabilities unless asked for its features
    names = [argument.name for argument in network.forward.schema.arguments]
    asked = {"return_features": True} if "return_features" in names else {}
    return f"fid_{Path(path).stem}", lambda images: network(images, **asked)


def random_network(width: int = 64) -> nn.Module:
    """Frozen, and the same on every machine of this torch version."""
    layers: list[nn.Module] = [_Unit()]
    for inputs, outputs in ((3, 16), (16, 32), (32, width)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    freeze_random(network)
    return network


class _Unit(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        """0 .. 255 -> -1 .. 1 at 64 x 64."""
        return F.interpolate(images, (64, 64), mode="area") / 127.5 - 1


@torch.no_grad()
def moments(parts: Iterable[Images], features: Features, device: torch.device) -> Moments:
    """Of the features of all images."""
    found = Moments()
    for part in parts:
        images = torch.from_numpy(np.array(part)).to(device).permute(0, 3, 1, 2).float()
        found.add(features(images))
    return found


def reference_moments(
    path: Path, features: Features, device: torch.device, stored: bool
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a reference .npz: of its images (arr_0), or, if `stored`, the mu and
    sigma that ADM's reference batches bring. Raises UserError."""
    if stored and {"mu.npy", "sigma.npy"} <= _names(path):
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
    found = moments(read_npz(path), features, device)
    if found.count < 2:
        raise UserError(f"{path}: {found.count} images; a covariance needs 2 at least")
    return found.mean, found.covariance


def _names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not an .npz file ({e})") from e


def _write_header(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    major, _ = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    if fortran:
        raise UserError("an image array in Fortran order; save it in C order")
    return shape, dtype
