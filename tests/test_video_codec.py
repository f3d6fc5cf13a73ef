"""Patches, the tokens of a window, and embodiment codes."""

import pytest
import torch

from selfflow.worldmodel.layout import Layout, Robots, split_frames
from selfflow.worldmodel.video_codec import Codec, PatchCodec, latent_frames


def frames(batch: int = 2, count: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, count, 32, 48, 3), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_decoding_inverts_encoding(scale: float) -> None:
    codec = PatchCodec(32, 48, 16, scale)
    assert isinstance(codec, Codec)
    assert (codec.name, codec.temporal, codec.latent_shape) == ("patch", 1, (2, 3, codec.channels))
    latents = codec.encode(frames())
    assert latents.shape == (2, codec.latent_frames(3) * 2 * 3, 16 * 16 * 3)
    assert latents.abs().max() <= scale
    assert torch.equal(codec.decode(latents), frames())
    with pytest.raises(ValueError, match="not"):
        codec.encode(frames()[:, :, :16])


def test_order_of_tokens_and_of_values_in_a_token() -> None:
    x = frames()
    token = PatchCodec(32, 48, 16).encode(x)[1, 2 * 6 + 1 * 3 + 2]  # frame 2, row 1, column 2
    patch = x[1, 2, 16:32, 32:48]
    assert torch.allclose(token, (patch.float() / 127.5 - 1).flatten(), atol=1e-6)


def test_latent_frames_come_out_whole() -> None:
    assert [latent_frames(n, 4) for n in (1, 5, 49)] == [1, 2, 13]
    assert latent_frames(7, 1) == 7
    for wrong in (0, 4, 48):
        with pytest.raises(ValueError, match=f"{wrong} frames"):
            latent_frames(wrong, 4)


def test_frames_of_a_window() -> None:
    assert Layout().frame_offsets == (0, 4)
    assert Layout(context=3, future=2, stride=2).frame_offsets == (-4, -2, 0, 2, 4)
    assert [m.name for m in Layout(future=0).modalities()] == [
        "text",
        "robot",
        "proprio",
        "context",
        "action",
    ]
    assert {m.name: m.length for m in Layout().modalities()}["video"] == 80
    with pytest.raises(ValueError, match="patch"):
        Layout(height=100)


def test_absent_parts_are_invalid_and_masked() -> None:
    layout = Layout(32, 48, 16, context=1, future=2, chunk=3)
    codec = PatchCodec(32, 48, 16)
    frame_valid = torch.tensor([[True, True, False], [True, True, True]])
    assert layout.video_valid(frame_valid).tolist() == [[True] * 6 + [False] * 6, [True] * 12]
    shown, coming = split_frames(frames(), layout)
    tokens, valid = layout.condition_tokens(
        codec.encode(shown).unflatten(0, (2, 1)).flatten(1, 2),
        frame_valid,
        torch.zeros(2, 1, 384),
        Robots(("a",), (4.0,)).tokens(["a", "a"]),
        torch.zeros(2, 10),
        torch.tensor([True, False]),
    )
    assert valid["proprio"].tolist() == [[True], [False]]
    assert valid["context"].tolist() == [[True] * 6] * 2
    action, action_valid, mask = layout.action_tokens(
        torch.ones(2, 3, 7),
        torch.tensor([[True, False, False], [False, False, False]]),
        torch.tensor([[False, True, True], [False, False, False]]),
        torch.tensor([[True, True, False], [False, False, False]]),
    )
    assert action_valid.tolist() == [[True] * 3, [False] * 3]  # beyond the end: no motion
    assert action[0, :, 7].tolist() == [-1, 1, 1]
    assert mask[0].tolist() == [[1.0] * 8, [0.0] * 7 + [1.0], [0.0] * 8]
    assert (mask[1] == 0).all()
    want = {m.name: (2, m.length, m.channels) for m in layout.modalities()}
    made = tokens | {"action": action, "video": codec.encode(coming)}
    assert {k: v.shape for k, v in made.items()} == want


def test_robots_are_coded_by_name_and_rate() -> None:
    robots = Robots(("a", "b"), (3.0, 5.0)).extended({"b": 9.0, "c": 16.0})
    token = robots.tokens(["c", "a"])
    assert token.shape == (2, 1, 17)
    assert token[0, 0].nonzero().flatten().tolist() == [2, 16]
    assert token[0, 0, 16] == 1.0  # log2(16) / 4
    assert robots.rates == (3.0, 5.0, 16.0)
    with pytest.raises(ValueError, match="distinct"):
        Robots(("a", "a"), (1.0, 1.0))
    with pytest.raises(ValueError, match="16"):
        Robots(tuple("abcdefghijklmnopq"), (1.0,) * 17)
