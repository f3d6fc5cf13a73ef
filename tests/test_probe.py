"""The probe's regression against explicit ones, and that nothing leaks the answer to the model."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from selfflow.datasets.normalize import fit, to_json
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreHeader, StoreWriter
from selfflow.datasets.text import text_encoder
from selfflow.eval import probe as probes
from selfflow.eval.bootstrap import resamples
from selfflow.eval.probe import ProbeConfig, cross_fitted, probe, r2, random_world, ridge
from selfflow.eval.world import World
from selfflow.worldmodel.batches import Reader
from selfflow.worldmodel.codec import make_codec
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.transformer import ModelConfig, VideoActionTransformer

LAYOUT = Layout(32, 40, patch=8, stride=2, chunk=3)
CONFIG = ProbeConfig(frames=4, folds=2, resamples=50, batch=8)


def write_store(folder: Path, change: Callable[[EpisodeRecord], EpisodeRecord]) -> EpisodeStore:
    """Six episodes of ten steps; a bright square lies at the apple's place."""
    rng = np.random.default_rng(0)
    header = StoreHeader("google_robot", "open_drawer_place", ("overhead_camera",), "fake")
    with StoreWriter(folder, "000", header) as writer:
        for seed in range(6):
            n = 10
            spot = np.clip(rng.normal([10, 16], 5, (n, 2)), 0, [24, 32]).astype(int)
            images = np.full((n, 32, 40, 3), 60, np.uint8)
            for image, (y, x) in zip(images, spot, strict=True):
                image[y : y + 8, x : x + 8] = 220
            proprio = np.tile(np.float32([0.5, 0, 0.8, 1, 0, 0, 0, 1]), (n, 1))
            apple = np.concatenate([spot / 40, np.zeros((n, 1))], 1).astype(np.float32)
            base = np.tile(np.float32([0.2, 0.1, 0, 1, 0, 0, 0]), (n, 1))
            privileged = {
                "drawers": rng.uniform(0, 0.3, (n, 3)).astype(np.float32),
                "apple": np.concatenate([apple, base[:, 3:]], 1),
                "base": base,
            }
            record = EpisodeRecord(
                images={"overhead_camera": list(images)},
                proprio=proprio,
                actions=rng.uniform(0, 0.1, (n, 7)).astype(np.float32),
                executed=np.zeros((n, 7), np.float32),
                terminate=np.zeros(n, bool),
                instruction=["open top drawer"] * n,
                seed=seed,
                success=True,
                privileged=privileged,
            )
            writer.append(change(record))
    return EpisodeStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return write_store(tmp_path_factory.mktemp("data") / "plain", lambda record: record)


def make_world(store: EpisodeStore, attention: str = "prefix") -> World:
    torch.manual_seed(0)
    model = VideoActionTransformer(ModelConfig(24, 3, 2, 2.0, attention, LAYOUT.modalities()))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    codec = make_codec(LAYOUT.codec, LAYOUT.height, LAYOUT.width, LAYOUT.patch)
    robots = Robots(("google_robot",), (3.0,))
    reader = Reader(LAYOUT, robots, fit([store]), codec, text_encoder("hash384"))
    assert to_json(reader.statistics)
    return World("small", Path("small"), model.eval(), reader, ())


def data(rows: int = 40, features: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, features)) * rng.uniform(0.1, 5, features) + 3
    y = x[:, :2] @ np.array([[1.0, 0], [0.5, 2]]) + rng.normal(size=(rows, 2)) + 7
    return x, y, np.arange(rows) // 5


def explicit(x: np.ndarray, y: np.ndarray, new: np.ndarray, strength: float) -> np.ndarray:
    """Ridge with a free constant, by its normal equations."""
    centre = x.mean(0)
    a = x - centre
    w = np.linalg.solve(a.T @ a + strength * np.eye(x.shape[1]), a.T @ (y - y.mean(0)))
    return y.mean(0) + (new - centre) @ w


def test_ridge_is_the_textbook_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, episode = data()
    x, y, episode, new = x[:30], y[:30], episode[:30], x[30:]
    monkeypatch.setattr(probes, "STRENGTHS", np.array([0.1]))
    unit = np.linalg.eigvalsh((x - x.mean(0)) @ (x - x.mean(0)).T).mean()
    assert np.allclose(ridge(x, y, episode, new), explicit(x, y, new, 0.1 * unit))


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_leaving_an_episode_out_needs_no_refit(strength: float) -> None:
    x, y, episode = data()
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(x @ x.T)
    values = values.clip(0)
    centred = y - y.mean(0)
    turned = vectors.T @ centred
    found = probes._left_out(values, vectors, centred, turned, episode, strength)
    error = np.zeros(2)
    for one in np.unique(episode):
        out = episode == one
        error += np.square(explicit(x[~out], y[~out], x[out], strength) - y[out]).sum(0)
    assert np.allclose(found, error)


