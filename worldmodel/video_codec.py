"""Frames <-> latents. A codec has encode, decode, latent_shape and scale; here: pixel patches.

B batch, T frames, L tokens, C channels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True)
class PatchCodec:
    """Non-overlapping square patches of RGB in [-1, 1].

    Tokens go frame by frame, row by row, column by column; inside a token the order is
    (row in patch, column in patch, colour), as pixels lie in memory.
    """

    height: int  # pixels
    width: int
    patch: int
    scale: float = 1.0  # latents are multiplied by it

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one frame's tokens."""
        return self.height // self.patch, self.width // self.patch, self.patch**2 * 3

    def encode(self, frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B L C"]:
        """Frames of exactly this codec's size. Raises ValueError for another."""
        if frames.shape[2:4] != (self.height, self.width):
            raise ValueError(
                f"frames are {tuple(frames.shape[2:4])}, not {self.height, self.width}"
            )
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
        return ((pixels / self.scale + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
