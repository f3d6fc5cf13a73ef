"""Images from an imported model: the sampler, the .npz, the Frechet distance, the entry point."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval.bench.per_token import Published, randomised
from selfflow.eval.images import (
    Moments,
    feature_network,
    frechet,
    moments,
    read_npz,
    reference_moments,
    write_npz,
)
from selfflow.eval.sample_images import SampleConfig, check, decoder, labels, main, sample
from selfflow.worldmodel import import_checkpoint
from selfflow.worldmodel.import_checkpoint import ImportConfig

SIZES = Published(size=8, hidden=32, depth=2, heads=4, classes=6)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def theirs():
    return randomised(SIZES)


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    save_file(theirs.state_dict(), folder / "published.safetensors")
    given = ImportConfig(
        str(folder / "published.safetensors"), str(folder / "out"), None, SIZES.heads, None, None
    )
    import_checkpoint.main(given)
    return folder / "out"


def settings(checkpoint, out, *overrides):
    given = [f"checkpoint={checkpoint}", f"out={out}", "codec=none", "precision=fp32"]
    given += ["samples=10", "batch=4", "steps=3", "device=cpu", *overrides]
    return compose(SampleConfig, "sample_images", given)


def model_of(checkpoint):
    from selfflow.eval.sample_images import open_model

    return open_model(str(checkpoint), CPU)


@torch.no_grad()
def published_sde(theirs, label, noise, kicks, scale=1.0, high=0.7):
    """The published sampler in its own time u = 1 - t, where its network's output is dx/du."""
    points = np.linspace(0, 0.96, len(kicks) + 1)
    null = torch.full_like(label, SIZES.classes - 1)

    def drift(x, u):
        time = torch.full((len(x),), 1 - u)
        v = -theirs(x, time, label)
        if scale > 1 and 1 - u <= high:
            away = -theirs(x, time, null)
            v = away + scale * (v - away)
        score = (u * v - x) / (1 - u)
        return v + (1 - u) * score

    x = noise
    for (u, nxt), kick in zip(itertools.pairwise(points), kicks, strict=True):
        x = x + (nxt - u) * drift(x, u) + math.sqrt(2 * (1 - u) * (nxt - u)) * kick
    return x + 0.04 * drift(x, 0.96)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sde_is_the_published_sampler(theirs, checkpoint, tmp_path, scale):
    config = settings(checkpoint, tmp_path, "steps=6", f"cfg={scale}")
    model, _ = model_of(checkpoint)
    label = torch.tensor([0, 3, 4])
    found = sample(model, label, config, start=8)
    generator = torch.Generator().manual_seed(config.seed * 2**32 + 8)
    noise, *kicks = (torch.randn(3, 16, 16, generator=generator) for _ in range(6))
    wanted = published_sde(theirs, label, noise, kicks, scale)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_ode_follows_the_official_velocity(theirs, checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, "sampler=euler", "steps=4")
    label = torch.tensor([1, 2])
    found = sample(model_of(checkpoint)[0], label, config, start=0)
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(config.seed * 2**32))
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * theirs(x, torch.full((2,), t), label)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_latent_tokens_become_pictures_cell_by_cell(checkpoint, tmp_path):
    _, image = model_of(checkpoint)
    decode = decoder(settings(checkpoint, tmp_path), image)
    latent = torch.rand(2, 4, 8, 8) * 4 - 2
    tokens = torch.stack(  # (channel, row, column) inside a token, tokens row by row
        [
            latent[:, :, r : r + 2, k : k + 2].flatten(1)
            for r in range(0, 8, 2)
            for k in range(0, 8, 2)
        ],
        1,
    )
    wanted = ((latent[:, :3].permute(0, 2, 3, 1) / 3 + 1) * 127.5).round().byte()
    assert torch.equal(decode(tokens), wanted)