def test_no_episode_is_predicted_by_itself() -> None:
    """Targets that are drawn anew for every episode cannot be known from others."""
    rng = np.random.default_rng(2)
    episode = np.repeat(np.arange(24), 6)
    place = rng.normal(size=(24, 30))
    x = place[episode] + 0.1 * rng.normal(size=(144, 30))
    y = rng.normal(size=(24, 1))[episode]
    guess = cross_fitted(x, y, episode, np.arange(24) % 4)
    assert r2(y, guess, episode, resamples(24, 50, 0)).value < 0.3
    known = cross_fitted(x, x[:, :1], episode, np.arange(24) % 4)
    assert r2(x[:, :1], known, episode, resamples(24, 50, 0)).value > 0.95


def test_r2_is_the_share_of_the_spread() -> None:
    truth = np.array([[0.0], [1], [2], [3]])
    guess = truth + 0.5
    found = r2(truth, guess, np.array([0, 0, 1, 1]), resamples(2, 20, 0))
    assert found.value == pytest.approx(1 - 4 * 0.25 / 5)
    flat = r2(np.ones((4, 1)), guess, np.array([0, 0, 1, 1]), resamples(2, 20, 0))
    assert np.isnan(flat.value), "a constant target has no share to explain"


def test_a_row_for_every_block_kind_target_and_pooling(store: EpisodeStore) -> None:
    world = make_world(store)
    rows = probe(world, [(store, range(6))], CONFIG)
    assert len(rows) == 4 * 3 * 3 * 2
    assert {(r.tokens, r.tau) for r in rows} == {("context", 0.0), ("video", 0.1), ("video", 0.5)}
    assert {r.layer for r in rows} == {0, 1, 2, 3}
    apple = {
        r.pooling: r.r2 for r in rows if (r.layer, r.tokens, r.target) == (0, "context", "apple")
    }
    assert apple["grid"] > 0.5 > apple["mean"] + 0.1, "a place needs to know where"


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_features_are_those_of_the_model(store: EpisodeStore, attention: str) -> None:
    world = make_world(store, attention)
    samples = probes.choose(store, range(2), world, 3, 0)
    inputs = probes._inputs(world, samples, samples.places)
    with torch.no_grad():
        layers = probes._video(world, inputs, 0.5, torch.Generator().manual_seed(3))
    length, size = LAYOUT.modalities()[4].length, len(samples.places)
    config = world.model.config
    group = torch.cat(
        [torch.full((size, m.length), int(m.role == "target")) for m in config.modalities], 1
    )
    tokens = inputs.tokens | {"video": layers[0]}
    times = torch.tensor([[0.0, 0.5]] * size)
    for block in (1, 2, 3):
        with torch.no_grad():
            all_tokens = world.model.features(tokens, times, group, inputs.valid, block)
        start = config.prefix_length
        assert torch.allclose(layers[block], all_tokens[:, start : start + length], atol=1e-5)


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_nothing_tells_the_model_the_answer(
    store: EpisodeStore, tmp_path: Path, attention: str
) -> None:
    """Other proprioception, actions and later instructions leave every feature as it was."""

    def changed(record: EpisodeRecord) -> EpisodeRecord:
        n = len(record.proprio)
        return replace(
            record,
            proprio=record.proprio + np.float32([0.1, 0.1, 0.1, 0, 0, 0, 0, -0.7]),
            actions=record.actions[::-1].copy(),
            instruction=record.instruction[: n // 2] + ["place the apple"] * (n - n // 2),
        )

    other = write_store(tmp_path / "changed", changed)
    world = make_world(store, attention)
    found = []
    for source in (store, other):
        samples = probes.choose(source, range(2), world, 4, 0)
        for tokens, tau in (("context", 0.0), ("video", 0.1)):
            found.append([p["grid"] for p in probes._pooled(world, samples, tokens, tau, CONFIG)])
    for one, same in zip(found[:2], found[2:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))


def test_truth_is_that_of_the_frame(store: EpisodeStore) -> None:
    samples = probes.choose(store, range(6), make_world(store), 4, 10)
    record = store.record(2)
    rows = np.flatnonzero(samples.episode == 12)
    steps = [samples.places[row][1] for row in rows]
    assert steps == [0, 2, 5, 7]
    assert np.allclose(samples.now[rows, 0], record.privileged["drawers"][steps, 0])
    ahead = [step + 2 for step in steps]
    assert np.allclose(samples.then[rows, 0], record.privileged["drawers"][ahead, 0])
    seen = record.privileged["apple"][steps, :3] - record.privileged["base"][steps, :3]
    assert np.allclose(samples.now[rows, 1:4], seen, atol=1e-6)


def test_random_weights_leave_no_block_idle(store: EpisodeStore) -> None:
    world = make_world(store)
    fresh = VideoActionTransformer(world.model.config)
    world = random_world(replace(world, model=fresh))
    samples = probes.choose(store, range(1), world, 3, 0)
    layers = [p["mean"] for p in probes._pooled(world, samples, "context", 0.0, CONFIG)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(layers[1:]))
    assert world.name == "random weights (prefix)"


def test_data_without_the_truth_is_refused(store: EpisodeStore, tmp_path: Path) -> None:
    bare = write_store(tmp_path / "bare", lambda record: replace(record, privileged={}))
    with pytest.raises(UserError, match="does not hold the simulator's drawers"):
        probe(make_world(store), [(bare, range(6))], CONFIG)
    with pytest.raises(UserError, match="1 episodes in 2 folds"):
        probe(make_world(store), [(store, range(1))], CONFIG)
