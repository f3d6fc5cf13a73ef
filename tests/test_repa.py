"""External teachers: a small random frozen ViT, a given module, and features on the token grid."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from selfflow.worldmodel import flow, repa
from selfflow.worldmodel.checkpoint import RunError
from selfflow.worldmodel.repa import ModuleTeacher, Teacher, VisionTeacher, align_grid

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PROCESSOR = {"image_mean": MEAN, "image_std": STD, "size": {"height": 32, "width": 32}}


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def frames(batch: int = 2, count: int = 3, height: int = 24, width: int = 40) -> Tensor:
    shape = (batch, count, height, width, 3)
    return torch.randint(0, 256, shape, generator=gen(), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block ViT of patch 8 as a local transformers folder."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    path = tmp_path_factory.mktemp("vit")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, intermediate_size=32, image_size=32, patch_size=8)
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return path


def test_a_vit_from_a_folder_sees_normalised_frames(folder: Path) -> None:
    teacher = VisionTeacher(str(folder))
    assert isinstance(teacher, Teacher)
    assert (teacher.width, teacher.grid) == (16, (4, 4))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    constant = torch.full((1, 3, 24, 40), 128, dtype=torch.uint8)
    want = [(128 / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    assert torch.allclose(teacher.prepare(constant)[0, :, 0, 0], torch.tensor(want), atol=1e-6)

    seen = frames()
    features = teacher.features(seen)
    assert features.shape == (2, 3, 4, 4, 16)
    assert not features.requires_grad
    one = teacher.prepare(seen[1, 2].permute(2, 0, 1)[None])
    states = teacher.model(pixel_values=one).last_hidden_state[0, 1:]  # without the class token
    assert torch.allclose(features[1, 2].flatten(0, 1), states, atol=1e-5)


def test_many_frames_go_through_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = VisionTeacher(str(folder))
    whole = teacher.features(frames())
    monkeypatch.setattr(repa, "AT_ONCE", 4)
    assert torch.allclose(teacher.features(frames()), whole, atol=1e-6)


def test_class_and_register_tokens_are_dropped(folder: Path) -> None:
    teacher = VisionTeacher(str(folder))

    class WithRegisters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.count = 5 + 16

        def forward(self, pixel_values: Tensor):
            tokens = (
                torch.arange(float(self.count)).view(1, -1, 1).expand(len(pixel_values), -1, 16)
            )
            return type("Output", (), {"last_hidden_state": tokens})

    teacher.model = model = WithRegisters()
    assert teacher.features(frames())[0, 0, :, :, 0].flatten().tolist() == list(range(5, 21))
    model.count = 10  # a hierarchical encoder's
    with pytest.raises(RunError, match="one token a patch"):
        teacher.features(frames())


def test_only_the_vision_half_of_a_clip_is_taken(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16}
    vision = size | {"image_size": 32, "patch_size": 8}
    text = size | {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    processor = PROCESSOR | {"size": {"shortest_edge": 32}, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    teacher = VisionTeacher(str(tmp_path))
    assert teacher.features(frames(1, 1)).shape == (1, 1, 4, 4, 16)


def test_sizes_that_image_processors_state() -> None:
    assert repa._size({"size": {"height": 32, "width": 48}}, 99) == (32, 48)
    cropped = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    assert repa._size(cropped, 99) == (224, 224)
    assert repa._size({"size": {"shortest_edge": 96}}, 99) == (96, 96)
    assert repa._size({"size": 64}, 99) == (64, 64)
    assert repa._size({}, 99) == (99, 99)


def test_a_teacher_that_does_not_load_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="does not load") as error:
        VisionTeacher(str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text("{}")
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(RunError, match="image_mean"):
        VisionTeacher(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunError, match=r"pip install 'selfflow\[repa\]'"):
        VisionTeacher(str(folder))


def test_a_given_module_is_frozen_and_checked() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 5)

        def forward(self, frames: Tensor) -> Tensor:
            pooled = frames.float().unflatten(2, (2, -1)).unflatten(4, (3, -1)).mean((3, 5))
            return self.out(pooled).flatten(1, 3)

    module = Mean()
    teacher = ModuleTeacher(module, 5, (2, 3))
    assert isinstance(teacher, Teacher)
    features = teacher.features(frames(width=42))
    assert features.shape == (2, 3, 2, 3, 5)
    assert not features.requires_grad
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    corner = frames(width=42)[1, 2, 12:, 28:].float().mean((0, 1))
    assert torch.allclose(features[1, 2, 1, 2], module.out(corner), atol=1e-4)
    with pytest.raises(RunError, match="do not fill"):
        ModuleTeacher(module, 5, (2, 2)).features(frames(width=42)[:, :1])
    with pytest.raises(RunError, match="do not fill"):
        ModuleTeacher(module, 6, (2, 3)).features(frames(width=42))


def test_grid_of_the_same_size_is_left_alone() -> None:
    features = torch.randn(2, 3, 4, 5, 6, generator=gen())
    assert torch.equal(align_grid(features, (3, 4, 5)), features)


def test_places_are_interpolated_linearly() -> None:
    # a plane stays a plane inside, at the places of the new cells' centres
    row, column = torch.meshgrid(torch.arange(8.0) + 0.5, torch.arange(8.0) + 0.5, indexing="ij")
    plane = (row / 8 + 10 * column / 8)[None, None, ..., None]
    finer = align_grid(plane, (1, 16, 32)).view(16, 32)
    r, c = (torch.arange(16) + 0.5) / 16, (torch.arange(32) + 0.5) / 32
    want = r[:, None] + 10 * c
    assert torch.allclose(finer[2:-2, 4:-4], want[2:-2, 4:-4], atol=1e-5)
    coarser = align_grid(plane, (1, 4, 4)).view(4, 4)
    centre = (torch.arange(4) + 0.5) / 4
    assert torch.allclose(coarser[1:-1, 1:-1], (centre[:, None] + 10 * centre)[1:-1, 1:-1])
    # stripes as narrow as a new cell average out; without antialiasing their middles were taken
    stripes = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16, 4)[None, None, ..., None]
    averaged = align_grid(stripes, (1, 4, 4)).view(4, 4)[:, 1:-1]
    assert torch.allclose(averaged, torch.full((4, 2), 0.5))


def test_times_follow_a_causal_codec_or_are_averaged() -> None:
    clock = torch.arange(49.0).view(1, 49, 1, 1, 1).expand(1, 49, 2, 3, 4)
    latent = align_grid(clock, (13, 2, 3)).view(13, 6, 4)
    want = torch.tensor([0.0] + [4 * i - 1.5 for i in range(1, 13)])  # frame 0; 1-4; 5-8; ...
    assert torch.equal(latent, want.view(13, 1, 1).expand(13, 6, 4))
    halves = align_grid(clock[:, :6], (3, 2, 3)).view(3, 6, 4)[:, 0, 0]
    assert halves.tolist() == [0.5, 2.5, 4.5]
    last = align_grid(clock[:, :2], (4, 2, 3)).view(4, 6, 4)[:, 0, 0]
    assert last.tolist() == [0, 0, 1, 1]  # a teacher that compresses time more than the codec
    assert align_grid(clock[:, :5], (1, 2, 3)).unique().tolist() == [2.0]


def test_repa_loss_reaches_the_student_alone(folder: Path) -> None:
    teacher = VisionTeacher(str(folder))
    aim = align_grid(teacher.features(frames()), (3, 2, 5)).flatten(1, 3)
    student = torch.randn(2, 30, 12, requires_grad=True)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 10:] = False
    width = aim.shape[-1]
    head = nn.Linear(12, width)
    loss = flow.representation_loss(head(student), aim, valid)
    loss.backward()
    assert student.grad is not None
    assert (student.grad[1, 10:] == 0).all()
    assert (student.grad[valid].norm(dim=-1) > 0).all()
    assert all(p.grad is None for p in teacher.model.parameters())
    perfect = flow.representation_loss(aim * 3, aim, valid)
    assert perfect.item() == pytest.approx(0, abs=1e-6)
