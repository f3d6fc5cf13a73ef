"""Rotations for numpy: quaternions wxyz, axis-angle (rotation vectors), rpy, matrices.

Quaternions are wxyz everywhere in selfflow and converted at the borders. All functions take arrays
(or nested lists) with any leading dimensions, broadcast them, and work in float64. They know no
frames: `compose(a, b)` rotates by b first, then by a, so a rotation given in the base frame is
composed from the left.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def canonical(q: ArrayLike) -> Float[np.ndarray, "*b 4"]:
    """The same rotation as a unit quaternion with w >= 0."""
    unit = np.asarray(q, np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    return np.where(unit[..., :1] < 0, -unit, unit)


def compose(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "*b 4"]:
    """Hamilton product a·b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    aw, av, bw, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    w = aw * bw - np.sum(av * bv, axis=-1, keepdims=True)
    return np.concatenate([w, aw * bv + bw * av + np.cross(av, bv)], axis=-1)


def inverse(q: ArrayLike) -> Float[np.ndarray, "*b 4"]:
    """The inverse of a unit quaternion."""
    return np.asarray(q, np.float64) * np.array([1.0, -1.0, -1.0, -1.0])


def rotate(q: ArrayLike, v: ArrayLike) -> Float[np.ndarray, "*b 3"]:
    """v rotated by the unit quaternion q."""
    q, v = np.asarray(q, np.float64), np.asarray(v, np.float64)
    t = 2.0 * np.cross(q[..., 1:], v)
    return v + q[..., :1] * t + np.cross(q[..., 1:], t)


def from_axis_angle(r: ArrayLike) -> Float[np.ndarray, "*b 4"]:
    """Quaternion of a rotation vector (axis × angle, rad)."""
    r = np.asarray(r, np.float64)
    half = np.linalg.norm(r, axis=-1, keepdims=True) / 2
    # numpy's sinc is sin(pi x) / (pi x): sin(half) / half without a division by zero
    return np.concatenate([np.cos(half), r / 2 * np.sinc(half / np.pi)], axis=-1)


def to_axis_angle(q: ArrayLike) -> Float[np.ndarray, "*b 3"]:
    """Rotation vector (rad, angle in [0, pi]) of a quaternion."""
    q = canonical(q)
    s = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(s, q[..., :1])
    return q[..., 1:] * np.where(s > 1e-12, angle / np.maximum(s, 1e-12), 2.0)


def from_rpy(rpy: ArrayLike) -> Float[np.ndarray, "*b 4"]:
    """Quaternion of roll, pitch, yaw (rad), fixed axes x, y, z in turn ("sxyz", as in RLDS)."""
    half = np.asarray(rpy, np.float64) / 2
    (cr, cp, cy), (sr, sp, sy) = np.moveaxis(np.cos(half), -1, 0), np.moveaxis(np.sin(half), -1, 0)
    return np.stack(
        [
            cr * cp * cy + sr * sp * sy,
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
        ],
        axis=-1,
    )


def to_rpy(q: ArrayLike) -> Float[np.ndarray, "*b 3"]:
    """Roll, pitch, yaw (rad, each in [-pi, pi]) of a quaternion: the inverse of `from_rpy`.

    By half sums and differences of roll and yaw, so that it holds at pitch ±90° too, where only one
    of the two is determined.
    """
    w, x, y, z = np.moveaxis(np.asarray(q, np.float64), -1, 0)
    total, difference = np.arctan2(x + z, w - y), np.arctan2(z - x, w + y)
    pitch = 2 * np.arctan2(np.hypot(w + y, z - x), np.hypot(w - y, x + z)) - np.pi / 2
    rpy = np.stack([total - difference, pitch, total + difference], axis=-1)
    return (rpy + np.pi) % (2 * np.pi) - np.pi


def to_matrix(q: ArrayLike) -> Float[np.ndarray, "*b 3 3"]:
    """Rotation matrix whose columns are the rotated axes."""
    q = np.asarray(q, np.float64)[..., None, :]
    return np.swapaxes(rotate(np.broadcast_to(q, (*q.shape[:-2], 3, 4)), np.eye(3)), -1, -2)


def from_matrix(m: ArrayLike) -> Float[np.ndarray, "*b 4"]:
    """Canonical quaternion of a rotation matrix (largest component first, so never singular)."""
    m = np.asarray(m, np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    xy, xz, yz = (
        m[..., 0, 1] + m[..., 1, 0],
        m[..., 0, 2] + m[..., 2, 0],
        m[..., 1, 2] + m[..., 2, 1],
    )
    # The matrix 4·q·qᵀ; any of its rows is q scaled, the one with the largest diagonal the best.
    rows = np.stack(
        [
            np.stack([1 + xx + yy + zz, wx, wy, wz], axis=-1),
            np.stack([wx, 1 + xx - yy - zz, xy, xz], axis=-1),
            np.stack([wy, xy, 1 - xx + yy - zz, yz], axis=-1),
            np.stack([wz, xz, yz, 1 - xx - yy + zz], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(np.stack([rows[..., i, i] for i in range(4)], axis=-1), axis=-1)
    return canonical(np.take_along_axis(rows, best[..., None, None], axis=-2)[..., 0, :])
