"""Positions and FLUX-style blocks against the formulas written out, in float64."""

import math

import torch
from torch import Tensor

from selfflow.worldmodel.flux_blocks import DoubleBlock, SharedModulation, SingleBlock, Stream
from selfflow.worldmodel.layers import (
    Context,
    Signal,
    coordinates,
    grid_positions,
    image_positions,
    rotary,
    rotate,
)

D, H, HIDDEN, TEXT, L = 12, 2, 20, 3, 8


def test_a_clock_moves_frames_and_nothing_else() -> None:
    grid = (3, 2, 2)
    time, row, column = coordinates(grid, (-1.0, 0.5))
    assert time.tolist() == [t for t in (-1.0, -0.5, 0.0) for _ in range(4)]
    assert row.tolist() == [0, 0, 1, 1] * 3
    assert column.tolist() == [0, 1] * 6
    plain, moved = grid_positions(grid, 18), grid_positions(grid, 18, (1.0, 1.0))
    assert torch.equal(plain[4:], moved[:8])
    assert torch.equal(plain[:, 6:], moved[:, 6:])


def test_image_positions_are_the_published_ones() -> None:
    """Column first, [sin, cos] of w / 10000^(k / (D/4)); every frame has the same."""
    code = image_positions((2, 3, 5), 16).view(2, 3, 5, 16)
    for row in range(3):
        for column in range(5):
            want = [
                f(place / 10_000 ** (k / 4))
                for place in (column, row)
                for f in (math.sin, math.cos)
                for k in range(4)
            ]
            for frame in range(2):
                assert torch.allclose(code[frame, row, column], torch.tensor(want), atol=1e-6)


def test_rotation_is_a_product_of_complex_numbers() -> None:
    rope = rotary((2, 3, 4), 12, (-1.0, 2.0)).double()
    x = torch.randn(1, 2, 24, 12, dtype=torch.float64)
    time, row, column = coordinates((2, 3, 4), (-1.0, 2.0))
    angle = torch.cat(
        [place[:, None] * torch.tensor([1.0, 2000**-0.5]) for place in (time, row, column)], 1
    ).double()
    want = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    got = rotate(x, rope)
    assert torch.allclose(got, torch.cat([want.real, want.imag], -1), atol=1e-6)


def test_attention_sees_only_the_distance_of_rotated_tokens() -> None:
    query, key = torch.randn(2, 1, 1, 24, 12)
    scores = [
        rotate(query, rope) @ rotate(key, rope).transpose(-1, -2)
        for rope in (rotary((2, 3, 4), 12), rotary((2, 3, 4), 12, (7.0, 1.0)))
    ]
    assert torch.allclose(scores[0], scores[1], atol=1e-4)


def random(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return torch.einsum("oi,bli->blo", layer.weight, x) + layer.bias


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def swiglu(x: Tensor) -> Tensor:
    return x[..., :HIDDEN] * torch.sigmoid(x[..., :HIDDEN]) * x[..., HIDDEN:]


def heads(stream: Stream | SingleBlock, qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys of root mean square `scale`, values as they are; (B, L, H, d)."""
    query, key, value = (part.unflatten(-1, (H, D // H)) for part in qkv.split(D, -1))
    query, key = (
        x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        for x, scale in ((query, stream.norm.query), (key, stream.norm.key))
    )
    return query, key, value


def attention(query: Tensor, key: Tensor, value: Tensor, rope: Tensor) -> Tensor:
    query, key = (rotate(x.transpose(1, 2), rope).transpose(1, 2) for x in (query, key))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(D // H)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def given() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, 15 modulation vectors a token, rotary angles."""
    torch.manual_seed(0)
    x, rows = (torch.randn(2, L, n, dtype=torch.float64) for n in (D, 15 * D))
    return x, rows, rotary((2, 2, 2), D // H).double()


def test_single_block_is_attention_and_mlp_side_by_side() -> None:
    x, rows, rope = given()
    block = SingleBlock(D, H, HIDDEN).double()
    random(block)
    got, _ = block(x, Context(Signal(rows), rope, TEXT))
    shift, scale, gate = rows[..., 12 * D :].split(D, -1)
    inner = linear(block.into, normed(x, shift, scale))
    attended = attention(*heads(block, inner[..., : 3 * D]), rope)
    both = torch.cat([attended, swiglu(inner[..., 3 * D :])], -1)
    assert torch.allclose(got, x + gate * linear(block.out, both))


def test_double_block_is_joint_attention_of_two_streams() -> None:
    x, rows, rope = given()
    block = DoubleBlock(D, H, HIDDEN).double()
    random(block)
    got, _ = block(x, Context(Signal(rows), rope, TEXT))
    streams = ((block.text, slice(0, TEXT), 0), (block.main, slice(TEXT, L), 6 * D))
    asked = []
    for stream, rows_of, first in streams:
        shift, scale = rows[:, rows_of, first : first + 2 * D].split(D, -1)
        asked.append(heads(stream, linear(stream.qkv, normed(x[:, rows_of], shift, scale))))
    query, key, value = (torch.cat(parts, 1) for parts in zip(*asked, strict=True))
    attended = attention(query, key, value, rope)
    for stream, rows_of, first in streams:
        _, _, gate, shift, scale, gate_mlp = rows[:, rows_of, first : first + 6 * D].split(D, -1)
        want = x[:, rows_of] + gate * linear(stream.out, attended[:, rows_of])
        hidden = swiglu(linear(stream.mlp_in, normed(want, shift, scale)))
        want = want + gate_mlp * linear(stream.mlp_out, hidden)
        assert torch.allclose(got[:, rows_of], want)


def test_the_modulation_is_shared_and_spread_once() -> None:
    shared = SharedModulation(D)
    c, group = torch.randn(2, 3, D), torch.randint(0, 3, (2, L))
    signal = shared(Signal(c, torch.nn.functional.one_hot(group, 3).float()))
    assert signal.select is None
    each = c.gather(1, group[..., None].expand(-1, -1, D))
    assert torch.allclose(signal.rows, shared.modulation(each), atol=1e-5)
    assert shared(Signal(c[:, :1])).rows.shape == (2, 1, 15 * D)  # one for all stays one
