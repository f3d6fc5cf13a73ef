"""Which window comes when: each once an epoch, shares kept, the same for any number of ranks."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.datasets.augment import (
    Augment,
)
from selfflow.datasets.episodes import EpisodeSource, Signals, no_signals
from selfflow.datasets.order import Turns, key_of, permuted
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.windows import Mixture, WindowSpec
from selfflow.worldmodel.batches import codec_of
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.train import read_with, request
from selfflow.worldmodel.train_config import TrainConfig

SPEC = WindowSpec(frames=(0, 4), chunk=5, height=16, width=16)


class Plain:
    """Episodes of these lengths; `bad` steps have no action."""

    skipped, cameras, embodiment = 0, ("camera",), EMBODIMENTS["widowx"]

    def __init__(self, name: str, lengths: list[int], bad: tuple[int, ...] = ()) -> None:
        self.name, self.lengths, self.bad = name, lengths, bad

    def __len__(self) -> int:
        return len(self.lengths)

    def metadata(self, i: int) -> dict:
        return {}

    def length(self, i: int) -> int:
        return self.lengths[i]

    def frames(self, i: int, steps: list[int], camera: str | None = None) -> list[np.ndarray]:
        return [np.full((16, 16, 3), t, np.uint8) for t in steps]

    def signals(self, i: int) -> Signals:
        t = self.lengths[i]
        return replace(no_signals(["do"] * t), action_valid=~np.isin(np.arange(t), self.bad))


def windows(source: Plain, every: int = 1, only: bool = False) -> set[tuple[str, int, int]]:
    """All there are."""
    return {
        (source.name, e, t)
        for e, length in enumerate(source.lengths)
        for t in range(0, length, every)
        if not (only and t in source.bad)
    }


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_a_permutation_hits_everything_once(size: int, seed: int) -> None:
    keys = np.full(size, key_of(seed), np.uint64)
    assert sorted(permuted(np.arange(size), size, keys).tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    """All 24 of four, over 2400 keys, as often as chance would have it (five deviations)."""
    found = Counter(
        tuple(permuted(np.arange(4), 4, np.full(4, key_of(0, e), np.uint64))) for e in range(2400)
    )
    assert len(found) == 24
    assert sum((n - 100) ** 2 / 100 for n in found.values()) < 23 + 5 * np.sqrt(46)


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_every_source_has_its_share_at_any_time(weights: list[float]) -> None:
    turns, had = Turns(weights), np.zeros(len(weights))
    bound = 1.0 if len(weights) < 4 else 1.5
    for i in range(200):
        source, before = turns.at(i)
        assert before == had[source]
        had[source] += 1
        assert np.abs(had - (i + 1) * np.array(weights) / sum(weights)).max() < bound
    assert [turns.counts(200)[s] for s in range(len(weights))] == had.tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_window_once_an_epoch_across_ranks(world: int) -> None:
    """100 windows of one source and 11 of the other, at 3 to 1: three epochs, 148 steps of 4."""
    long, short = Plain("long", [30, 1, 69]), Plain("short", [4, 7])
    mixture = Mixture([long, short], [3.0, 1.0], SPEC, seed=5)
    drawn: dict[str, list] = {"long": [], "short": []}
    for step in range(100):
        ranks = [mixture.batch(step, 4 // world, rank, world).ids for rank in range(world)]
        for place in (place for ids in ranks for place in ids):
            drawn[place[0]].append(place)
    assert (len(drawn["long"]), len(drawn["short"])) == (300, 100)
    for source in (long, short):
        every, got = windows(source), drawn[source.name]
        epochs = [got[i : i + len(every)] for i in range(0, len(got), len(every))]
        whole = [epoch for epoch in epochs if len(epoch) == len(every)]
        assert len(whole) == {"long": 3, "short": 9}[source.name]
        assert all(set(epoch) == every for epoch in whole)
        assert whole[0] != whole[1]
    assert mixture.epochs(400) == {"long": 3.0, "short": 100 / 11}


def test_the_same_data_for_any_number_of_processes() -> None:
    sources = [Plain("a", [40, 9]), Plain("b", [17]), Plain("c", [8])]
    spec = replace(SPEC, shift=2, augment=Augment(crop=0.8, brightness=0.3))
    whole = Mixture(sources, [1.0, 2.0, 0.5], spec, 3).batch(7, 8)
    for world in (2, 4):
        size = 8 // world
        other = Mixture(sources, [1.0, 2.0, 0.5], spec, 3)  # which has drawn nothing before
        parts = [other.batch(7, size, rank, world) for rank in range(world)]
        for f in ("frames", "actions", "action_valid"):
            joined = np.concatenate([getattr(part, f) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, f))
        assert [place for part in parts for place in part.ids] == whole.ids
    assert Mixture(sources, [1.0, 2.0, 0.5], spec, 4).batch(7, 8).ids != whole.ids


def test_only_windows_that_are_asked_for() -> None:
    source = Plain("a", [7, 5], bad=(0, 4))
    spec = replace(SPEC, every=2, only_with_actions=True)
    mixture = Mixture([source], [1.0], spec, 0)
    wanted = windows(source, 2, only=True)
    assert (
        {ids for ids in mixture.batch(0, len(wanted)).ids}
        == wanted
        == {
            *(("a", 0, t) for t in (2, 6)),
            ("a", 1, 2),
        }
    )
    plain = Mixture([source], [1.0], replace(SPEC, every=3), 0)
    assert set(plain.batch(0, 5).ids) == windows(source, 3)


def test_sources_of_the_same_name_are_told_apart() -> None:
    mixture = Mixture([Plain("a", [5]), Plain("a", [10])], [1.0, 1.0], SPEC, 0)
    assert mixture.epochs(20) == {"a": 2.0, "a#1": 1.0}


def test_signals_are_kept_within_bounds() -> None:
    """By bytes, whatever the episodes' lengths."""
    sources = [Plain("a", [100] * 300)]
    mixture = Mixture(sources, [1.0], SPEC, 0)
    mixture._kept.limit = 500_000
    for step in range(20):
        mixture.batch(step, 20)
    assert 0 < mixture._kept.size <= 500_000
    assert len(mixture._kept._kept) < 60
    assert mixture._kept.size == sum(e.size for e in mixture._kept._kept.values())


