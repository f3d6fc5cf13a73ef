"""Windows and mixtures: padding against a plain loop, determinism, exact resuming, resizing."""

import threading
from collections import Counter
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from selfflow.datasets.augment import shifted
from selfflow.datasets.episodes import Signals
from selfflow.datasets.loading import prefetch
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.text import embed, embed_batch
from selfflow.datasets.windows import Batch, Mixture, WindowSpec, resize

SPEC = WindowSpec(frames=(-2, 0, 4), chunk=5, height=8, width=10)


class Counting:
    """Episodes whose frame t of episode i is filled with 10 i + t, and whose action t is t + 1."""

    skipped = 0
    cameras = ("overhead_camera",)

    def __init__(self, lengths: list[int], actions: bool = True, name: str = "counting") -> None:
        self.name, self.embodiment = name, EMBODIMENTS["google_robot"]
        self.lengths, self.actions, self.asked = lengths, actions, Counter()

    def __len__(self) -> int:
        return len(self.lengths)

    def metadata(self, i: int) -> dict:
        return {}

    def length(self, i: int) -> int:
        return self.lengths[i]

    def frames(self, i: int, steps: list[int], camera: str | None = None) -> list[np.ndarray]:
        self.asked.update(steps)
        return [np.full((16, 20, 3), 10 * i + t, np.uint8) for t in steps]

    def signals(self, i: int) -> Signals:
        t = self.lengths[i]
        valid = np.full(t, self.actions) & (np.arange(t) > 0)
        return Signals(
            proprio=np.arange(t, dtype=np.float32)[:, None].repeat(8, 1),
            proprio_valid=np.full(t, self.actions),
            actions=(np.arange(t, dtype=np.float32)[:, None] + 1) * valid[:, None].repeat(7, 1),
            action_valid=valid,
            terminate=np.zeros(t, bool),
            instruction=["a"] * (t // 2) + ["b"] * (t - t // 2),
        )


def equal(a: Batch, b: Batch) -> bool:
    for f in fields(Batch):
        np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name), f.name)
    return True


def reference(s: Signals, t: int, k: int) -> tuple[list, list, list, list]:
    """What `chunk` should give, step by step."""
    n, out = len(s.actions), ([], [], [], [])
    known = [i for i in range(n) if s.action_valid[i]]
    done = changed = False
    for step in range(t, t + k):
        inside = step < n
        changed |= inside and s.instruction[step] != s.instruction[t]
        done |= changed or (inside and bool(s.terminate[step]))
        valid = inside and not changed and bool(s.action_valid[step])
        same = [
            i
            for i in range(t, min(step + 1, n))
            if s.instruction[t : i + 1] == [s.instruction[t]] * (i + 1 - t)
        ]
        before = [i for i in known if i <= same[-1]]
        hold = s.actions[(before[-1] if before else known[0]), 6] if known else 1.0
        out[0].append(s.actions[step] if valid else np.array([0.0] * 6 + [hold]))
        out[1].append(valid)
        out[2].append(done)
        out[3].append(inside and bool(known))
    return out


@st.composite
def episodes(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of Signals (beartype, in checking those, would spoil hypothesis's random state)."""
    n = draw(st.integers(1, 12))
    bools = st.lists(st.booleans(), min_size=n, max_size=n)
    texts = draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n))
    return dict(
        proprio=np.zeros((n, 8), np.float32),
        proprio_valid=np.ones(n, bool),
        actions=np.arange(1, 7 * n + 1, dtype=np.float32).reshape(n, 7) / 10,
        action_valid=np.array(draw(bools)),
        terminate=np.array(draw(bools)),
        instruction=sorted(texts) if draw(st.booleans()) else texts,
    )


@settings(max_examples=100, deadline=None)
@given(parts=episodes(), where=st.floats(0, 0.999), k=st.integers(1, 9))
def test_padding_against_a_plain_loop(parts: dict[str, Any], where: float, k: int) -> None:
    signals = Signals(**parts)
    n = len(signals.actions)
    t = int(where * n)
    source = Counting([n])
    source.signals = lambda i: signals  # type: ignore[method-assign]
    mixture = Mixture([source], [1.0], replace(SPEC, chunk=k, frames=(0,)), seed=0)
    batch = next(b for b in (mixture.batch(s, 1) for s in count()) if b.ids[0][2] == t)
    actions, valid, terminate, terminate_valid = reference(signals, t, k)
    np.testing.assert_allclose(batch.actions[0], np.array(actions, np.float32))
    np.testing.assert_array_equal(batch.action_valid[0], valid)
    np.testing.assert_array_equal(batch.terminate[0], terminate)
    np.testing.assert_array_equal(batch.terminate_valid[0], terminate_valid)
    assert batch.instruction == [signals.instruction[t]]


