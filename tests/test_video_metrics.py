"""PSNR, SSIM, LPIPS, FVD and their intervals, against what is known in closed form."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from selfflow.datasets.spec import UserError
from selfflow.eval import bootstrap
from selfflow.eval.chart import COLOURS, Line, Panel, Span, save_chart, save_rows, ticks
from selfflow.eval.images import frechet
from selfflow.eval.video_metrics import (
    Lpips,
    clip_features,
    psnr,
    ssim,
    video_net,
    weighted_moments,
)


def images(count: int = 2, seed: int = 0, size: int = 32) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    small = torch.randint(60, 180, (count, 3, 4, 4), generator=random).float()
    large = F.interpolate(small, (size, size), mode="bilinear")
    return large.permute(0, 2, 3, 1).to(torch.uint8)


def test_psnr_of_a_constant_offset() -> None:
    real = images(3)
    found = psnr(real + torch.tensor([1, 10, 50], dtype=torch.uint8)[:, None, None, None], real)
    expected = [20 * math.log10(255 / d) for d in (1, 10, 50)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_ssim_is_one_for_equal_and_near_zero_for_unrelated_images() -> None:
    real = images(2)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    assert ssim(real, real).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (ssim(noise, real) < 0.1).all()
    assert ssim(real[:1], real[:1]).shape == (1,)


def test_random_lpips_is_named_so_and_orders_distortions() -> None:
    net, real = Lpips(), images(2)
    assert net.name == "lpips_random"
    assert net(real, real).tolist() == [0, 0]
    noise = torch.randint(-40, 41, real.shape, generator=torch.Generator().manual_seed(0))
    little, much = ((real + k * noise / 4).clamp(0, 255).to(torch.uint8) for k in (1, 4))
    assert (net(little, real) > 0).all()
    assert (net(little, real) < net(much, real)).all()
    assert torch.equal(net(little, real), Lpips()(little, real)), "the same weights every time"


def test_lpips_reads_alexnet_as_torchvision_names_it(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    weights = {}
    for index, (i, o, k, _, _) in zip(Lpips.INDEX, Lpips.LAYERS, strict=True):
        weights[f"features.{index}.weight"] = torch.randn(o, i, k, k, generator=random) / k
        weights[f"features.{index}.bias"] = torch.randn(o, generator=random)
    path = tmp_path / "alexnet.pth"
    torch.save(weights, path)
    net = Lpips(str(path))
    assert net.name == "lpips_alex"
    one, other = images(1, 0), images(1, 5)
    found = net(one, other)
    # torchvision's `features`, step by step
    package = Path(pytest.importorskip("torchmetrics").__file__).parent
    linear = torch.load(
        package / "functional/image/lpips_models/alex.pth", "cpu", weights_only=True
    )

    def maps(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift[:, None, None]) / scale[:, None, None]
        w = [(weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]) for i in Lpips.INDEX]
        a = F.relu(F.conv2d(x, *w[0], stride=4, padding=2))
        b = F.relu(F.conv2d(F.max_pool2d(a, 3, 2), *w[1], padding=2))
        c = F.relu(F.conv2d(F.max_pool2d(b, 3, 2), *w[2], padding=1))
        d = F.relu(F.conv2d(c, *w[3], padding=1))
        return [F.normalize(m, dim=1) for m in (a, b, c, d, F.relu(F.conv2d(d, *w[4], padding=1)))]

    expected = sum(
        F.conv2d((x - y) ** 2, linear[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
        for i, (x, y) in enumerate(zip(maps(one), maps(other), strict=True))
    )
    assert torch.allclose(found, expected, rtol=1e-4)
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"no features\.0\.weight of \(64, 3, 11, 11\)"):
        Lpips(str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        Lpips(str(tmp_path / "none.pth"))


def test_weighted_moments_are_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    x, times = rng.normal(size=(20, 3)), rng.integers(0, 4, 20)
    mean, covariance = weighted_moments(x, times.astype(float))
    repeated = np.repeat(x, times, 0)
    assert np.allclose(mean, repeated.mean(0))
    assert np.allclose(covariance, np.cov(repeated.T))


def test_frechet_distance_of_moved_clips_is_the_squared_move() -> None:
    rng, ones = np.random.default_rng(0), np.ones(50)
    x, move = rng.normal(size=(50, 4)), np.array([1.0, -2, 0, 0.5])
    found = frechet(*weighted_moments(x, ones), *weighted_moments(x + move, ones))
    assert found == pytest.approx(np.square(move).sum())


def test_random_fvd_sees_the_order_of_frames() -> None:
    net = video_net(None)
    assert net.name == "fvd_random"
    still = images(3)[:, None].repeat(1, 4, 1, 1, 1)
    moving = torch.stack([images(3).roll(2 * t, 2) for t in range(4)], 1)
    features = [clip_features(net, clips) for clips in (still, moving, moving.flip(1))]
    assert features[0].shape == (3, 64)
    assert features[0].dtype == np.float64
    apart = [np.abs(a - features[1]).max() for a in features]
    assert apart[0] > 0.1
    assert apart[2] > 0.01
    assert np.array_equal(features[1], clip_features(video_net(None), moving))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fvd_with_a_video_encoder_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    transformers.VideoMAEModel(config).save_pretrained(tmp_path / "mae")
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "mae" / "preprocessor_config.json").write_text(json.dumps(colours))
    net = video_net(str(tmp_path / "mae"))
    assert net.name == "fvd_mae"
    clips = images(2, size=48)[:, None].repeat(1, 3, 1, 1, 1)
    assert clip_features(net, clips).shape == (2, 24)
    with pytest.raises(UserError, match=r"no config\.json"):
        video_net(str(tmp_path))


def test_intervals_resample_whole_episodes() -> None:
    """With one value repeated through each episode, more frames make the mean no surer."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=40)
    weights = bootstrap.resamples(40, 2000, 0)
    assert (weights.sum(1) == 40).all()
    once = bootstrap.mean(value, np.arange(40), weights)
    often = bootstrap.mean(np.repeat(value, 9), np.repeat(np.arange(40), 9), weights)
    assert (once.value, once.low, once.high) == pytest.approx((often.value, often.low, often.high))
    half = 1.96 * value.std() / math.sqrt(40)
    assert once.high - once.low == pytest.approx(2 * half, rel=0.1)


