"""The latent store: what is read is what encode() gives for the frames that Mixture would draw."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from selfflow.configs.entry import compose
from selfflow.datasets.episodes import EpisodeSource, Signals
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.store import EpisodeRecord, StoreHeader, StoreWriter
from selfflow.datasets.windows import Batch, Mixture, WindowSpec
from selfflow.worldmodel import encode
from selfflow.worldmodel.codec import CodecConfig, make_codec
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.latent_writer import LatentWriter
from selfflow.worldmodel.latents import Header, LatentStore
from selfflow.worldmodel.layout import Layout, split_frames
from selfflow.worldmodel.video_codec import Codec, PatchCodec

SAMPLES = Path(__file__).parents[2] / "shared/samples"
PATCHES = Header(CodecConfig(chunk=4), 16, 24, 8)
CODEC = PatchCodec(16, 24, 8)
WAN = Header(CodecConfig("wan"), 32, 32, 1, frames=9, stride=2, every=3)


class Noise:
    """Episodes of random frames; `allowed` frames are given, then Ctrl-C."""

    skipped = 0
    cameras = ("overhead_camera",)

    def __init__(self, name: str, lengths: list[int], allowed: int = 10**6) -> None:
        self.name, self.embodiment = name, EMBODIMENTS["google_robot"]
        self.lengths, self.allowed = lengths, allowed

    def __len__(self) -> int:
        return len(self.lengths)

    def metadata(self, i: int) -> dict:
        return {}

    def length(self, i: int) -> int:
        return self.lengths[i]

    def frames(self, i: int, steps: list[int], camera: str | None = None) -> list[np.ndarray]:
        self.allowed -= len(steps)
        if self.allowed < 0:
            raise KeyboardInterrupt
        rngs = [np.random.default_rng([len(self.name), i, step]) for step in steps]
        return [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for rng in rngs]

    def signals(self, i: int) -> Signals:
        t = self.lengths[i]
        none = np.zeros(t, bool)
        zeros = np.zeros((t, 8), np.float32)
        return Signals(zeros, none, zeros[:, :7], none.copy(), none.copy(), ["a"] * t)


def fill(
    folder: Path, header: Header, codec: Codec, *sources: EpisodeSource
) -> list[tuple[str, int]]:
    """Encodes what is pending and returns that."""
    steps = [(s.name, [s.length(i) for i in range(len(s))]) for s in sources]
    with LatentWriter(folder, header, steps) as writer:
        pending = writer.pending()
        encode.encode(writer, codec, {s.name: s for s in sources})
        return pending


def drawn(layout: Layout, *sources: EpisodeSource) -> Batch:
    spec = WindowSpec(layout.frame_offsets, layout.chunk, layout.height, layout.width)
    return Mixture(sources, [1.0] * len(sources), spec, 0).batch(0, 32)


def agree(store: LatentStore, batch: Batch, layout: Layout, codec: Codec, every: int = 1) -> None:
    """The store's tokens are those of the batch's frames, and as valid."""
    store.check(layout)
    rows = [i for i, (_, _, t) in enumerate(batch.ids) if t % every == 0]
    context, video, valid = store.tokens([batch.ids[i] for i in rows], layout)
    shown, coming = split_frames(torch.from_numpy(batch.frames[rows]), layout)
    want = codec.encode(shown).unflatten(0, (len(rows), -1)).flatten(1, 2)
    torch.testing.assert_close(context, want, atol=2e-3, rtol=1e-3)
    assert video is not None
    torch.testing.assert_close(video, codec.encode(coming), atol=2e-3, rtol=1e-3)
    np.testing.assert_array_equal(valid.numpy(), batch.frame_valid[rows])
    assert not valid.all()


def test_frames_as_mixture_draws_them(tmp_path: Path) -> None:
    sources = Noise("some", [5, 1, 9]), Noise("more", [3])
    assert len(fill(tmp_path, PATCHES, CODEC, *sources)) == 4
    store = LatentStore(tmp_path)
    layout = Layout(16, 24, 8, context=2, future=2, stride=3)
    agree(store, drawn(layout, *sources), layout, CODEC)
    store.check_source("some", [5, 1, 9])
    tokens, valid = store.rows([("more", 0, 2)], (-9, 0, 1))
    assert (tokens.dtype, tokens.shape) == (torch.float32, (1, 3 * 6, 192))
    assert valid.tolist() == [[False, True, False]]
    assert torch.equal(tokens[0, 6:12], tokens[0, 12:])


def test_real_frames_and_weights(tmp_path: Path) -> None:
    bridge, weights = SAMPLES / "octo_bridge_debug/bridge_dataset", SAMPLES / "taef2_weights"
    if not bridge.is_dir() or not weights.is_dir():
        pytest.skip("no Bridge sample or TAEF2 weights in ../shared/samples")
    source = open_source(str(bridge))
    short = min(range(len(source)), key=source.length)

    class One:
        name, embodiment, skipped = source.name, source.embodiment, 0
        cameras = source.cameras

        def metadata(self, i: int) -> dict:
            return {}

        def __len__(self) -> int:
            return 1

        def length(self, i: int) -> int:
            return source.length(short)

        def frames(self, i: int, steps: list[int], camera: str | None = None) -> list[np.ndarray]:
            return source.frames(short, steps, camera)

        def signals(self, i: int) -> Signals:
            return source.signals(short)

    header = Header(CodecConfig("taef2", str(weights)), 32, 48, 2)
    codec = make_codec(header.codec, 32, 48, 2)
    fill(tmp_path, header, codec, One())
    layout = Layout(32, 48, 2, context=1, future=1, stride=4, codec=header.codec)
    agree(LatentStore(tmp_path), drawn(layout, One()), layout, codec)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * 48,
        latents_std=[0.5] * 48,
    ).save_pretrained(folder)
    return make_codec(replace(WAN.codec, path=str(folder)), 32, 32, 1)


def test_clips(tmp_path: Path, wan: Codec) -> None:
    source = Noise("some", [7, 30])
    fill(tmp_path, WAN, wan, source)
    store = LatentStore(tmp_path)
    assert store.shards["some"].starts == [0, 3, 13]
    for future in (8, 4):  # all of a clip, and its beginning
        layout = Layout(32, 32, 1, context=1, future=future, stride=2, codec=WAN.codec)
        agree(store, drawn(layout, source), layout, wan, every=3)
    with pytest.raises(RunError, match=r"0, 3, 6, .*none at step 4 of episode 1 of some"):
        store.rows([("some", 1, 4)], (0,))
    with pytest.raises(RunError, match="9 frames, 2 steps apart"):
        store.rows([("some", 1, 3)], (0, 1, 2, 3, 4))
    layout = Layout(32, 32, 1, context=2, future=12, stride=4, codec=WAN.codec)
    with pytest.raises(RunError, match=r"stride is 2.*and 4.*frames is 9 .*13 .*every is 3"):
        store.check(layout)


def test_several_context_frames_of_a_causal_codec(tmp_path: Path, wan: Codec) -> None:
    source, header = Noise("some", [7]), replace(WAN, every=1, frames=5)
    fill(tmp_path, header, wan, source)
    layout = Layout(32, 32, 1, context=3, future=4, stride=2, codec=WAN.codec)
    agree(LatentStore(tmp_path), drawn(layout, source), layout, wan)


@pytest.mark.parametrize("torn", [b"", b"[2, 1234"])
def test_going_on_after_an_interruption(tmp_path: Path, torn: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, PATCHES, CODEC, Noise("some", [5, 3, 9, 2], allowed=12))
    with (tmp_path / "000.done.jsonl").open("ab") as file:
        file.write(torn)
    store = LatentStore(tmp_path)
    assert set(store.shards["some"].done) == {0, 1}  # of the third, a block was written
    store.rows([("some", 1, 0)], (0,))
    with pytest.raises(RunError, match="episode 2 of some is not encoded"):
        store.rows([("some", 2, 0)], (0,))
    with pytest.raises(RunError, match="episode 2 of some is not encoded"):
        store.check_source("some", [5, 3, 9, 2])
    assert fill(tmp_path, PATCHES, CODEC, Noise("some", [5, 3, 9, 2])) == [("some", 2), ("some", 3)]
    source = Noise("some", [5, 3, 9, 2])
    layout = Layout(16, 24, 8)
    agree(LatentStore(tmp_path), drawn(layout, source), layout, CODEC)
    assert fill(tmp_path, PATCHES, CODEC, source) == []


def test_a_damaged_end_is_encoded_again(tmp_path: Path) -> None:
    fill(tmp_path, PATCHES, CODEC, Noise("some", [5, 3]))
    rows = tmp_path / "000.rows"
    data = rows.read_bytes()
    rows.write_bytes(data[:-1])
    assert not LatentStore(tmp_path).shards["some"].whole(1)
    assert fill(tmp_path, PATCHES, CODEC, Noise("some", [5, 3])) == [("some", 1)]
    assert rows.read_bytes() == data


def test_more_data_and_other_data(tmp_path: Path) -> None:
    fill(tmp_path, PATCHES, CODEC, Noise("some", [5, 3]))
    more = Noise("some", [5, 3, 4]), Noise("other", [2])
    assert fill(tmp_path, PATCHES, CODEC, *more) == [("some", 2), ("other", 0)]
    layout = Layout(16, 24, 8)
    agree(LatentStore(tmp_path), drawn(layout, *more), layout, CODEC)
    with pytest.raises(RunError, match="some had other episodes"):
        fill(tmp_path, PATCHES, CODEC, Noise("some", [5, 4]))
    with pytest.raises(RunError, match="two sources have one name"):
        fill(tmp_path, PATCHES, CODEC, Noise("some", [5]), Noise("some", [5]))
    with pytest.raises(RunError, match="patch is 8 there and 4 here; choose another out"):
        fill(tmp_path, replace(PATCHES, patch=4), PatchCodec(16, 24, 4), Noise("some", [5]))
    with pytest.raises(RunError, match="weights is none there and 12 here"):
        fill(tmp_path, replace(PATCHES, weights="12"), CODEC, Noise("some", [5, 3]))


def test_what_training_must_agree_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a folder of worldmodel/encode"):
        LatentStore(tmp_path)
    fill(tmp_path, PATCHES, CODEC, Noise("some", [5]))
    store = LatentStore(tmp_path)
    store.check(Layout(16, 24, 8, codec=CodecConfig(path="elsewhere", chunk=2)))
    with pytest.raises(RunError, match="height is 16 there and 32 here, patch is 8 there and 4"):
        store.check(Layout(32, 24, 4))
    with pytest.raises(RunError, match="kind is patch there and taesd here"):
        store.check(Layout(16, 24, 1, codec=CodecConfig("taesd")))
    with pytest.raises(RunError, match="no source other; have some"):
        store.rows([("other", 0, 0)], (0,))
    with pytest.raises(RunError, match="no source other; have some"):
        store.check_source("other", [5])
    with pytest.raises(RunError, match="not the 1 of the data"):
        store.check_source("some", [6])


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        LatentWriter(tmp_path, PATCHES, [("some", [2])]) as writer,
        pytest.raises(RunError, match="another process"),
    ):
        LatentWriter(tmp_path, PATCHES, [("some", [2])])
    with pytest.raises(ValueError, match="1 rows for 2 steps"):
        writer.write("some", 0, iter([torch.zeros(1, 6, 192)]))
    assert writer.pending() == [("some", 0)]


def test_headers() -> None:
    assert WAN.row == (3 * 4, 48)
    assert (WAN.rows(1), WAN.rows(3), WAN.rows(4)) == (1, 1, 2)
    assert PATCHES.row_bytes == 2 * 6 * 192
    for wrong in ({"frames": 8}, {"every": 0}, {"height": 40}):
        with pytest.raises(ValueError, match=r"8 frames|every=0|height=40"):
            replace(WAN, **wrong)
    with pytest.raises(ValueError, match="single frames"):
        replace(PATCHES, frames=5)


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    folder = tmp_path / "demos"
    n, rng = 6, np.random.default_rng(0)
    zeros = np.zeros((n, 8), np.float32)
    record = EpisodeRecord(
        images={"head": [rng.integers(0, 256, (32, 40, 3), dtype=np.uint8) for _ in range(n)]},
        proprio=zeros,
        actions=zeros[:, :7],
        executed=zeros[:, :7],
        terminate=np.zeros(n, bool),
        instruction=["a"] * n,
        seed=0,
        success=True,
    )
    with StoreWriter(folder, header=StoreHeader("google_robot", "t", ("head",), "x")) as writer:
        writer.append(record)
    return folder


def test_the_command(tmp_path: Path, demos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latents"
    given = [f"data=[{demos}@0.5]", f"out={out}", "codec.kind=patch", "height=32", "width=40"]
    config = compose(encode.EncodeConfig, "encode", [*given, "patch=8", "device=cpu"])
    encode.check(config)
    encode.main(config)
    shown = capsys.readouterr().out
    assert "1 episodes, 6 frames as 20 x 192 numbers, 0.0 MB in float16" in shown
    assert shown.splitlines()[-1].startswith(f"latents: {out}")
    assert json.loads((out / "latents.json").read_text())["codec"]["kind"] == "patch"
    tokens, _ = LatentStore(out).rows([("demos", 0, 4)], (0,))
    frames = torch.from_numpy(np.stack(open_source(str(demos)).frames(0, [4])))
    torch.testing.assert_close(
        tokens, PatchCodec(32, 40, 8).encode(frames[None]), atol=1e-3, rtol=0
    )
    with pytest.raises(UserError, match="needs weights"):
        encode.check(compose(encode.EncodeConfig, "encode", given[:2]))
    with pytest.raises(UserError, match="multiple of 16"):
        compose(encode.EncodeConfig, "encode", [*given[:2], "height=100"])
    with pytest.raises(UserError, match="height is 32 there and 16 here"):
        encode.main(replace(config, height=16))