def test_frames_at_the_borders() -> None:
    source = Counting([6])
    mixture = Mixture([source], [1.0], SPEC, seed=3)
    seen = set()
    for step in range(40):
        batch = mixture.batch(step, 2)
        for frames, valid, (name, episode, t) in zip(
            batch.frames, batch.frame_valid, batch.ids, strict=True
        ):
            assert (name, episode) == ("counting", 0)
            wanted = [t - 2, t, t + 4]
            assert frames[:, 0, 0, 0].tolist() == [min(max(w, 0), 5) for w in wanted]
            assert valid.tolist() == [0 <= w <= 5 for w in wanted]
            seen.add(t)
    assert seen == set(range(6))


def test_a_sample_by_hand() -> None:
    """Six steps, "a" to step 2 and "b" from 3, the first action invalid; t = 1, five actions."""
    mixture = Mixture([Counting([6])], [1.0], SPEC, seed=0)
    batch = next(b for b in (mixture.batch(s, 1) for s in count()) if b.ids[0][2] == 1)
    assert batch.actions[0, :, 0].tolist() == [2, 3, 0, 0, 0]
    assert batch.actions[0, :, 6].tolist() == [2, 3, 3, 3, 3]
    assert batch.action_valid[0].tolist() == [True, True, False, False, False]
    assert batch.terminate[0].tolist() == [False, False, True, True, True]
    assert batch.terminate_valid[0].tolist() == [True] * 5
    assert batch.proprio[0].tolist() == [1.0] * 8
    assert batch.embodiment == ["google_robot"]


def test_a_batch_depends_on_seed_step_and_rank_alone() -> None:
    def mixture(seed: int = 0) -> Mixture:
        return Mixture([Counting([9, 30]), Counting([7])], [1.0, 2.0], replace(SPEC, shift=2), seed)

    used = mixture()
    for step in range(5):
        used.batch(step, 4)
    assert equal(used.batch(5, 4), mixture().batch(5, 4))
    ids = {
        str(m.batch(step, 8, rank, 2).ids)
        for m in (mixture(0), mixture(1))
        for step in (5, 6)
        for rank in (0, 1)
    }
    assert len(ids) == 8
    whole = used.batch(5, 8)
    halves = [used.batch(5, 4, rank, 2) for rank in (0, 1)]  # what two processes train on
    assert [i for half in halves for i in half.ids] == whole.ids
    assert np.array_equal(np.concatenate([half.frames for half in halves]), whole.frames)
    with pytest.raises(ValueError, match="rank"):
        used.batch(0, 1, rank=2, world=2)


def test_weights_choose_the_source_and_steps_are_uniform() -> None:
    """Chi-square at about five standard deviations, on 2000 draws."""
    sources = [Counting([2, 8], name="short"), Counting([50], name="long")]
    mixture = Mixture(sources, [3.0, 1.0], replace(SPEC, frames=(0,), chunk=1), seed=0)
    drawn = Counter(mixture.batch(0, 2000).ids)
    by_source = Counter({name: 0 for name in ("short", "long")})
    for (name, _, _), number in drawn.items():
        by_source[name] += number
    assert by_source["short"] / 2000 == pytest.approx(0.75, abs=0.05)
    steps = np.array([drawn[("short", e, t)] for e, n in ((0, 2), (1, 8)) for t in range(n)])
    expected = by_source["short"] / 10
    assert np.sum((steps - expected) ** 2 / expected) < 9 + 5 * np.sqrt(18)


def test_only_steps_with_actions() -> None:
    spec = replace(SPEC, only_with_actions=True)
    ids = Mixture([Counting([3])], [1.0], spec, 0).batch(0, 100).ids
    assert {t for _, _, t in ids} == {1, 2}
    with pytest.raises(UserError, match="no actions to learn from"):
        Mixture([Counting([3], actions=False)], [1.0], spec, 0).batch(0, 1)
    with pytest.raises(UserError, match="no episode in counting"):
        Mixture([Counting([])], [1.0], SPEC, 0)


