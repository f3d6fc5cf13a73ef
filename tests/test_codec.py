"""Codecs with weights: small random diffusers models, and TAEF2 on real RT-1 frames."""

import builtins
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfflow.datasets.video import VideoClip
from selfflow.datasets.windows import resize
from selfflow.worldmodel import taef2
from selfflow.worldmodel.codec import (
    KINDS,
    AutoencoderCodec,
    CodecConfig,
    geometry,
    make_codec,
    token_shape,
    weights_checksum,
)
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.video_codec import Codec, PatchCodec

SAMPLES = Path(__file__).parents[2] / "shared/samples"
KL = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
WAN = {  # the shape of WAN 2.2, thin
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.01 * i for i in range(48)],
    "latents_std": [0.5 + 0.01 * i for i in range(48)],
}
TINY = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "num_encoder_blocks": (1, 1, 1, 1),
    "num_decoder_blocks": (1, 1, 1, 1),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd_vae": ("AutoencoderKL", KL | {"latent_channels": 4}),
    "flux": ("AutoencoderKL", KL | {"latent_channels": 16}),
    "flux2": ("AutoencoderKLFlux2", {k: v for k, v in KL.items() if "types" not in k}),
    "wan": ("AutoencoderKLWan", WAN),
    "taesd": ("AutoencoderTiny", TINY),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small random models by kind."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for kind, (cls, options) in MODELS.items():
        model = getattr(diffusers, cls)(**options)
        if kind == "flux2":
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 2)
        model.save_pretrained(folder / kind)
    return {kind: str(folder / kind) for kind in MODELS}


