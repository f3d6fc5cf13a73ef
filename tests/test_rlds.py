"""TFRecord, Example and Bridge: the 25 real episodes of Octo's sample, and damage of every kind."""

import contextlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from selfflow.datasets.bridge import ACTION, BRIDGE, LAST, STATE, TOP_DOWN, binarise
from selfflow.datasets.rlds import RldsSource, decode_image
from selfflow.datasets.rlds_schema import Leaf, described
from selfflow.datasets.rotations import compose, from_axis_angle, from_rpy, to_axis_angle, to_matrix
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError
from selfflow.datasets.tfrecord import (
    CorruptRecord,
    encode_example,
    masked_crc32c,
    parse_example,
    read_records,
    scan,
    write_records,
)
from selfflow.datasets.windows import Mixture, WindowSpec

BRIDGE_SAMPLE = Path(__file__).parents[2] / "shared/samples/octo_bridge_debug/bridge_dataset"
TEXTS = {
    "put cup from counter or drying rack into sink",
    "flip pot upright which is in sink",
    "turn lever vertical to front",
    "put carrot on plate",
}


@pytest.fixture(scope="module")
def real() -> RldsSource:
    if not BRIDGE_SAMPLE.is_dir():
        pytest.skip(f"no real Bridge episodes at {BRIDGE_SAMPLE}: reading them is not tested")
    source = open_source(str(BRIDGE_SAMPLE))
    assert isinstance(source, RldsSource)
    return source


@pytest.fixture(scope="module")
def raw(real: RldsSource) -> list[dict]:
    """All features of all records, checksums checked."""
    (path,) = BRIDGE_SAMPLE.glob("*/*.tfrecord*")
    return [parse_example(record) for record in read_records(path)]


def test_all_real_episodes(real: RldsSource, raw: list[dict]) -> None:
    assert len(real) == len(raw) == 25
    assert real.skipped == 0
    assert real.embodiment.name == "widowx"
    assert real.name == "bridge_dataset/train"
    seen = set()
    for i in range(25):
        assert real.length(i) == 10
        signals = real.signals(i)
        assert signals.actions.shape == (10, 7)
        assert signals.action_valid.tolist() == [False] + [True] * 9
        assert signals.proprio_valid.all()
        assert not signals.terminate.any()  # the sample is cut to 10 steps, before the ends
        seen |= set(signals.instruction)
        first, last = real.frames(i, [0, 9])
        assert first.shape == last.shape == (64, 64, 3)
        assert first.dtype == np.uint8
        assert 20 < first.mean() < 235
    assert seen == TEXTS


def test_actions_are_the_raw_ones_converted(real: RldsSource, raw: list[dict]) -> None:
    for i in range(25):
        action = raw[i][ACTION].reshape(10, 7).astype(np.float64)
        signals = real.signals(i)
        assert np.abs(action[0, :6]).max() < 1e-6
        assert not signals.actions[0].any()
        np.testing.assert_allclose(signals.actions[1:, :3], action[1:, :3], rtol=1e-6)
        turned = to_matrix(from_axis_angle(signals.actions[1:, 3:6].astype(np.float64)))
        np.testing.assert_allclose(turned, to_matrix(from_rpy(action[1:, 3:6])), atol=1e-7)
        assert np.isin(signals.actions[:, 6], (0, 1)).all()
        sure = (np.abs(action[:, 6] - 0.5) > 0.46) & signals.action_valid
        np.testing.assert_array_equal(signals.actions[sure, 6], action[sure, 6].round())


def test_proprioception_is_the_pose_of_the_tool_link(real: RldsSource, raw: list[dict]) -> None:
    for i in range(25):
        state = raw[i][STATE].reshape(10, 7).astype(np.float64)
        proprio = real.signals(i).proprio.astype(np.float64)
        np.testing.assert_allclose(proprio[:, :3], state[:, :3], rtol=1e-6)
        np.testing.assert_allclose(proprio[:, 7], state[:, 6].clip(0, 1), rtol=1e-6)
        assert (proprio[:, 3] >= 0).all()
        link = to_matrix(from_rpy(state[:, 3:6])) @ to_matrix(TOP_DOWN)
        np.testing.assert_allclose(to_matrix(proprio[:, 3:7]), link, atol=1e-6)
        # the fingers, x of the link, point down
        assert (link[:, 2, 0] < -0.5).all()


def test_the_commanded_rotation_is_close_to_what_was_reached(real: RldsSource) -> None:
    """Base frame, right sign: over all steps the command correlates with the next step's motion."""
    wanted, reached = [], []
    for i in range(25):
        s = real.signals(i)
        q = s.proprio[:, 3:7].astype(np.float64)
        inverse = q[:-1] * np.array([1, -1, -1, -1])
        moved = np.column_stack(
            [np.diff(s.proprio[:, :3], axis=0), to_axis_angle(compose(q[1:], inverse))]
        )
        wanted.append(s.actions[1:-1, :6])
        reached.append(moved[1:])
    a, b = np.concatenate(wanted), np.concatenate(reached)
    for dimension in range(6):
        assert np.corrcoef(a[:, dimension], b[:, dimension])[0, 1] > 0.5, dimension