def test_without_actions_nothing_is_a_label() -> None:
    batch = Mixture([Counting([5], actions=False)], [1.0], SPEC, 0).batch(0, 20)
    assert not batch.action_valid.any()
    assert not batch.terminate_valid.any()
    assert not batch.proprio_valid.any()
    np.testing.assert_array_equal(batch.actions[..., 6], 1)


def test_each_frame_is_read_once_a_sample() -> None:
    source = Counting([1])
    spec = replace(SPEC, frames=(0, 10, 20, 30))
    batch = Mixture([source], [1.0], spec, 0).batch(0, 1)
    assert source.asked == {0: 1}
    assert batch.frame_valid.tolist() == [[True, False, False, False]]


def test_shift_moves_all_frames_alike_and_repeats_edges() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    moved = shifted(images, 1, -2)
    np.testing.assert_array_equal(moved[:, 1:, :3], images[:, :3, 2:])
    np.testing.assert_array_equal(moved[:, 0, :3], images[:, 0, 2:])
    np.testing.assert_array_equal(moved[:, 1:, 4], images[:, :3, 4])
    assert shifted(images, 0, 0) is images


def test_resize_is_area_averaging() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)
    blocks = image.reshape(6, 2, 10, 2, 3).mean((1, 3))
    assert np.abs(resize(image, 6, 10) - blocks).max() <= 0.5
    # 12 -> 8 rows: a box of 1.5 rows takes the pixels whose middle is in it, 2 and 1 in turn
    rows = image.reshape(4, 3, 20, 3).astype(float)
    expected = np.stack([rows[:, :2].mean(1), rows[:, 2]], 1).reshape(8, 20, 3)
    assert np.abs(resize(image, 8, 20) - expected).max() <= 0.5
    assert resize(image, 12, 20) is image
    assert resize(image, 24, 40).shape == (24, 40, 3)
    assert resize(image, 6, 10).flags.writeable


def test_prefetch_keeps_order_and_raises_where_it_fails() -> None:
    mixture = Mixture([Counting([30])], [1.0], SPEC, 0)
    for step, batch in zip(range(5), prefetch(mixture, range(5), 3), strict=True):
        assert equal(batch, mixture.batch(step, 3))

    class Broken(Counting):
        def frames(self, i: int, steps: list[int], camera: str | None = None) -> list[np.ndarray]:
            if threading.current_thread() is threading.main_thread():
                raise AssertionError("not in the background")
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        next(prefetch(Mixture([Broken([4])], [1.0], SPEC, 0), range(2), 1))
    assert list(prefetch(mixture, [], 1)) == []


def test_prefetch_may_be_left_early() -> None:
    before = threading.active_count()
    batches = prefetch(Mixture([Counting([30])], [1.0], SPEC, 0), count(), 2)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_impossible_windows_are_refused() -> None:
    for change in ({"frames": ()}, {"chunk": 0}, {"height": 0}, {"shift": -1}):
        with pytest.raises((ValueError, TypeCheckError)):
            replace(SPEC, **change)


@pytest.mark.parametrize("spec", ["x@0", "x@-1", "x@nan", "x@inf", "x@heavy", "x@"])
def test_bad_weights(spec: str) -> None:
    with pytest.raises(UserError, match="weight"):
        open_sources([spec])


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such path.*store\.json.*features\.json.*mp4"):
        open_sources([str(tmp_path / "none") + "@2"])
    (tmp_path / "text.mp4").write_text("not a film")
    for path in (tmp_path, tmp_path / "text.mp4"):
        with pytest.raises(UserError, match="not recognised"):
            open_sources([str(path)])
    with pytest.raises(UserError, match="no data"):
        open_sources([])


def test_text_vectors() -> None:
    """The first numbers are fixed for ever: checkpoints rely on them."""
    a = embed("open top drawer")
    assert a.shape == (1, 384)
    assert np.sqrt(np.mean(a**2)) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(a, embed("Open  top drawer."))
    similar, different = embed("open middle drawer"), embed("pick coke can")

    def cosine(b: np.ndarray) -> float:
        return float(np.mean(a * b))

    assert cosine(similar) > 0.25
    assert abs(cosine(different)) < 0.25
    assert not np.array_equal(embed("a near b"), embed("b near a"))
    assert not embed("").any()
    batch = embed_batch(["open top drawer", "pick coke can"])
    assert batch.shape == (2, 1, 384)
    np.testing.assert_array_equal(batch[0], a)
    np.testing.assert_allclose(
        a[0, :6], [0.4339, 2.1693, 0.4339, -0.4339, 0.4339, -1.3016], atol=1e-4
    )
