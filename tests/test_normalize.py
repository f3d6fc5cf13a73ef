"""Statistics and scaling: round trips in float64, constants, outliers, missing entries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from selfflow.datasets.episodes import Signals
from selfflow.datasets.normalize import (
    Statistics,
    check_conventions,
    denormalize_action,
    fit,
    from_json,
    load,
    normalize_action,
    of_embodiment,
    proprio_features,
    to_json,
)
from selfflow.datasets.rotations import canonical, to_matrix
from selfflow.datasets.spec import EMBODIMENTS, UserError


class Fake:
    """Episodes from arrays."""

    skipped = 0
    cameras = ("overhead_camera",)

    def __init__(self, signals: list[Signals], embodiment: str = "google_robot") -> None:
        self.name, self.embodiment, self._signals = "fake", EMBODIMENTS[embodiment], signals

    def __len__(self) -> int:
        return len(self._signals)

    def metadata(self, i: int) -> dict:
        return {}

    def length(self, i: int) -> int:
        return len(self._signals[i].actions)

    def frames(self, i: int, steps: object, camera: str | None = None) -> list[np.ndarray]:
        return []

    def signals(self, i: int) -> Signals:
        return self._signals[i]


def signals(
    actions: np.ndarray, valid: np.ndarray, proprio_valid: np.ndarray | None = None
) -> Signals:
    t = len(actions)
    rng = np.random.default_rng(0)
    return Signals(
        proprio=rng.normal(size=(t, 8)).astype(np.float32),
        proprio_valid=np.ones(t, bool) if proprio_valid is None else proprio_valid,
        actions=actions.astype(np.float32),
        action_valid=valid,
        terminate=np.zeros(t, bool),
        instruction=["x"] * t,
    )


def some_statistics(q01: np.ndarray, q99: np.ndarray) -> Statistics:
    (stat,) = fit([Fake([signals(np.zeros((2, 7)), np.ones(2, bool))])]).values()
    return replace(stat, action_q01=tuple(map(float, q01)), action_q99=tuple(map(float, q99)))


finite = st.floats(-30, 30, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(
    low=arrays(np.float64, 7, elements=finite),
    span=arrays(np.float64, 7, elements=st.just(0.0) | st.floats(1e-4, 50)),
    inside=arrays(np.float64, (3, 7), elements=st.floats(0, 1)),
)
def test_round_trip_within_the_quantiles(
    low: np.ndarray, span: np.ndarray, inside: np.ndarray
) -> None:
    stat = some_statistics(low, low + span)
    actions = low + inside * span
    scaled = normalize_action(actions, stat)
    assert np.abs(scaled[:, :6]).max() <= 1
    np.testing.assert_array_equal(scaled[:, 6], actions[:, 6])
    np.testing.assert_allclose(denormalize_action(scaled, stat), actions, rtol=0, atol=1e-9)
    assert scaled.dtype == np.float64
    assert normalize_action(actions.astype(np.float32), stat).dtype == np.float32


def test_outliers_are_clipped_and_quantiles_are_the_ends() -> None:
    low, high = -np.arange(1.0, 8), np.arange(1.0, 8) * 2
    stat = some_statistics(low, high)
    np.testing.assert_allclose(normalize_action(low, stat)[:6], -1)
    np.testing.assert_allclose(normalize_action(high, stat)[:6], 1)
    far = normalize_action(np.full(7, 22.0), stat)
    np.testing.assert_array_equal(far[:6], 1)
    assert far[6] == 22.0  # the gripper is left alone
    np.testing.assert_allclose(denormalize_action(far, stat)[:6], high[:6])


def test_a_constant_dimension_is_zero_and_comes_back() -> None:
    low = np.full(7, 0.25)
    stat = some_statistics(low, low)
    scaled = normalize_action(np.full(7, 0.3), stat)
    np.testing.assert_array_equal(scaled[:6], 0)
    for value in (-1.0, 0.0, 0.7):
        np.testing.assert_allclose(denormalize_action(np.full(7, value), stat)[:6], 0.25)


def test_fit_counts_valid_rows_only() -> None:
    actions = np.random.default_rng(1).normal(size=(1000, 7))
    valid = np.random.default_rng(2).random(1000) < 0.5
    spoiled = np.where(valid[:, None], actions, 1e6)
    source = Fake([signals(spoiled[:400], valid[:400]), signals(spoiled[400:], valid[400:])])
    stat = fit([source])["google_robot"]
    kept = actions[valid].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(stat.action_q01, np.quantile(kept, 0.01, axis=0))
    np.testing.assert_allclose(stat.action_q99, np.quantile(kept, 0.99, axis=0))
    np.testing.assert_allclose(stat.action_mean, kept.mean(0))
    np.testing.assert_allclose(stat.action_max, kept.max(0))
    assert stat.n == valid.sum()
    assert stat.sources == ("fake",)
    assert stat.control_hz == 3.0


def test_embodiments_are_kept_apart_and_videos_have_no_entry() -> None:
    acting = signals(np.ones((4, 7)), np.ones(4, bool))
    silent = signals(np.zeros((4, 7)), np.zeros(4, bool), np.zeros(4, bool))
    assert set(fit([Fake([acting]), Fake([silent], "widowx")])) == {"google_robot"}
    both = fit([Fake([acting]), Fake([silent]), Fake([acting], "widowx")])
    assert set(both) == {"google_robot", "widowx"}
    assert both["google_robot"].n == 4
    blind = fit([Fake([replace(acting, proprio_valid=np.zeros(4, bool))])])["google_robot"]
    assert blind.proprio_q01[0] == pytest.approx(-1, abs=0.03)


def test_sources_that_mean_different_robots_by_one_name() -> None:
    a, b = (Fake([signals(np.ones((4, 7)), np.ones(4, bool))]) for _ in range(2))
    b.embodiment = replace(b.embodiment, control_hz=5.0)
    with pytest.raises(UserError, match="different robots"):
        fit([a, b])


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    source = Fake([signals(np.random.default_rng(0).normal(size=(50, 7)), np.ones(50, bool))])
    statistics = fit([source])
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(to_json(statistics)))
    assert load(file) == statistics
    with pytest.raises(UserError, match=r"no statistics for embodiment 'widowx'.*\[google_robot\]"):
        of_embodiment(statistics, "widowx")
    assert of_embodiment(statistics, "google_robot").n == 50
    with pytest.raises(UserError, match="no statistics"):
        load(tmp_path / "none.json")
    broken = to_json(statistics)
    del broken["google_robot"]["action_q99"]
    with pytest.raises(UserError, match="action_q99"):
        from_json(broken)


def test_files_from_before_proprioception_had_a_mean_are_read() -> None:
    source = Fake([signals(np.random.default_rng(0).normal(size=(50, 7)), np.ones(50, bool))])
    values = to_json(fit([source]))
    proprio = source.signals(0).proprio.astype(np.float64)
    np.testing.assert_allclose(values["google_robot"]["proprio_mean"], proprio.mean(0))
    np.testing.assert_allclose(values["google_robot"]["proprio_max"], proprio.max(0))
    for key in ("mean", "std", "min", "max"):
        del values["google_robot"][f"proprio_{key}"]
    old = from_json(values)["google_robot"]
    assert old.proprio_mean == ()
    assert old.proprio_q99 == fit([source])["google_robot"].proprio_q99


def test_conventions_are_compared() -> None:
    stat = fit([Fake([signals(np.ones((4, 7)), np.ones(4, bool))])])["google_robot"]
    check_conventions(stat, EMBODIMENTS["google_robot"])
    with pytest.raises(UserError, match="control_hz"):
        check_conventions(stat, EMBODIMENTS["widowx"])
    back = from_json(json.loads(json.dumps(to_json({"google_robot": stat}))))["google_robot"]
    check_conventions(back, EMBODIMENTS["google_robot"])


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_proprio_features(q: np.ndarray) -> None:
    stat = replace(
        some_statistics(np.zeros(7), np.ones(7)),
        proprio_q01=(0.0, -1.0, 0.5, *[0.0] * 5),
        proprio_q99=(1.0, 1.0, 0.5, *[0.0] * 5),
    )
    q = canonical(q)
    p = np.array([[0.25, 0.5, 9.0, *q, 0.75], [99.0, -99.0, 9.0, *-q, 0.0]])
    features = proprio_features(p, stat)
    np.testing.assert_allclose(features[0, :3], [-0.5, 0.5, 0.0])
    np.testing.assert_allclose(features[1, :3], [2.0, -2.0, 0.0])  # clipped at two, not at one
    np.testing.assert_allclose(features[:, 9], [0.5, -1.0])
    np.testing.assert_allclose(features[0, 3:9], features[1, 3:9], atol=1e-12)  # q and -q are one
    m = to_matrix(q)
    np.testing.assert_allclose(features[0, 3:9], [*m[:, 0], *m[:, 1]], atol=1e-12)
    np.testing.assert_allclose(proprio_features(p, None)[0, :2], [0.25, 0.5])