def test_actions_by_what_was_reached(real: RldsSource, raw: list[dict]) -> None:
    """Each action leads from its own state to the next."""
    reached = open_source(f"{BRIDGE_SAMPLE}::bridge_reached")
    for i in range(25):
        s, commanded = reached.signals(i), real.signals(i)
        assert s.action_valid.tolist() == [False] + [True] * 8 + [False]
        assert not s.actions[[0, 9]].any()
        np.testing.assert_array_equal(s.actions[1:9, 6], commanded.actions[1:9, 6])
        np.testing.assert_array_equal(s.proprio, commanded.proprio)
        p, a = s.proprio.astype(np.float64), s.actions.astype(np.float64)
        np.testing.assert_allclose(p[1:9, :3] + a[1:9, :3], p[2:, :3], atol=1e-6)
        turned = compose(from_axis_angle(a[1:9, 3:6]), p[1:9, 3:7])
        np.testing.assert_allclose(to_matrix(turned), to_matrix(p[2:, 3:7]), atol=1e-5)
        octo = np.diff(raw[i][STATE].reshape(10, 7)[:, :3], axis=0)[1:]
        np.testing.assert_allclose(a[1:9, :3], octo, atol=1e-6)


def test_frames_and_cameras(real: RldsSource, raw: list[dict]) -> None:
    expected = decode_image(raw[3]["steps/observation/image_0"][7])
    (frame,) = real.frames(3, [7])
    np.testing.assert_array_equal(frame, expected)
    np.testing.assert_array_equal(real.frames(3, [7], "image_0")[0], expected)
    with pytest.raises(UserError, match="3rd_view_camera, image_0"):
        real.frames(3, [7], "wrist")


def test_windows_of_real_episodes(real: RldsSource) -> None:
    spec = WindowSpec(frames=(0, 4, 8), chunk=4, height=32, width=32, only_with_actions=True)
    batch = Mixture([real], [1.0], spec, seed=0).batch(0, 16)
    assert batch.action_valid[:, 0].all()
    assert set(batch.instruction) <= TEXTS
    assert set(batch.embodiment) == {"widowx"}


