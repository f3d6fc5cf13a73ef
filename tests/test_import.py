"""The published layout, imported, answers as the published network did."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from selfflow.datasets.spec import UserError
from selfflow.eval.bench.per_token import PerTokenDiT, Published, randomised
from selfflow.worldmodel.checkpoint import Checkpoint, RunError, fill, load
from selfflow.worldmodel.import_checkpoint import (
    ImportConfig,
    check,
    convert,
    main,
    output_rows,
    read,
    reversed_time,
    transfer,
)
from selfflow.worldmodel.layers import Projector, sinusoids
from selfflow.worldmodel.transformer import Modality, ModelConfig, VideoActionTransformer

ROOT = Path(__file__).parents[1]
ORACLE = ROOT.parent / "shared" / "oracle" / "selfflow_per_token_dit_a.safetensors"
SMALL = Published(size=8, hidden=32, depth=3, heads=4, classes=5)


def modules(state, heads):
    """Backbone and projector of an imported state dict."""
    config, weights = convert(state, heads)
    checkpoint = Checkpoint(Path("imported"), {"model": config.to_dict()}, {}, weights)
    backbone, projector = VideoActionTransformer(config), Projector(config.hidden)
    fill(backbone, checkpoint.part("backbone"), "imported")
    fill(projector, checkpoint.part("projector"), "imported")
    return backbone.eval(), projector.eval(), checkpoint


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is not here: the official outputs lie outside the repository")
    with safe_open(ORACLE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sizes = {k: v for k, v in file.metadata().items() if v.isdigit()}
    parts = {}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = value
    return parts, {k: int(v) for k, v in sizes.items()}


@torch.no_grad()
def test_imported_weights_agree_with_the_official_outputs(oracle):
    parts, sizes = oracle
    given, wanted = parts["in"], parts["out"]
    backbone, projector, _ = modules(parts["state"], sizes["heads"])
    tokens, label, block = {"image": given["x"]}, given["y"], sizes["student_block"]

    def close(answer, name):
        torch.testing.assert_close(answer, wanted[name], atol=1e-5, rtol=0)

    own = given["t_per_token"]
    velocity, feature = backbone.forward_with_feature(tokens, own, None, block=block, label=label)
    close(velocity["image"], "velocity_per_token")
    close(projector(feature), "projected_features")
    close(backbone.features(tokens, own, None, block=block + 1, label=label), "raw_features_next")
    scalar = given["t_scalar"][:, None]
    close(backbone(tokens, scalar, None, label=label)["image"], "velocity_scalar")
    same = scalar.expand(-1, own.shape[1])
    close(backbone(tokens, same, None, label=label)["image"], "velocity_scalar")


@torch.no_grad()
def test_groups_give_what_per_token_times_give(oracle):
    parts, sizes = oracle
    given = parts["in"]
    backbone, _, _ = modules(parts["state"], sizes["heads"])
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 2, given["t_per_token"].shape, generator=generator)
    tau = torch.rand(len(group), 2, generator=generator)
    tokens, label = {"image": given["x"]}, given["y"]
    by_group = backbone(tokens, tau, group, label=label)["image"]
    by_token = backbone(tokens, tau.gather(1, group), None, label=label)["image"]
    torch.testing.assert_close(by_group, by_token, atol=1e-5, rtol=0)
    wrong = backbone(tokens, tau, 1 - group, label=label)["image"]
    assert (wrong - by_token).abs().max() > 1e-3


def test_time_is_reversed_exactly_in_float64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 256, generator=generator, dtype=torch.float64)
    t = torch.rand(50, generator=generator, dtype=torch.float64)
    theirs = sinusoids(1 - t, 256) @ weight.T
    torch.testing.assert_close(
        sinusoids(t, 256) @ reversed_time(weight).T, theirs, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(reversed_time(reversed_time(weight)), weight)


def test_output_rows_are_channels_first_without_sigma():
    # published order: ((row * 2 + column) * 8 + channel), channels 4..7 are sigma's
    assert output_rows(32).tolist() == [p * 8 + c for c in range(4) for p in range(4)]
    assert output_rows(16).tolist() == [p * 4 + c for c in range(4) for p in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_null_label_and_sigma_variants(learn_sigma):
    theirs = randomised(replace(SMALL, learn_sigma=learn_sigma))
    ours, _, _ = modules(theirs.state_dict(), SMALL.heads)
    x, t = torch.randn(2, 16, 16), torch.rand(2, 16)
    null = torch.full((2,), SMALL.classes - 1)
    torch.testing.assert_close(
        ours({"image": x}, t, None)["image"], theirs(x, t, null), atol=1e-5, rtol=1e-5
    )


def test_files_and_wrappers(tmp_path):
    state = dict(PerTokenDiT(SMALL).state_dict())
    torch.save(
        {"model": {f"module.{k}": v for k, v in state.items()}, "step": 3}, tmp_path / "a.pt"
    )
    torch.save({"ema": state, "opt": {"lr": 1.0}}, tmp_path / "b.pt")
    save_file(state, tmp_path / "c.safetensors")
    for name, part in (("a.pt", None), ("b.pt", "ema"), ("c.safetensors", None)):
        found = read(tmp_path / name, part)
        assert found.keys() == state.keys(), name
        assert all(torch.equal(found[k], state[k]) for k in state)
    with pytest.raises(RunError, match=r"part=.*ema"):
        read(tmp_path / "b.pt")
    with pytest.raises(RunError, match=r"part=emma: .* has ema, opt"):
        read(tmp_path / "b.pt", "emma")
    torch.save({"model": Published()}, tmp_path / "evil.pt")  # any object: only tensors are read
    with pytest.raises(RunError, match="cannot be read safely"):
        read(tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(RunError, match="cannot be read safely"):
        read(tmp_path / "text.pt")


def test_keys_shapes_and_positions_are_checked():
    state = dict(PerTokenDiT(SMALL).state_dict())
    cases = {
        "1 missing.*blocks.1.mlp.fc1.bias": lambda s: s.pop("blocks.1.mlp.fc1.bias"),
        "1 unexpected.*blocks.0.norm": lambda s: s.update({"blocks.0.norm": torch.zeros(1)}),
        "another shape.*blocks.0.attention.out": lambda s: s.update(
            {"blocks.0.attn.proj.weight": torch.zeros(32, 31)}
        ),
        "pos_embed is not": lambda s: s.update(pos_embed=s["pos_embed"] + 0.1),
        "missing": lambda s: s.pop("pos_embed"),
    }
    for message, spoil in cases.items():
        spoilt = dict(state)
        spoil(spoilt)
        with pytest.raises(RunError, match=message):
            convert(spoilt, SMALL.heads)
    with pytest.raises(RunError, match=r"heads=\.\.\. is required"):
        convert(state)


def settings(source, out, **values):
    free = {"part": None, "heads": 4, "student_block": None, "teacher_block": None}
    return ImportConfig(source=str(source), out=str(out), **(free | values))


def test_the_written_checkpoint_is_of_kind_image(tmp_path):
    state = dict(PerTokenDiT(SMALL).state_dict())
    save_file(state, tmp_path / "published.safetensors")
    config = settings(tmp_path / "published.safetensors", tmp_path / "out")
    check(config)
    main(config)
    found = load(tmp_path / "out", "image")
    assert found.statistics == {}
    assert found.config["image"] == {
        "size": 8, "patch": 2, "channels": 4, "classes": 5, "codec": "sd_vae", "scale": 0.18215,
    }  # fmt: skip
    assert (found.config["student_block"], found.config["teacher_block"]) == (1, 2)
    assert ModelConfig.from_dict(found.config["model"]).heads == 4
    assert set(tmp_path.iterdir()) == {tmp_path / "published.safetensors", tmp_path / "out"}
    with pytest.raises(UserError, match="exists"):
        check(config)


@pytest.mark.slow
def test_the_bare_command(tmp_path):
    script = ROOT / "worldmodel" / "import_checkpoint.py"
    done = subprocess.run(
        [sys.executable, script, "nowhere.pt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "import_checkpoint.py: source=nowhere.pt: no such file\n"
    assert not list(tmp_path.iterdir())


def test_the_published_sizes_are_inferred():
    """Shapes only, on the meta device: 675 M."""
    with torch.device("meta"):
        state = dict(PerTokenDiT(Published()).state_dict())
        ours = VideoActionTransformer(geometry_of(state))
    count = sum(v.numel() for k, v in state.items() if "pos" not in k and "projector" not in k)
    assert len(state) == 296
    assert count == 674_834_720
    # without sigma's 16 output rows; with the learned modality embedding and stand-in
    assert sum(p.numel() for p in ours.parameters()) == count - 16 * 1153 + 2 * 1152


def geometry_of(state):
    from selfflow.worldmodel.import_checkpoint import geometry

    config = geometry(state)
    assert (config.hidden, config.depth, config.heads, config.classes) == (1152, 28, 16, 1001)
    assert config.modalities[0].grid == (1, 16, 16)
    assert (config.block_at(0.3), config.block_at(0.7)) == (8, 20)
    return config


def video_model(**values):
    modalities = (
        Modality("context", 12, 4, "condition", (1, 2, 2)),
        Modality("action", 7, 6, "target", (6, 1, 1)),
    )
    sizes = {"hidden": 32, "depth": 2, "heads": 4, "mlp_ratio": 4.0, "attention": "prefix"}
    return VideoActionTransformer(ModelConfig(modalities=modalities, **(sizes | values)))


def test_transfer_takes_what_modalities_share_and_says_so():
    _, _, source = modules(randomised(SMALL).state_dict(), SMALL.heads)
    model = video_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = transfer(source, model)
    assert set(report.taken) | set(report.fresh) == before.keys()
    assert {n.split(".")[0] for n in report.taken} == {"time", "blocks", "final"}
    assert {n.split(".")[0] for n in report.fresh} == {"inputs", "outputs"}
    for name, value in model.state_dict().items():
        was = source.part("backbone")[name] if name in report.taken else before[name]
        if name == "time.mlp.2.bias":
            was = was + source.part("backbone")["labels.weight"][-1]
        assert torch.equal(value, was), name
    assert {n for n in report.left if n.startswith("blocks")} == {
        n for n in source.part("backbone") if n.startswith("blocks.2.")
    }
    assert "blocks (20 tensors)" in str(report).splitlines()[0]
    assert "inputs.image (4 tensors)" in str(report).splitlines()[1]


@torch.no_grad()
def test_transferred_blocks_do_what_they_did_without_a_label():
    image, _, source = modules(randomised(SMALL).state_dict(), SMALL.heads)
    model = VideoActionTransformer(replace(image.config, classes=0))
    report = transfer(source, model)
    for name in report.fresh:
        model.state_dict()[name].copy_(image.state_dict()[name])
    tokens, tau = {"image": torch.randn(2, 16, 16)}, torch.rand(2, 1)
    torch.testing.assert_close(model(tokens, tau), image(tokens, tau), atol=1e-5, rtol=1e-5)


def test_transfer_refuses_other_models():
    _, _, source = modules(randomised(SMALL).state_dict(), SMALL.heads)
    with pytest.raises(RunError, match="hidden=32, this model hidden=64"):
        transfer(source, video_model(hidden=64))
    with pytest.raises(RunError, match="heads=4, this model heads=2"):
        transfer(source, video_model(heads=2))
    with pytest.raises(RunError, match="family=sit, this model family=flux"):
        transfer(source, video_model(family="flux"))
    with pytest.raises(RunError, match="3 blocks, this model 4"):
        transfer(source, video_model(depth=4))
