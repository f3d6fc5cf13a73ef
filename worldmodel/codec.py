"""Codecs by config: pixel patches, diffusers autoencoders, TAEF2.

| kind | class | a cell | channels | what makes latents about unit-sized |
|---|---|---|---|---|
| patch | none | 1 pixel | 3 | RGB in [-1, 1] |
| sd_vae | AutoencoderKL | 8 pixels a side | 4 | scale 0.18215 |
| flux | AutoencoderKL | 8 | 16 | shift 0.1159, scale 0.3611 |
| flux2 | AutoencoderKLFlux2 | 8 | 32 | its batch norm, by channel and place in 2 x 2 cells |
| wan | AutoencoderKLWan, 2.2 | 16, of 4 frames | 48 | its latents_mean and latents_std by channel |
| taesd, taef1 | AutoencoderTiny | 8 | 4, 16 | they are |
| taef2 | own: taef2.py | 8 | 32 | they are (standard deviation 0.84) |
| diffusers | `cls` | given | given | `shift` and `scale`, or as above for the class |

`geometry` and `token_shape` need neither weights nor diffusers. Encoding takes the mode of the
posterior, so it is deterministic.

B batch, T frames, L tokens, C channels; N clips of F frames (1 of an image codec).
"""

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from selfflow.worldmodel import autoencoders, taef2
from selfflow.worldmodel.autoencoders import CLASSES, HUB_ID, JOINED, OWN_STATISTICS
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.video_codec import (
    Codec,
    PatchCodec,
    check_size,
    latent_frames,
    to_pixels,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE = 64  # pixels a side of the image that tells a loaded model's geometry


@dataclass(frozen=True)
class Known:
    """A row of the table above; latents are (z - shift) * scale."""

    cls: str | None
    spatial: int  # pixels a side of a cell
    temporal: int  # frames a latent frame
    channels: int
    scale: float = 1.0
    shift: float = 0.0
    example: str = ""  # where weights may come from

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(spatial, temporal, channels)."""
        return self.spatial, self.temporal, self.channels


KINDS = {
    "patch": Known(None, 1, 1, 3),
    "sd_vae": Known("AutoencoderKL", 8, 1, 4, 0.18215, 0.0, "stabilityai/sd-vae-ft-ema"),
    "flux": Known("AutoencoderKL", 8, 1, 16, 0.3611, 0.1159, "black-forest-labs/FLUX.1-dev/vae"),
    "flux2": Known("AutoencoderKLFlux2", 8, 1, 32, example="black-forest-labs/FLUX.2-dev/vae"),
    "wan": Known("AutoencoderKLWan", 16, 4, 48, example="Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae"),
    "taesd": Known("AutoencoderTiny", 8, 1, 4, example="madebyollin/taesd"),
    "taef1": Known("AutoencoderTiny", 8, 1, 16, example="madebyollin/taef1"),
    "taef2": Known(None, 8, 1, 32, example="one that holds taef2_encoder.safetensors"),
}


@dataclass(frozen=True)
class CodecConfig:
    """A codec without its weights: plain values, kept in yaml and checkpoints.

    None stands for the table's value of that kind; latents are (z - shift) * scale.
    """

    kind: str = "patch"  # a key of KINDS, or diffusers
    path: str | None = None  # weights: local folder, or hub id owner/name[/subfolder]
    cls: str | None = None  # of kind diffusers: a name of CLASSES
    spatial: int | None = None
    temporal: int | None = None
    channels: int | None = None
    scale: float | None = None
    shift: float | None = None
    dtype: str = "float32"  # of the weights
    chunk: int = 16  # frames in one call of the model, which bounds memory

    def __post_init__(self) -> None:
        _choose("kind", self.kind, (*KINDS, "diffusers"))
        _choose("dtype", self.dtype, tuple(DTYPES))
        known = resolved(self)
        if min(*known.geometry, self.chunk) < 1 or not known.scale > 0:
            raise ValueError(f"codec: sizes, chunk and scale are positive, got {self}")
        if known.cls is not None:
            _choose("cls", known.cls, CLASSES)
        if self.cls is not None and self.kind != "diffusers":
            raise ValueError(f"codec.cls={self.cls} goes with codec.kind=diffusers only")
        if self.kind == "patch" and (known.geometry, known.shift) != ((1, 1, 3), 0):
            raise ValueError("codec.kind=patch has cells of 1 pixel and 3 channels: give no others")
        frames = JOINED.get(known.cls or "", 1)
        if known.temporal != frames:
            raise ValueError(
                f"codec.temporal={known.temporal}: {known.cls or self.kind} has {frames}"
            )
        if known.cls in OWN_STATISTICS and (self.scale, self.shift) != (None, None):
            raise ValueError(f"codec.scale, codec.shift: {known.cls} has its own; give none")


def resolved(config: CodecConfig) -> Known:
    """The config's numbers, the table's where it gives none. Raises ValueError if some lack."""
    if config.kind == "diffusers":
        missing = [k for k in ("cls", "spatial", "channels") if getattr(config, k) is None]
        if missing:
            raise ValueError(f"codec.kind=diffusers needs codec.{', codec.'.join(missing)}")
        known = Known(config.cls, 1, 1, 1)
    else:
        known = KINDS[config.kind]
    names = ("spatial", "temporal", "channels", "scale", "shift")
    given = {name: getattr(config, name) for name in names}
    return replace(known, **{k: v for k, v in given.items() if v is not None})


def geometry(config: CodecConfig) -> tuple[int, int, int]:
    """(pixels a side of a cell, frames a latent frame, channels of a cell)."""
    return resolved(config).geometry


def token_shape(config: CodecConfig, height: int, width: int, patch: int) -> tuple[int, int, int]:
    """Rows, columns and channels of a latent frame's tokens, each `patch` cells a side.

    Raises ValueError unless tokens divide the frame; flux2 also wants an even number of cells.
    """
    known = resolved(config)
    side = known.spatial * patch
    unit = math.lcm(side, 2 * known.spatial if known.cls == "AutoencoderKLFlux2" else 1)
    for name, size in (("height", height), ("width", width)):
        if size % unit:
            raise ValueError(
                f"{name}={size}: with codec.kind={config.kind} and patch={patch} "
                f"it must be a multiple of {unit} pixels"
            )
    return height // side, width // side, known.channels * patch**2


def make_codec(
    config: CodecConfig,
    height: int,
    width: int,
    patch: int,
    device: str | torch.device = "cpu",
) -> Codec:
    """The codec for frames of this size in pixels; `patch` cells a side make a token.

    Raises ValueError if the sizes do not go together, RunError if the weights are missing, cannot
    be read, or are of another geometry than the config says.
    """
    token_shape(config, height, width, patch)
    if config.kind == "patch":
        return PatchCodec(height, width, patch, resolved(config).scale)
    path = weights_path(config)
    cls = resolved(config).cls
    dtype = DTYPES[config.dtype]
    model = autoencoders.load(cls, path, dtype) if cls else taef2.load(path).to(dtype)
    model = model.to(device).eval().requires_grad_(False)
    _check_geometry(config, model)
    return AutoencoderCodec(config, model, height, width, patch)


class AutoencoderCodec:
    """A frozen autoencoder as a codec. Made by `make_codec`.

    Latents are (z - mean) / std with mean and std of shape (C, 1, h or 1, w or 1).
    """

    def __init__(
        self, config: CodecConfig, model: nn.Module, height: int, width: int, patch: int
    ) -> None:
        self.config, self.model, self.patch = config, model, patch
        self.height, self.width = height, width
        self.known = resolved(config)
        self.device = next(model.parameters()).device
        self.mean, self.std = (x.to(self.device) for x in self._statistics())

    @property
    def name(self) -> str:
        """The kind."""
        return self.config.kind

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.latent_shape[2]

    @property
    def temporal(self) -> int:
        """Frames a latent frame."""
        return self.known.temporal

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one latent frame's tokens."""
        return token_shape(self.config, self.height, self.width, self.patch)

    def latent_frames(self, frames: int) -> int:
        """1 + (T - 1) / temporal. Raises ValueError if that is not whole."""
        return latent_frames(frames, self.temporal)

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B L C"]:
        """Float32 tokens on the model's device: the mode of the posterior, made unit-sized."""
        check_size(frames, self.height, self.width)
        self.latent_frames(frames.shape[1])
        cells = []
        for part in self._calls(rearrange(frames, "b t h w c -> b c t h w")):
            pixels = part.to(self.device).float() / 127.5 - 1
            cells.append((autoencoders.encode(self.model, pixels) - self.mean) / self.std)
        clips = rearrange(torch.cat(cells), "(b n) c f h w -> b c (n f) h w", b=len(frames))
        p = self.patch
        return rearrange(clips, "b c t (r p) (k q) -> b (t r k) (p q c)", p=p, q=p)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B L C"]) -> UInt8[Tensor, "B T H W 3"]:
        """Frames on the model's device, rounded and clipped."""
        p, (rows, columns, _) = self.patch, self.latent_shape
        cells = rearrange(
            latents.to(self.device).float(),
            "b (t r k) (p q c) -> b c t (r p) (k q)",
            r=rows,
            k=columns,
            p=p,
            q=p,
        )
        frames = [
            to_pixels(autoencoders.decode(self.model, part * self.std + self.mean))
            for part in self._calls(cells)
        ]
        return rearrange(torch.cat(frames), "(b n) c f h w -> b (n f) h w c", b=len(latents))

    def _calls(self, clips: Tensor) -> tuple[Tensor, ...]:
        """(B, C, T, h, w) as what the model takes in one call: whole clips, or single frames."""
        if self.temporal == 1:
            clips = rearrange(clips, "b c t h w -> (b t) c 1 h w")
        return clips.split(max(1, self.config.chunk // clips.shape[2]))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        known, c = self.known, self.known.channels
        if known.cls not in OWN_STATISTICS:
            mean, std = torch.full((c, 1, 1), known.shift), torch.full((c, 1, 1), 1 / known.scale)
        else:
            mean, std = autoencoders.statistics(self.model)
        sides = (self.height // known.spatial, self.width // known.spatial)
        times = [1] + [side // mean.shape[1] if mean.shape[1] > 1 else 1 for side in sides]
        return mean.repeat(times)[:, None], std.repeat(times)[:, None]


def weights_checksum(codec: Codec) -> str:
    """crc32 of the codec's weights by name, in hex; of a codec without weights "none"."""
    if not isinstance(codec, AutoencoderCodec):
        return "none"
    value = 0
    for name, tensor in sorted(codec.model.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(memoryview(data.numpy()), value)
    return f"{value:08x}"


def _check_geometry(config: CodecConfig, model: nn.Module) -> None:
    """Encodes a small grey picture; raises RunError if the cells are not those of the config."""
    want = resolved(config)
    more = 4 if autoencoders.takes_clips(model) else 0
    clip = torch.zeros(1, 3, 1 + more, PROBE, PROBE, device=next(model.parameters()).device)
    with torch.no_grad():
        _, channels, frames, _, side = autoencoders.encode(model, clip).shape
    found = (PROBE // side, more // (frames - 1) if frames > 1 else 1, channels)
    if found != want.geometry:
        raise RunError(
            f"codec.path={config.path}: (spatial, temporal, channels) are {found} there, "
            f"but codec.kind={config.kind} of the config means {want.geometry}"
        )
    if want.cls in OWN_STATISTICS:
        numbers = len(autoencoders.statistics(model)[0])
        if numbers != channels:
            raise RunError(
                f"codec.path={config.path}: its config has the mean of {numbers} channels, "
                f"its latents have {channels}"
            )


def weights_path(config: CodecConfig) -> str:
    """The weights' folder or hub id. Raises RunError if there is none; what is in it is not looked
    at."""
    example = resolved(config).example or "a folder that save_pretrained made"
    hub = "" if config.kind == "taef2" else " or a hub id"
    if config.path is None:
        raise RunError(
            f"codec.path: codec.kind={config.kind} needs weights; "
            f"give a local folder{hub} ({example})"
        )
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return str(folder)
    if not hub or not HUB_ID.fullmatch(config.path):
        raise RunError(
            f"codec.path={config.path}: no such folder; give a local folder{hub} ({example})"
        )
    return config.path


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"codec.{name}={value}: choose one of {', '.join(choices)}")