@pytest.mark.parametrize(
    ("raw_values", "expected"),
    [
        ([1, 1, 0.6, 0.2, 0, 0], [1, 1, 0, 0, 0, 0]),
        ([0, 0.3, 1, 0.5], [0, 1, 1, 1]),
        ([0.5, 0.4, 0.96], [1, 1, 1]),
        ([0.4, 0.6], [0, 1]),
        ([0.0], [0]),
    ],
)
def test_binarise(raw_values: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(binarise(np.array(raw_values, float)), expected)


def test_masked_checksums_of_known_data() -> None:
    assert masked_crc32c(b"") == 0xA282EAD8
    crc = 0xE3069283  # of 123456789, in every description of CRC-32C
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    assert masked_crc32c(memoryview(b"123456789")) == masked


features = st.dictionaries(
    st.text(max_size=12),
    st.lists(st.binary(max_size=50), max_size=4)
    | arrays(np.float32, st.integers(1, 9), elements=st.floats(width=32))
    | arrays(np.int64, st.integers(1, 9)),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(features)
def test_examples_round_trip(original: dict) -> None:
    parsed = parse_example(encode_example(original))
    assert parsed.keys() == original.keys()
    for key, values in original.items():
        if isinstance(values, list):
            assert parsed[key] == values
        else:
            np.testing.assert_array_equal(np.asarray(parsed[key]), values)
    for key in original:
        assert parse_example(encode_example(original), (key,)).keys() == {key}


def test_unpacked_lists_parse_too() -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    floats = field(2, b"".join(b"\x0d" + struct.pack("<f", v) for v in (1.5, -2)))
    integers = field(3, b"\x08\x05\x08" + b"\xff" * 9 + b"\x01")
    entries = [field(1, b"f") + field(2, floats), field(1, b"i") + field(2, integers)]
    parsed = parse_example(field(1, b"".join(field(1, e) for e in entries)))
    assert list(parsed["f"]) == [1.5, -2.0]
    assert list(parsed["i"]) == [5, -1]


@settings(max_examples=60, deadline=None)
@given(original=features, cut=st.floats(0, 1), noise=st.binary(max_size=8))
def test_a_damaged_example_is_a_value_error(original: dict, cut: float, noise: bytes) -> None:
    data = encode_example(original)
    at = round(cut * len(data))
    if 0 < at < len(data):
        with pytest.raises(ValueError, match="cut off"):
            parse_example(data[:at])
    for damaged in (data[:at] + noise + data[at + len(noise) :], noise):
        with contextlib.suppress(ValueError):
            parse_example(damaged)


def test_records_round_trip(tmp_path: Path) -> None:
    records = [b"", b"x", bytes(range(256)) * 20]
    write_records(tmp_path / "f", records)
    assert read_records(tmp_path / "f") == records


def test_truncated_anywhere_names_file_and_record(tmp_path: Path) -> None:
    path, records = tmp_path / "cut.tfrecord", [b"abc", b"defgh", b"ij"]
    write_records(path, records)
    data = path.read_bytes()
    ends = np.cumsum([len(r) + 16 for r in records])
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = int(np.sum(ends <= size))
        ranges, problems = scan(memoryview(data[:size]))
        assert len(ranges) == whole
        if size in (0, *ends):
            assert not problems
            continue
        assert list(problems) == [whole]
        with pytest.raises(CorruptRecord, match=f"{path}: record {whole}: "):
            read_records(path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "flipped.tfrecord"
    write_records(path, [b"abc", b"defgh"])
    data = path.read_bytes()
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(CorruptRecord, match=f"record {int(at >= 19)}"):
            read_records(path)
        # what stands behind a damaged record is found as long as its length is not damaged
        in_data = 12 <= at < 19 or at >= 19 + 12
        assert len(scan(memoryview(flipped), check_crc=True)[0]) == (2 if in_data else at // 19)


def write_dataset(folder: Path, examples: list[bytes], name: str = "bridge_dataset") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.json").write_text("{}")
    write_records(folder / f"{name}-train.tfrecord-00000-of-00002", examples)
    return folder


def example(steps: int = 3, **changes: object) -> bytes:
    image = simplejpeg.encode_jpeg(np.full((8, 8, 3), 99, np.uint8))
    return encode_example(
        {
            ACTION: np.linspace(0.1, 1, 7 * steps, dtype=np.float32),
            STATE: np.linspace(0, 1, 7 * steps, dtype=np.float32),
            LAST: np.arange(steps) == steps - 1,
            "steps/language_instruction": [b"lift"] * steps,
            "steps/observation/image_0": [image] * steps,
        }
        | changes  # type: ignore[arg-type]
    )


def test_a_synthetic_dataset_with_one_of_two_shards(tmp_path: Path) -> None:
    source = open_source(str(write_dataset(tmp_path / "1.0.0", [example(3), example(1)]).parent))
    assert [source.length(i) for i in range(len(source))] == [3, 1]
    signals = source.signals(0)
    assert signals.action_valid.all()  # its first action is not zero
    assert signals.terminate.tolist() == [False, False, True]
    assert source.frames(0, [2])[0][0, 0].tolist() == [99, 99, 99]


def test_broken_records_name_what_is_wrong_or_are_counted(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [example(), b"\xff\xff", example()])
    with pytest.raises(CorruptRecord, match=r"00000-of-00002: record 1: "):
        open_source(str(folder))
    source = RldsSource(folder, BRIDGE, skip_corrupt=True)
    assert (len(source), source.skipped) == (2, 1)
    write_dataset(folder, [example(**{ACTION: np.zeros(20, np.float32)})])
    with pytest.raises(CorruptRecord, match=r"record 0: steps/action has 20 values, expected 21"):
        open_source(str(folder)).signals(0)
    write_dataset(folder, [example(**{STATE: []})])
    with pytest.raises(CorruptRecord, match=r"no feature steps/observation/state; it has"):
        open_source(str(folder)).signals(0)
    write_dataset(folder, [example(**{"steps/observation/image_0": [b"no picture"] * 3})])
    with pytest.raises(CorruptRecord, match=r"a frame of steps/observation/image_0"):
        open_source(str(folder)).frames(0, [1])


def test_png_frames_go_through_pillow(tmp_path: Path) -> None:
    buffer, picture = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (5, 6, 3), np.uint8)
    Image.fromarray(picture).save(buffer, "PNG")
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), picture)


def test_datasets_that_cannot_be_opened(tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", [example()], "other_set")
    schema = json.dumps(described({"steps/action": Leaf("float32", (4,))}))
    (tmp_path / "other/features.json").write_text(schema)
    with pytest.raises(UserError, match=r"'other_set' needs a spec.*steps/action \(float32 4\)"):
        open_source(str(tmp_path / "other"))
    write_dataset(tmp_path / "bridge", [example()])
    with pytest.raises(UserError, match=r"several datasets; give one of"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match=r"no shard of split 'val'; found train"):
        RldsSource(tmp_path / "bridge", BRIDGE, split="val")
    assert masked_crc32c(b"") == 0xA282EAD8
