"""diffusers' autoencoders: loading one, and the same call for classes that differ.

N clips of F frames; C channels; H W pixels, h w cells. An image autoencoder takes F = 1.
"""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from selfflow.worldmodel.errors import RunError

CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLWan", "AutoencoderTiny")
OWN_STATISTICS = ("AutoencoderKLFlux2", "AutoencoderKLWan")  # of latents, by channel
JOINED = {"AutoencoderKLWan": 4}  # classes that take clips, and frames they join
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?")  # owner/name or owner/name/subfolder


def load(cls: str, path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of this class at a local folder or hub id.

    Only safetensors are read. Raises RunError if diffusers, the class or a whole model is missing.
    """
    try:
        import diffusers
    except ImportError as e:
        raise RunError(f"codec: {cls} needs diffusers: pip install 'selfflow[codecs]'") from e
    model_class = getattr(diffusers, cls, None)
    if model_class is None:
        raise RunError(
            f"codec: diffusers {diffusers.__version__} has no {cls}: "
            "pip install -U 'selfflow[codecs]'"
        )
    place, subfolder, local = _locate(path)
    try:
        model, info = model_class.from_pretrained(
            place,
            subfolder=subfolder,
            local_files_only=local,
            use_safetensors=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise RunError(f"codec.path={path}: cannot be read as {cls} ({short(e)})") from e
    if missing := info["missing_keys"]:
        raise RunError(f"codec.path={path}: not a whole {cls}; it lacks {sorted(missing)[0]}")
    return model


def encode(model: nn.Module, clips: Float[Tensor, "N 3 F H W"]) -> Float[Tensor, "N C f h w"]:
    """Pixels in [-1, 1] to cells as the model means them, in float32: the posterior's mode."""
    x = clips.to(next(model.parameters()).dtype)
    call: Any = model.encode
    out = call(x if takes_clips(model) else x[:, :, 0])
    if not isinstance(out, Tensor):
        out = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
    return (out if takes_clips(model) else out[:, :, None]).float()


def decode(model: nn.Module, cells: Float[Tensor, "N C f h w"]) -> Float[Tensor, "N 3 F H W"]:
    """Inverse of `encode`, as well as the model can."""
    x = cells.to(next(model.parameters()).dtype)
    call: Any = model.decode
    out = call(x if takes_clips(model) else x[:, :, 0])
    if not isinstance(out, Tensor):
        out = out.sample
    return (out if takes_clips(model) else out[:, :, None]).float()


def takes_clips(model: nn.Module) -> bool:
    """Whether it is a video autoencoder."""
    return type(model).__name__ in JOINED


def statistics(model: Any) -> tuple[Float[Tensor, "C p p"], Float[Tensor, "C p p"]]:
    """Mean and standard deviation of cells by channel, and of FLUX.2's by place in 2 x 2 cells."""
    if takes_clips(model):
        mean, std = (torch.tensor(model.config[name]) for name in ("latents_mean", "latents_std"))
        return mean[:, None, None], std[:, None, None]
    norm = model.bn  # its channels are (channel, row in 2, column in 2)
    mean, std = norm.running_mean.float(), (norm.running_var.float() + norm.eps).sqrt()
    return mean.view(-1, 2, 2), std.view(-1, 2, 2)


def short(error: Exception) -> str:
    """The error's message, one line, cut."""
    return " ".join(str(error).split())[:160]


def _locate(path: str) -> tuple[str, str | None, bool]:
    """Place, subfolder, and whether it is local; a whole pipeline's folder has the model in vae."""
    folder = Path(path)
    if folder.is_dir():
        whole = not (folder / "config.json").exists() and (folder / "vae").is_dir()
        return path, "vae" if whole else None, True
    found = HUB_ID.fullmatch(path)
    if found is None:
        raise RunError(f"codec.path={path}: no such folder, nor a hub id owner/name[/subfolder]")
    return found[1], found[2], False
