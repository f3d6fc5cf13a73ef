"""What covers the background of a drawer scene: a photograph by its number, or plain colours."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from selfflow.envs.cabinet_placements import DRAWER_POSES, PLAIN, PLAIN_COLOURS


def nearest_photo(x: float, y: float) -> str:
    """The drawer pose nearest to a robot's place; its photograph is used there."""
    distance = {name: np.hypot(px - x, py - y) for name, (px, py, _) in DRAWER_POSES.items()}
    return min(distance, key=distance.__getitem__)


def chosen_photo(placement: Mapping[str, float]) -> str | None:
    """The drawer pose whose photograph is shown: the placement's "photo", else the nearest to the
    robot. None where the background is plain."""
    if "photo" not in placement:
        return nearest_photo(placement["robot_x"], placement["robot_y"])
    number = placement["photo"]
    return None if number == PLAIN else list(DRAWER_POSES)[round(number)]


def plain_background(
    placement: Mapping[str, float], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """The placement's two colours, fading from top to bottom of a (height, width) picture."""
    top, bottom = np.reshape([placement[name] for name in PLAIN_COLOURS], (2, 3))
    down = np.linspace(0.0, 1.0, size[0])[:, None]
    rows = (1 - down) * top + down * bottom
    return np.broadcast_to(rows[:, None], (*size, 3)).astype(np.uint8)
