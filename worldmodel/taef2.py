"""TAEF2: a tiny convolutional autoencoder for the latents of the FLUX.2 autoencoder.

Weights: taef2_encoder.safetensors and taef2_decoder.safetensors of madebyollin/taesd (MIT), whose
state-dict keys the modules below follow. Eightfold in space, 32 channels, deterministic. diffusers'
AutoencoderTiny has no layers for the pooled blocks, hence this file.

B images, C channels, H W pixels, h w = H/8 W/8 cells.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfflow.worldmodel.autoencoders import short
from selfflow.worldmodel.errors import RunError

WIDTH, LATENT = 64, 32
FILES = {"encoder": "taef2_encoder.safetensors", "decoder": "taef2_decoder.safetensors"}


class Clamp(nn.Module):
    """Softly to -3 .. 3. Without it the RT-1 clip loses 4.6 dB."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions beside an identity; `pool` first adds a step that sees the whole image
    through the statistics of its group norm."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        self.pooled = pool

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Same shape."""
        if self.pooled:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Taef2(nn.Module):
    """Images in [-1, 1] <-> latents, mean about 0 and standard deviation about 0.84."""

    def __init__(self) -> None:
        super().__init__()
        down, up = [_conv(3), Block()], [Clamp(), _conv(LATENT), nn.ReLU()]
        for pool in (False, False, True):
            down += [_conv(stride=2, bias=False), Block(pool), Block(pool), Block(pool)]
        for pool in (True, False, False):
            up += [Block(pool), Block(pool), Block(pool), nn.Upsample(scale_factor=2)]
            up += [_conv(bias=False)]
        self.encoder = nn.Sequential(*down, _conv(out=LATENT))
        self.decoder = nn.Sequential(*up, Block(), _conv(out=3))

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 32 h w"]:
        """Sides must be multiples of 8."""
        return self.encoder(images / 2 + 0.5)

    def decode(self, latents: Float[Tensor, "B 32 h w"]) -> Float[Tensor, "B 3 H W"]:
        """Not clipped."""
        return self.decoder(latents) * 2 - 1


def load(folder: str | Path) -> Taef2:
    """The weights in this folder, as float32. Raises RunError if they are missing or others."""
    model = Taef2()
    for part, name in FILES.items():
        path = Path(folder).expanduser() / name
        if not path.is_file():
            raise RunError(
                f"codec.path={folder}: no {name} there; "
                f"give the folder that holds {' and '.join(FILES.values())}"
            )
        try:
            model.get_submodule(part).load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as e:
            raise RunError(f"{path}: not the weights of a TAEF2 {part} ({short(e)})") from e
    return model


def _conv(channels: int = WIDTH, out: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=bias)
