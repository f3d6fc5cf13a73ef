"""A clip as a source: the real RT-1 episode, names, and files that are no video."""

from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.normalize import fit
from selfflow.datasets.source import open_source, open_sources
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.video import VideoClip, guess_instruction
from selfflow.datasets.windows import Mixture, WindowSpec

SAMPLES = Path(__file__).parents[2] / "shared/samples/maniskill2_real2sim"
CLIP = SAMPLES / "rt1_real_standing_coke_can_1.mp4"


@pytest.fixture(scope="module")
def clip() -> VideoClip:
    if not CLIP.exists():
        pytest.skip(f"no real RT-1 clip at {CLIP}: reading it is not tested")
    source = open_source(str(CLIP))
    assert isinstance(source, VideoClip)
    return source


def test_the_real_clip(clip: VideoClip) -> None:
    assert (len(clip), clip.length(0), clip.skipped) == (1, 16, 0)
    assert clip.embodiment.name == "google_robot"
    last, first = clip.frames(0, [15, 0])
    assert first.shape == (256, 320, 3)
    assert first.dtype == np.uint8
    assert 2 < np.abs(first.astype(int) - last).mean() < 60  # the same room, something moved
    np.testing.assert_array_equal(clip.frames(0, [0], "overhead_camera")[0], first)
    with pytest.raises(UserError, match="overhead_camera"):
        clip.frames(0, [0], "wrist")


def test_nothing_but_frames_and_text_is_valid(clip: VideoClip) -> None:
    signals = clip.signals(0)
    assert signals.instruction == ["pick coke can"] * 16
    assert not signals.action_valid.any()
    assert not signals.proprio_valid.any()
    assert fit([clip]) == {}
    spec = WindowSpec(frames=(0, 4, 8), chunk=4, height=64, width=80)
    batch = Mixture([clip], [1.0], spec, seed=0).batch(0, 8)
    assert not batch.action_valid.any()
    assert not batch.terminate_valid.any()
    assert batch.frames.std() > 10


def test_weight_and_parameters(clip: VideoClip) -> None:
    _, weights = open_sources([f"{CLIP}@0.25", str(CLIP)])
    assert weights == [0.25, 1.0]
    other = VideoClip(CLIP, EMBODIMENTS["widowx"], "put carrot on plate")
    assert other.embodiment.control_hz == 5
    assert other.signals(0).instruction[3] == "put carrot on plate"


@pytest.mark.parametrize(
    ("stem", "instruction"),
    [
        ("rt1_real_standing_coke_can_1", "pick coke can"),
        ("Open-Top-Drawer", "open top drawer"),
        ("put_carrot_plate_03", "put carrot on plate"),
        ("bridge_real_2", "bridge real"),
        ("0042", ""),
    ],
)
def test_instructions_from_names(stem: str, instruction: str) -> None:
    assert guess_instruction(stem) == instruction


def test_what_is_no_video(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 50)
    with pytest.raises(UserError, match=r"broken\.mp4: not a video that can be decoded"):
        open_source(str(broken))