def test_the_end_of_an_episode_does_not_show_in_the_validity_of_actions() -> None:
    """Only the mask of the loss says where it is; beyond it, tokens say terminate."""
    import torch

    source, layout = Plain("a", [12]), Layout(16, 16, 16, future=1, chunk=5, stride=4)
    mixture = Mixture([source], [1.0], SPEC, 0)
    batch = mixture.batch(0, 12)
    parts = batch.actions, batch.action_valid, batch.terminate, batch.terminate_valid
    tokens, valid, mask = layout.action_tokens(*(torch.from_numpy(part) for part in parts))
    assert valid.all()
    for row, (_, _, t) in enumerate(batch.ids):
        beyond = torch.arange(t, t + 5) >= 12
        assert (mask[row, beyond] == 0).all()
        assert (mask[row, ~beyond] == 1).all()
        assert (tokens[row, beyond, 7] == 1).all()
        assert (tokens[row, beyond, :6] == 0).all()
        assert (tokens[row, ~beyond, 7] == -1).all()


def test_nor_in_that_of_any_token(store: Path) -> None:
    """All windows of an episode of 12 steps: the same tokens are null, whatever the distance from
    the end; what lies beyond it has neither loss nor a part in the alignment of features."""
    config = TrainConfig(data=[str(store)], layout=Layout(16, 16, 16, chunk=5, stride=4))
    sources, weights = open_sources(config.sources)
    batch = Mixture(sources, weights, request(config), 0).batch(0, 24)
    inputs = read_with(config, sources, {}, codec_of(config.layout), None).tokens(batch)
    for name, valid in inputs.valid.items():
        assert (valid == valid[:1]).all(), name
    real = inputs.all_valid(config.transformer)
    for row, (_, _, t) in enumerate(batch.ids):
        assert inputs.mask["video"][row].any() == (t + 4 < 12)
        assert real[row].sum() == real.shape[1] - (t + 4 >= 12) - max(0, t + 5 - 12)


def test_augmentation_is_drawn_by_the_samples_number() -> None:
    spec = replace(SPEC, augment=Augment(brightness=0.9))
    mixture = Mixture([Plain("a", [3])], [1.0], spec, 0)
    epoch = [mixture.batch(step, 1).frames for step in range(6)]
    again = Mixture([Plain("a", [3])], [1.0], spec, 0).batch(4, 1).frames
    np.testing.assert_array_equal(epoch[4], again)
    assert len({frames.tobytes() for frames in epoch}) > 3  # each window comes twice


def test_a_camera_and_a_crop_of_a_source(store: Path) -> None:
    (whole,), _ = open_sources([str(store)])
    (part,), _ = open_sources([f"{store}?camera:overhead_camera?crop:25-0-75-50@2"])
    assert isinstance(part, EpisodeSource)
    assert part.name != whole.name
    np.testing.assert_array_equal(part.frames(1, [3])[0], whole.frames(1, [3])[0][:16, 8:24])
    assert part.cameras == whole.cameras
    np.testing.assert_array_equal(part.measured(0, "drawers"), whole.measured(0, "drawers"))
    for wrong, told in (("camera:wrist", "overhead_camera"), ("crop:50-0-50-9", "percent")):
        with pytest.raises(UserError, match=told):
            open_sources([f"{store}?{wrong}"])


def test_plain_is_a_source() -> None:
    assert isinstance(Plain("a", [1]), EpisodeSource)