def frames(batch: int, count: int, height: int = 32, width: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    size = (batch, count, height, width, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("patch", [1, 2])
def test_shapes_packing_and_scale(saved: dict[str, str], kind: str, patch: int) -> None:
    codec = make_codec(CodecConfig(kind, saved[kind], chunk=3), 32, 64, patch)
    assert isinstance(codec, Codec)
    assert isinstance(codec, AutoencoderCodec)
    spatial, temporal, channels = geometry(codec.config)
    assert (codec.name, codec.temporal) == (kind, temporal)
    rows, columns, width = codec.latent_shape
    assert (rows, columns, width) == token_shape(codec.config, 32, 64, patch)
    assert (rows, columns, width) == (
        32 // spatial // patch,
        64 // spatial // patch,
        channels * patch**2,
    )
    x = frames(2, 5)
    latents = codec.encode(x)
    count = codec.latent_frames(5)
    assert count == {1: 5, 4: 2}[temporal]
    assert (latents.dtype, latents.shape) == (torch.float32, (2, count * rows * columns, width))
    assert not latents.requires_grad

    raw = raw_latents(codec.model, x[1:])  # (T', C, h, w), as diffusers gives them
    scaled = (raw - codec.mean.movedim(0, 1)) / codec.std.movedim(0, 1)
    row, column = rows - 1, columns - 1
    token = latents[1].view(count, rows, columns, patch, patch, channels)[-1, row, column]
    want = scaled[-1, :, row * patch :, column * patch :].permute(1, 2, 0)
    torch.testing.assert_close(token, want, atol=1e-5, rtol=1e-5)

    decoded = codec.decode(latents)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, x.shape)
    torch.testing.assert_close(codec.decode(latents[1:]), decoded[1:], atol=1, rtol=0)
    torch.testing.assert_close(codec.encode(x[1:]), latents[1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(codec.encode(x), latents)


@torch.no_grad()
def raw_latents(model: Any, frames: torch.Tensor) -> torch.Tensor:
    x = frames[0].permute(0, 3, 1, 2).float() / 127.5 - 1
    name = type(model).__name__
    if name == "AutoencoderTiny":
        return model.encode(x).latents
    if name == "AutoencoderKLWan":
        return model.encode(x.transpose(0, 1)[None]).latent_dist.mean[0].transpose(0, 1)
    return model.encode(x).latent_dist.mean


def test_scale_and_shift(saved: dict[str, str]) -> None:
    def of(kind: str, **more: Any) -> AutoencoderCodec:
        codec = make_codec(CodecConfig(kind, saved[kind], **more), 32, 64, 1)
        assert isinstance(codec, AutoencoderCodec)
        return codec

    sd, flux, wan, flux2 = of("sd_vae"), of("flux"), of("wan"), of("flux2")
    z = sd.encode(frames(1, 1))
    raw = raw_latents(sd.model, frames(1, 1)).permute(0, 2, 3, 1).reshape(z.shape)
    torch.testing.assert_close(z, raw * 0.18215)
    z = flux.encode(frames(1, 1))
    raw = raw_latents(flux.model, frames(1, 1)).permute(0, 2, 3, 1).reshape(z.shape)
    torch.testing.assert_close(z, (raw - 0.1159) * 0.3611)
    assert of("sd_vae", scale=2.0, shift=1.0).std.unique().item() == 0.5
    assert wan.mean.flatten().tolist() == pytest.approx(WAN["latents_mean"])
    assert wan.std.flatten().tolist() == pytest.approx(WAN["latents_std"])

    # FLUX.2: exactly the batch norm of its own 2 x 2 packing, channel the slowest
    z = flux2.encode(frames(1, 1)).view(2, 2, 4, 2, 32)  # rows, in 2, columns, in 2, channel
    packed = raw_latents(flux2.model, frames(1, 1)).view(32, 2, 2, 4, 2).permute(0, 2, 4, 1, 3)
    with torch.no_grad():
        want = flux2.model.bn.eval()(packed.reshape(1, 128, 2, 4)).view(32, 2, 2, 2, 4)  # type: ignore[operator]
    torch.testing.assert_close(z.permute(4, 1, 3, 0, 2), want, atol=1e-5, rtol=1e-5)


def test_the_mode_is_inverted_exactly_by_an_autoencoder_that_does_nothing() -> None:
    class Identity(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        decode = encode

    config = CodecConfig(
        "diffusers", cls="AutoencoderKL", spatial=1, channels=3, scale=0.3611, shift=0.1159
    )
    codec = AutoencoderCodec(config, Identity(), 8, 16, 2)
    x = frames(3, 2, 8, 16)
    assert torch.equal(codec.decode(codec.encode(x)), x)
    want = (PatchCodec(8, 16, 2).encode(x) - 0.1159) * 0.3611  # the same order as of patches
    torch.testing.assert_close(codec.encode(x), want)


def test_a_causal_codec_encodes_the_first_frame_by_itself(saved: dict[str, str]) -> None:
    codec = make_codec(CodecConfig("wan", saved["wan"]), 32, 64, 1)
    x = frames(1, 9)
    latents = codec.encode(x)
    torch.testing.assert_close(codec.encode(x[:, :1]), latents[:, :8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.encode(x[:, :5]), latents[:, :16], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="8 frames"):
        codec.encode(x[:, :8])


def test_other_ways_to_name_weights(saved: dict[str, str], tmp_path: Path) -> None:
    config = CodecConfig(
        "diffusers", saved["sd_vae"], "AutoencoderKL", spatial=8, channels=4, dtype="bfloat16"
    )
    codec = make_codec(config, 32, 64, 1)
    assert isinstance(codec, AutoencoderCodec)
    assert next(codec.model.parameters()).dtype == torch.bfloat16
    assert codec.encode(frames(1, 2)).dtype == torch.float32
    assert codec.decode(codec.encode(frames(1, 2))).shape == (1, 2, 32, 64, 3)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(saved["sd_vae"])
    whole = make_codec(CodecConfig("sd_vae", str(tmp_path / "pipeline")), 32, 64, 1)
    assert weights_checksum(whole) != weights_checksum(codec)  # of float32, of bfloat16
    assert weights_checksum(whole) == weights_checksum(
        make_codec(CodecConfig("sd_vae", saved["sd_vae"]), 32, 64, 1)
    )
    assert weights_checksum(PatchCodec(32, 64, 16)) == "none"


def test_geometry_needs_neither_weights_nor_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    without_diffusers(monkeypatch)
    assert {kind: geometry(CodecConfig(kind)) for kind in KINDS} == {
        "patch": (1, 1, 3),
        "sd_vae": (8, 1, 4),
        "flux": (8, 1, 16),
        "flux2": (8, 1, 32),
        "wan": (16, 4, 48),
        "taesd": (8, 1, 4),
        "taef1": (8, 1, 16),
        "taef2": (8, 1, 32),
    }
    assert token_shape(CodecConfig("wan"), 256, 320, 1) == (16, 20, 48)
    assert geometry(CodecConfig("wan", spatial=8, channels=16)) == (8, 4, 16)  # WAN 2.1
    assert CodecConfig(**json.loads(json.dumps(asdict(CodecConfig("wan"))))) == CodecConfig("wan")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "vq"}, "choose one of patch"),
        ({"dtype": "int8"}, "float32"),
        ({"kind": "diffusers"}, "codec.cls, codec.spatial, codec.channels"),
        ({"kind": "diffusers", "cls": "VQ", "spatial": 8, "channels": 4}, "AutoencoderTiny"),
        ({"kind": "sd_vae", "cls": "AutoencoderKL"}, "diffusers only"),
        ({"kind": "sd_vae", "temporal": 4}, "AutoencoderKL has 1"),
        ({"kind": "wan", "scale": 2.0}, "has its own"),
        ({"kind": "patch", "spatial": 2}, "1 pixel"),
        ({"scale": 0.0}, "positive"),
        ({"chunk": 0}, "positive"),
    ],
)
def test_wrong_configs(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CodecConfig(**values)


def test_sizes_must_go_together() -> None:
    with pytest.raises(ValueError, match=r"height=40: .* multiple of 16"):
        token_shape(CodecConfig("sd_vae"), 40, 64, 2)
    with pytest.raises(ValueError, match=r"width=24: .* multiple of 16"):
        token_shape(CodecConfig("flux2"), 32, 24, 1)  # its statistics go by 2 x 2 cells


def test_one_line_for_what_is_missing(
    saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(says: str, kind: str, path: str | None, **more: Any) -> None:
        with pytest.raises(RunError, match=says) as error:
            make_codec(CodecConfig(kind, path, **more), 32, 64, 1)
        assert "\n" not in str(error.value)

    fails("codec.path: codec.kind=wan needs weights", "wan", None)
    fails("no such folder", "sd_vae", str(tmp_path / "nothing"))
    fails("no such folder", "taef2", "owner/name")
    fails("no taef2_encoder.safetensors", "taef2", str(tmp_path))
    fails("cannot be read as AutoencoderKL", "sd_vae", str(tmp_path))
    fails(r"\(8, 1, 4\) there.*flux.*\(8, 1, 16\)", "flux", saved["sd_vae"])
    tiny = {"cls": "AutoencoderTiny", "channels": 4}
    fails(r"\(8, 1, 4\) there.*\(16, 1, 4\)", "diffusers", saved["taesd"], spatial=16, **tiny)
    fails("cannot be read|not a whole", "taesd", saved["wan"])
    (tmp_path / "taef2_encoder.safetensors").write_bytes(b"no")
    (tmp_path / "taef2_decoder.safetensors").write_bytes(b"no")
    fails("not the weights of a TAEF2 encoder", "taef2", str(tmp_path))
    without_diffusers(monkeypatch)
    fails(r"pip install 'selfflow\[codecs\]'", "sd_vae", saved["sd_vae"])


def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def importing(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "diffusers":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_taef2_on_real_frames() -> None:
    clip = SAMPLES / "maniskill2_real2sim/rt1_real_standing_coke_can_1.mp4"
    weights = SAMPLES / "taef2_weights"
    if not clip.is_file() or not weights.is_dir():
        pytest.skip("no TAEF2 weights or RT-1 clip in ../shared/samples")
    video = VideoClip(clip)
    images = video.frames(0, range(0, video.length(0), 4))
    x = torch.from_numpy(np.stack([resize(image, 128, 160) for image in images]))
    codec = make_codec(CodecConfig("taef2", str(weights)), 128, 160, 2)
    assert codec.latent_shape == (8, 10, 128)
    latents = codec.encode(x[None])
    assert latents.shape == (1, 4 * 80, 128)
    assert latents.mean().abs() < 0.1
    assert 0.7 < latents.std() < 1.0
    error = (codec.decode(latents)[0].double() - x.double()) / 255
    psnr = -10 * error.square().mean((1, 2, 3)).log10()
    assert psnr.mean() >= 33, psnr
    alone = codec.encode(x[None, 2:3])  # group norms see one image at a time
    torch.testing.assert_close(alone, latents[:, 160:240], atol=1e-4, rtol=1e-4)


def test_taef2_keys_are_those_of_the_published_state_dict() -> None:
    model = taef2.Taef2()
    encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
    assert len(encoder) == len(decoder) == 79
    assert {"0.bias", "1.conv.4.bias", "2.weight", "11.pool.3.weight", "14.bias"} <= set(encoder)
    assert {"1.bias", "3.pool.1.weight", "7.weight", "18.conv.0.bias", "19.bias"} <= set(decoder)
    assert sum(v.numel() for v in encoder.values()) == pytest.approx(1.34e6, rel=0.01)
