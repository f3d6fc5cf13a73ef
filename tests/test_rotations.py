"""Rotations: group axioms, round trips in float64, and rpy against axis rotations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from selfflow.datasets.rotations import (
    canonical,
    compose,
    from_axis_angle,
    from_matrix,
    from_rpy,
    inverse,
    rotate,
    to_axis_angle,
    to_matrix,
    to_rpy,
)

unit = st.floats(-1, 1, allow_subnormal=False)
vectors = arrays(np.float64, 3, elements=unit)
quaternions = (
    arrays(np.float64, 4, elements=unit)
    .filter(lambda q: np.linalg.norm(q) > 0.05)
    .map(lambda q: q / np.linalg.norm(q))
)
fast = settings(max_examples=50, deadline=None)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def same_rotation(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-12) -> None:
    close(to_matrix(a), to_matrix(b), tolerance)


@fast
@given(quaternions, quaternions, quaternions)
def test_group_axioms(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    identity = np.array([1.0, 0, 0, 0])
    close(compose(compose(a, b), c), compose(a, compose(b, c)))
    close(compose(a, identity), a)
    close(compose(identity, a), a)
    close(compose(a, inverse(a)), identity)
    close(np.linalg.norm(compose(a, b)), np.array(1.0))


@fast
@given(quaternions, quaternions, vectors)
def test_compose_rotates_by_b_first(a: np.ndarray, b: np.ndarray, v: np.ndarray) -> None:
    close(rotate(compose(a, b), v), rotate(a, rotate(b, v)))
    close(to_matrix(compose(a, b)), to_matrix(a) @ to_matrix(b))
    close(to_matrix(a) @ v, rotate(a, v))


@fast
@given(quaternions)
def test_rpy_round_trip(q: np.ndarray) -> None:
    same_rotation(from_rpy(to_rpy(q)), q)
    assert np.abs(to_rpy(q)).max() <= np.pi


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-9])
def test_rpy_where_roll_and_yaw_are_one(pitch: float) -> None:
    q = from_rpy([0.4, pitch, -1.3])
    same_rotation(from_rpy(to_rpy(q)), q)


@fast
@given(quaternions)
def test_matrices(q: np.ndarray) -> None:
    m = to_matrix(q)
    close(m @ m.T, np.eye(3))
    close(np.linalg.det(m), np.array(1.0))
    same_rotation(from_matrix(m), q)
    close(to_matrix(from_matrix(m)), m)


@fast
@given(vectors, st.floats(-15, np.log10(np.pi)))
def test_axis_angle_round_trip(axis: np.ndarray, exponent: float) -> None:
    """Angles from 1e-15 rad to pi, relative to the angle."""
    length = np.linalg.norm(axis)
    if length < 0.05:
        return
    r = axis / length * 10**exponent
    close(to_axis_angle(from_axis_angle(r)), r, 1e-9 * 10**exponent)


@pytest.mark.parametrize("angle", [np.pi - 1e-3, np.pi - 1e-9, np.pi])
def test_axis_angle_near_pi(angle: float) -> None:
    axis = np.array([1.0, -2, 3]) / np.sqrt(14)
    back = to_axis_angle(from_axis_angle(axis * angle))
    close(np.linalg.norm(back), np.array(angle), 1e-9)
    same_rotation(from_axis_angle(back), from_axis_angle(axis * angle))


def test_axis_angle_of_zero_and_of_more_than_pi() -> None:
    close(to_axis_angle(from_axis_angle(np.zeros(3))), np.zeros(3), 0)
    three_quarters = from_axis_angle(np.array([0, 0, 1.5 * np.pi]))
    close(to_axis_angle(three_quarters), np.array([0, 0, -np.pi / 2]))


def test_a_quarter_turn_by_hand() -> None:
    q = from_axis_angle(np.array([0, 0, np.pi / 2]))
    close(rotate(q, np.array([1.0, 0, 0])), np.array([0.0, 1, 0]))
    close(q, np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)]))


@fast
@given(arrays(np.float64, 3, elements=st.floats(-np.pi, np.pi)))
def test_rpy_is_roll_then_pitch_then_yaw_about_fixed_axes(rpy: np.ndarray) -> None:
    x, y, z = (from_axis_angle(axis * angle) for axis, angle in zip(np.eye(3), rpy, strict=True))
    same_rotation(from_rpy(rpy), compose(z, compose(y, x)))


@fast
@given(quaternions)
def test_canonical(q: np.ndarray) -> None:
    close(canonical(q), canonical(-q) if q[0] != 0 else canonical(q))
    assert canonical(q)[0] >= 0
    same_rotation(canonical(3 * q), q)


def test_leading_dimensions() -> None:
    q = canonical(np.random.default_rng(0).normal(size=(2, 5, 4)))
    v = np.random.default_rng(1).normal(size=(2, 5, 3))
    assert to_matrix(q).shape == (2, 5, 3, 3)
    close(rotate(q, v)[1, 2], rotate(q[1, 2], v[1, 2]))
    close(from_matrix(to_matrix(q)), q)
    close(from_axis_angle(to_axis_angle(q)), q)
    close(from_rpy(v)[0, 3], from_rpy(v[0, 3]))