def test_an_autoencoder_decodes(checkpoint, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    config = settings(checkpoint, tmp_path, "codec=sd_vae", f"codec_path={tmp_path / 'vae'}")
    check(config)
    _, image = model_of(checkpoint)
    tokens = torch.randn(2, 16, 16)
    pictures = decoder(config, image)(tokens)
    cells = tokens.unflatten(1, (4, 4)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    with torch.no_grad():
        wanted = vae.decode(cells.reshape(2, 4, 8, 8) / 0.18215).sample.permute(0, 2, 3, 1)
    wanted = ((wanted + 1) * 127.5).round().clamp(0, 255)
    assert pictures.shape == (2, 64, 64, 3)
    assert (pictures.float() - wanted).abs().max() <= 1


def test_labels():
    def of(classes, samples=1000):
        return labels(settings("x", "y", f"classes={classes}", f"samples={samples}"), 6)

    assert of("balanced", 7).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert set(of("random")) == set(range(5))  # never the sixth, which is "no label"
    assert (of("random") == of("random")).all()


def test_a_run_is_resumed_and_leaves_what_adm_reads(checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", real)
    reference = f"reference={tmp_path / 'real.npz'}"
    whole = settings(checkpoint, tmp_path / "whole", reference)
    check(whole)
    main(whole)
    with np.load(tmp_path / "whole" / "samples.npz", allow_pickle=False) as file:
        images, classes = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype, classes.shape) == ((10, 8, 8, 3), np.uint8, (10,))
    assert (classes == labels(whole, SIZES.classes)).all()
    assert "fid_random: " in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        "config.json", "samples.npz", "sheet.png", "summary.json",
    }  # fmt: skip

    # as if cut off after the second of three batches, whose file says so by its colour
    cut = settings(checkpoint, tmp_path / "cut")
    parts = tmp_path / "cut" / "parts"
    parts.mkdir(parents=True)
    np.save(parts / "000000.npy", images[:4])
    np.save(parts / "000004.npy", np.full((4, 8, 8, 3), 77, np.uint8))
    main(cut)
    pieces = list(read_npz(tmp_path / "cut" / "samples.npz", batch=4))
    assert [len(p) for p in pieces] == [4, 4, 2]
    assert (pieces[1] == 77).all()
    assert (pieces[2] == images[8:]).all()

    with pytest.raises(UserError, match="other keys"):
        check(settings(checkpoint, tmp_path / "whole", "seed=32"))
    check(settings(checkpoint, tmp_path / "whole", "threads=1"))


def test_mistakes_are_named(checkpoint, tmp_path):
    cases = {
        "sampler=ddim": "choose one of euler, heun, sde",
        "steps=1": "steps=1: 2 or more",
        "cfg=0.5": "cfg=0.5: 1 or more",
        "cfg_from=0.9": "cfg_from <= cfg_to",
        "codec=sd_vae": "codec_path",
        "features=nowhere.pt": "no such file",
        "checkpoint=nowhere": "no such folder",
        "codec=flux": "choose one of none, sd_vae, taesd",
    }
    for override, message in cases.items():
        with pytest.raises(UserError, match=message):
            check(settings(checkpoint, tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_npz_round_trip_and_foreign_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 3), dtype=np.uint8)
    path = tmp_path / "a.npz"
    write_npz(path, (images[i : i + 3] for i in range(0, 7, 3)), np.arange(7))
    with np.load(path, allow_pickle=False) as file:
        assert (file["arr_0"] == images).all()
        assert (file["arr_1"] == np.arange(7)).all()
    assert (np.concatenate(list(read_npz(path, 2))) == images).all()
    with pytest.raises(ValueError, match="7 images for 8"):
        write_npz(tmp_path / "b.npz", [images], np.arange(8))
    assert not (tmp_path / "b.npz").exists()
    np.savez(tmp_path / "c.npz", images.astype(np.float32))
    with pytest.raises(UserError, match="not uint8"):
        list(read_npz(tmp_path / "c.npz"))
    (tmp_path / "d.npz").write_text("x")
    with pytest.raises(UserError, match=r"not an \.npz"):
        list(read_npz(tmp_path / "d.npz"))


def test_frechet_of_gaussians_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(3, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    assert frechet(0 * shift, 4 * eye, shift, eye) == pytest.approx(9 + 3 * (2 - 1) ** 2)
    assert frechet(shift, eye, shift, eye) == pytest.approx(0, abs=1e-9)
    # two channels that do not commute: tr (A B)^½ = (tr A B + 2 (det A B)^½)^½
    a, b = (
        x @ x.T for x in torch.randn(2, 2, 2, generator=generator, dtype=torch.float64).unbind()
    )
    trace = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    assert frechet(zero, a, zero, b) == pytest.approx(float((a + b).trace() - 2 * trace))
    # fewer samples than channels: singular covariances
    singular = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert frechet(0 * shift, singular, 0 * shift, 9 * singular) == pytest.approx(4)


def test_moments_do_not_depend_on_batches():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    found = Moments()
    for part in x.split([1, 20, 29]):
        found.add(part)
    torch.testing.assert_close(found.mean, x.double().mean(0))
    torch.testing.assert_close(found.covariance, x.double().T.cov(), rtol=1e-9, atol=0)


class Inceptionish(torch.nn.Module):
    """As StyleGAN's Inception: probabilities, unless asked for features."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = x.mean([2, 3])
        if return_features:
            return features
        return features.softmax(1)


def test_feature_networks(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Inceptionish()), tmp_path / "net.pt")
    name, features = feature_network(str(tmp_path / "net.pt"), CPU)
    assert name == "fid_net"
    found = moments([images[:2], images[2:]], features, CPU)
    wanted = torch.from_numpy(images).double().mean((1, 2))
    torch.testing.assert_close(found.mean, wanted.mean(0), rtol=1e-6, atol=0)

    name, random = feature_network(None, CPU)
    assert name == "fid_random"
    a, b = random(torch.zeros(2, 3, 8, 8)), feature_network(None, CPU)[1](torch.zeros(2, 3, 8, 8))
    assert torch.equal(a, b)
    (tmp_path / "bad.pt").write_text("x")
    with pytest.raises(UserError, match="not a TorchScript"):
        feature_network(str(tmp_path / "bad.pt"), CPU)


def test_reference_takes_stored_statistics_only_for_the_network_they_are_of(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=images, mu=np.full(64, 5.0), sigma=np.eye(64))
    _, random = feature_network(None, CPU)
    assert (reference_moments(path, random, CPU, stored=True)[0] == 5).all()
    mean, covariance = reference_moments(path, random, CPU, stored=False)
    assert not (mean == 5).any()
    assert covariance.shape == (64, 64)


def test_the_default_config_is_the_published_recipe():
    config = compose(SampleConfig, "sample_images", [])
    assert (config.sampler, config.steps, config.cfg, config.cfg_to) == ("sde", 250, 1.0, 0.7)
    assert config.samples == 50_000
    assert Path(config.checkpoint) == Path("checkpoints/imagenet")