def test_differences_are_paired_and_missing_values_left_out() -> None:
    rng = np.random.default_rng(0)
    value, weights = rng.normal(size=30), bootstrap.resamples(30, 500, 0)
    one = bootstrap.mean(value, np.arange(30), weights)
    other = bootstrap.mean(value + 0.01, np.arange(30), weights)
    apart = bootstrap.difference(other, one)
    assert (apart.low, apart.high) == pytest.approx((0.01, 0.01))
    assert bootstrap.average([one, other]).value == pytest.approx(one.value + 0.005)
    gaps = np.where(np.arange(30) % 2, value, np.nan)
    assert bootstrap.mean(gaps, np.arange(30), weights).value == pytest.approx(value[1::2].mean())
    nothing = bootstrap.mean(np.full(30, np.nan), np.arange(30), weights)
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)


def test_charts_have_round_ticks_and_bear_gaps(tmp_path: Path) -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-0.13, 0.22) == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2])
    lines = [Line("a", [0, 1, 2], [1, float("nan"), 3], [0, float("nan"), 2], [2, 3, 4])]
    panels = [Panel("flat", "x", [Line("b", [1], [5])]), Panel("gap", "x", lines)]
    save_chart([*panels, Panel("empty", "x", [])], tmp_path / "chart.png", columns=2)
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


def test_rows_have_a_dot_where_their_value_is(tmp_path: Path) -> None:
    rows = {"one": {"early": Span(0.0, 0, 0), "late": Span(1, 0.9, 1, [0.95])}, "two": {}}
    save_rows(rows, "title", tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as image:
        picture = np.asarray(image.convert("RGB"))
    for y, colour in zip((41, 53), COLOURS, strict=False):
        found = np.flatnonzero((picture[y] == colour).all(1))
        assert found.mean() == pytest.approx(170 if y == 41 else 2 * 420 - 14, abs=4)
