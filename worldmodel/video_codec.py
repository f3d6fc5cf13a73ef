"""Frames <-> tokens. What a codec is, and the one that needs no weights: pixel patches.

A codec turns frames into a grid of latent cells, `patch` x `patch` cells of which make a token.
Tokens go latent frame by latent frame, row by row, column by column; inside a token the order is
(row in patch, column in patch, channel). Codecs with weights: codec.py.

B batch, T frames, L tokens, C channels of a token.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """What every codec offers. Results lie on the codec's device (of patches: on the input's)."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int:
        """C, of one token."""
        ...

    @property
    def temporal(self) -> int:
        """Frames a latent frame: 1, or n of a causal video codec, whose first holds one frame."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one latent frame's tokens."""
        ...

    def latent_frames(self, frames: int) -> int:
        """Latent frames of so many frames. Raises ValueError if they do not come out whole."""
        ...

    def encode(self, frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B L C"]:
        """Float32 tokens. Raises ValueError for frames of another size or number."""
        ...

    def decode(self, latents: Float[Tensor, "B L C"]) -> UInt8[Tensor, "B T H W 3"]:
        """Frames of whole latent frames."""
        ...


def latent_frames(frames: int, temporal: int) -> int:
    """1 + (T - 1) / temporal. Raises ValueError unless that is a whole number, at least 1."""
    if frames < 1 or (frames - 1) % temporal:
        raise ValueError(
            f"{frames} frames: this codec takes 1 frame and then {temporal} at a time, "
            f"so 1 + {temporal}n of them"
        )
    return 1 + (frames - 1) // temporal


def to_pixels(frames: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0 .. 255, rounded and clipped."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class PatchCodec:
    """Non-overlapping square patches of RGB in [-1, 1]: a cell is a pixel."""

    height: int  # pixels
    width: int
    patch: int
    scale: float = 1.0  # latents are multiplied by it

    @property
    def name(self) -> str:
        """As in a codec's config."""
        return "patch"

    @property
    def channels(self) -> int:
        """Numbers in a patch."""
        return self.patch**2 * 3

    @property
    def temporal(self) -> int:
        """Every frame stands for itself."""
        return 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one frame's tokens."""
        return self.height // self.patch, self.width // self.patch, self.channels

    def latent_frames(self, frames: int) -> int:
        """As many as there are frames."""
        return latent_frames(frames, 1)

    def encode(self, frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B L C"]:
        """Frames of exactly this codec's size. Raises ValueError for another."""
        check_size(frames, self.height, self.width)
        p = self.patch
        patches = rearrange(frames, "b t (r p) (c q) rgb -> b (t r c) (p q rgb)", p=p, q=p)
        return patches.float().mul_(self.scale / 127.5).sub_(self.scale)

    def decode(self, latents: Float[Tensor, "B L C"]) -> UInt8[Tensor, "B T H W 3"]:
        """Inverse of encode, clipped to 0 .. 255 and rounded."""
        rows, columns, _ = self.latent_shape
        pixels = rearrange(
            latents.float(),
            "b (t r c) (p q rgb) -> b t (r p) (c q) rgb",
            r=rows,
            c=columns,
            p=self.patch,
            q=self.patch,
        )
        return to_pixels(pixels / self.scale)


def check_size(frames: UInt8[Tensor, "B T H W 3"], height: int, width: int) -> None:
    """Raises ValueError unless the frames are of this size."""
    if frames.shape[2:4] != (height, width):
        raise ValueError(f"frames are {tuple(frames.shape[2:4])}, not {height, width}")
