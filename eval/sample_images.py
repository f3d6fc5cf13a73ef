"""python eval/sample_images.py checkpoint=checkpoints/imagenet codec_path=stabilityai/sd-vae-ft-ema

Draws class-conditional images from an imported ImageNet model and writes samples.npz, which the ADM
evaluation suite reads (arr_0: uint8 (N, 256, 256, 3), arr_1: classes), a contact sheet, and, given
reference=, the Frechet distance of features. Run again with the same keys, it continues.

B images of a batch, L tokens, C values of a token, ordered (channel, row, column).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.spec import UserError
from selfflow.eval.images import (
    feature_network,
    frechet,
    moments,
    read_npz,
    reference_moments,
    write_npz,
)
from selfflow.eval.video import contact_sheet, thumbnail
from selfflow.worldmodel import parallel
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import (
    fill,
    load,
    parts_of,
    read_json,
    resolve,
    write_json,
)
from selfflow.worldmodel.codec import CodecConfig, make_codec
from selfflow.worldmodel.sampler import SOLVERS, guided
from selfflow.worldmodel.transformer import ModelConfig, VideoActionTransformer
from selfflow.worldmodel.video_codec import to_pixels

Decode = Callable[[Float[Tensor, "B L C"]], UInt8[Tensor, "B H W 3"]]
SHEET = 24  # images on the contact sheet
PIXELS = 8  # a side of a latent cell of the SD-VAE


@dataclass(frozen=True)
class SampleConfig:
    """Every key of configs/sample_images.yaml, which explains them."""

    checkpoint: str
    out: str
    samples: int
    classes: str
    seed: int
    sampler: str
    steps: int
    shift: float
    cfg: float
    cfg_from: float
    cfg_to: float
    codec: str | None
    codec_path: str | None
    reference: str | None
    features: str | None
    batch: int
    precision: str
    device: str
    threads: int

    @property
    def place(self) -> torch.device:
        """Where the model runs. Raises RunError if there is no such device."""
        return parallel.place("none", self.device).device

    def identity(self) -> dict[str, Any]:
        """What two sittings of one run share."""
        free = ("out", "device", "threads", "reference", "features")
        return {k: v for k, v in asdict(self).items() if k not in free}


@user_errors()
def check(config: SampleConfig) -> None:
    """Raises UserError for whatever can be wrong before anything is loaded."""
    one_of("classes", config.classes, ("random", "balanced"))
    one_of("sampler", config.sampler, SOLVERS)
    if config.codec is not None:
        one_of("codec", config.codec, ("sd_vae", "taesd", "none"))
    one_of("precision", config.precision, ("bf16", "fp32"))
    least = 2 if config.sampler == "sde" else 1
    for key, low in (("samples", 1), ("batch", 1), ("threads", 0), ("steps", least), ("cfg", 1)):
        if not getattr(config, key) >= low:
            raise UserError(f"{key}={getattr(config, key)}: {low} or more")
    if not config.shift > 0 or not 0 <= config.cfg_from <= config.cfg_to <= 1:
        raise UserError("shift is above 0, and 0 <= cfg_from <= cfg_to <= 1")
    for key in ("reference", "features"):
        if (path := getattr(config, key)) and not Path(path).is_file():
            raise UserError(f"{key}={path}: no such file")
    if config.features and not config.reference:
        raise UserError("features=... needs reference=..., an .npz to compare with")
    if config.codec_path is None and config.codec != "none":
        raise UserError("codec_path=... is required: an SD-VAE's folder or hub id; or codec=none")
    resolve(config.checkpoint)
    _ = config.place  # is there such a device
    kept = Path(config.out) / "config.json"
    if kept.is_file() and read_json(kept) != config.identity():
        raise UserError(f"out={config.out}: holds a run with other keys; give another folder")


@user_errors()
def main(config: SampleConfig) -> None:
    """Draws what is missing, then writes the .npz, the sheet and the summary."""
    if config.threads:
        torch.set_num_threads(config.threads)
    draw(config)
    summary = summarise(config)
    out = Path(config.out)
    write_json(out / "summary.json", summary)
    for name, value in summary.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print(f"{out}/samples.npz, sheet.png, summary.json")


def draw(config: SampleConfig) -> None:
    """samples.npz and sheet.png, batch by batch; does nothing where they lie already."""
    out = Path(config.out)
    if (out / "samples.npz").is_file():
        return
    model, image = open_model(config.checkpoint, config.place)
    decode = decoder(config, image)
    label = labels(config, image["classes"])
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config.identity())
    starts = range(0, config.samples, config.batch)
    paths = [parts / f"{start:06d}.npy" for start in starts]
    with _progress() as progress:
        task = progress.add_task("images", total=config.samples)
        for start, path in zip(starts, paths, strict=True):
            chosen = label[start : start + config.batch]
            if not path.is_file():
                latents = sample(model, torch.from_numpy(chosen), config, start)
                _save(path, decode(latents).cpu().numpy())
            progress.advance(task, len(chosen))
    write_npz(out / "samples.npz", (np.load(path, allow_pickle=False) for path in paths), label)
    first = [image for path in paths[:SHEET] for image in np.load(path, allow_pickle=False)]
    contact_sheet([thumbnail(x) for x in first[:SHEET]], out / "sheet.png", columns=6, count=SHEET)
    shutil.rmtree(parts)


def open_model(checkpoint: str, device: torch.device) -> tuple[VideoActionTransformer, dict]:
    """The backbone of an image checkpoint, and what the checkpoint says of its images."""
    found = load(checkpoint, "image")
    with parts_of(found.path):
        image = found.config["image"]
        model = VideoActionTransformer(ModelConfig.from_dict(found.config["model"]))
    fill(model, found.part("backbone"), str(found.path))
    return model.eval().requires_grad_(False).to(device), image


def labels(config: SampleConfig, rows: int) -> Int[np.ndarray, "N"]:
    """The class of every image; the label table's last row is "no label"."""
    classes = rows - 1
    if config.classes == "balanced":
        return np.arange(config.samples) % classes
    return np.random.default_rng(config.seed).integers(0, classes, config.samples)


