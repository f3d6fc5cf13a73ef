"""Jerk-limited paths: limits, arrival, continuity at a cut, and numerically awkward starts."""

import numpy as np

from selfflow.envs.trajectory import JerkLimited

TIMES = (np.arange(171) + 1) / 513


def test_limits_are_kept_and_the_target_is_reached():
    path = JerkLimited(2, velocity=1.5, acceleration=2.0, jerk=50.0)
    path.reset(np.array([0.0, 0.3]))
    target = np.array([1.2, -0.4])
    parts = [path.plan(target, TIMES) for _ in range(6)]
    positions, velocities = (np.concatenate(p) for p in zip(*parts, strict=True))
    assert np.abs(velocities).max() <= 1.5 + 1e-9
    assert np.abs(np.diff(velocities, axis=0)).max() * 513 <= 2.0 + 1e-6
    np.testing.assert_allclose(positions[-1], target, atol=1e-6)
    np.testing.assert_allclose(velocities[-1], 0, atol=1e-6)


def test_a_new_command_continues_position_and_velocity():
    path = JerkLimited(1, velocity=1.5, acceleration=2.0, jerk=50.0)
    path.reset(np.zeros(1))
    positions, velocities = path.plan(np.ones(1), TIMES)
    onwards, speeds = path.plan(-np.ones(1), TIMES)
    assert abs(onwards[0, 0] - positions[-1, 0]) < 1.5 / 513 + 1e-6
    assert abs(speeds[0, 0] - velocities[-1, 0]) < 2.0 / 513 + 1e-6


def test_starts_that_differ_from_the_target_by_rounding():
    """ruckig alone fails on some of these ("error in step 2"), as met by a gripper held open."""
    path, rng = JerkLimited(2, velocity=1.0, acceleration=7.0, jerk=50.0), np.random.default_rng(0)
    path.reset(
        np.array([-1.035013047490096e-11, 1.260992265467165e-11]),
        np.array([-4.085031792000482e-12, 1.472722117867864e-11]),
    )
    path.plan(np.zeros(2), TIMES)
    for _ in range(3000):
        scale = 10.0 ** rng.uniform(-13, -6, 2)
        path.reset(scale * rng.normal(size=2), scale[::-1] * rng.normal(size=2))
        positions, _ = path.plan(np.zeros(2), TIMES[-1:])
        assert np.abs(positions).max() < 1e-4