@torch.no_grad()
def sample(
    model: VideoActionTransformer, label: Int[Tensor, "B"], config: SampleConfig, start: int
) -> Float[Tensor, "B L C"]:
    """Latent tokens of one batch; its noise is a function of the seed and the first index."""
    generator = Generator().manual_seed(config.seed * 2**32 + start)
    modality, device = model.config.targets[0], config.place
    shape = (len(label), modality.length, modality.channels)
    noise = torch.randn(shape, generator=generator).to(device)

    def velocity(x: Tensor, t: float, label: Tensor | None) -> Tensor:
        tau = x.new_full((len(x), 1), t)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return model({modality.name: x}, tau, None, label=label)[modality.name].float()

    label = label.to(device)
    field = guided(
        lambda x, t: velocity(x, t, label),
        lambda x, t: velocity(x, t, None),  # the model's own "no label"
        config.cfg,
        config.cfg_from,
        config.cfg_to,
    )
    return SOLVERS[config.sampler](field, noise, config.steps, config.shift, generator)


def decoder(config: SampleConfig, image: dict[str, Any]) -> Decode:
    """Latent tokens to pictures. Raises UserError, RunError.

    codec=none needs no weights: the first three latent channels as red, green, blue, -3 .. 3 to
    0 .. 255, a pixel a latent cell. It shows whether there is structure, not what it depicts.
    """
    size, patch = image["size"], image["patch"]

    def cells(tokens: Tensor) -> Tensor:
        side = size // patch
        pattern = "b (r k) (c p q) -> b (r p) (k q) c"
        return rearrange(tokens, pattern, r=side, k=side, p=patch, q=patch)

    if config.codec == "none":
        return lambda tokens: to_pixels(cells(tokens)[..., :3] / 3)
    codec = make_codec(
        CodecConfig(kind=config.codec or image["codec"], path=config.codec_path),
        size * PIXELS,
        size * PIXELS,
        1,
        config.place,
    )
    return lambda tokens: codec.decode(cells(tokens).flatten(1, 2))[:, 0]


def summarise(config: SampleConfig) -> dict[str, Any]:
    """How many, how drawn, and the distance to the reference if there is one."""
    summary: dict[str, Any] = {
        "samples": config.samples,
        "sampler": f"{config.sampler}, {config.steps} steps, cfg {config.cfg:g}",
    }
    if config.reference is None:
        return summary
    name, features = feature_network(config.features, config.place)
    stored = config.features is not None
    with Console(stderr=True).status(name):
        theirs = reference_moments(Path(config.reference), features, config.place, stored)
        ours = moments(_samples(config), features, config.place)
    if ours.count < 2 or ours.mean.shape != theirs[0].shape:
        raise UserError(f"{name} needs 2 samples or more, and a reference of the same features")
    return summary | {name: frechet(ours.mean, ours.covariance, *theirs)}


def _samples(config: SampleConfig) -> Iterator[UInt8[np.ndarray, "N H W 3"]]:
    return read_npz(Path(config.out) / "samples.npz")


def _save(path: Path, images: np.ndarray) -> None:
    draft = path.with_suffix(".tmp.npy")
    np.save(draft, images, allow_pickle=False)
    os.replace(draft, path)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    launch(SampleConfig, main, "sample_images", check=check)
