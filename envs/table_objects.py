"""What lies on the Google robot's table in coke can and move near: models, and how they are put.

The numbers are SIMPLER's. World frame, metres; the robot stands at x = 0.35 and looks along -x.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.rotations import rotate

Quaternion = tuple[float, float, float, float]  # w, x, y, z

HALF = float(np.sqrt(0.5))
AS_MODELLED: Quaternion = (1.0, 0.0, 0.0, 0.0)
STOOD_UP: Quaternion = (HALF, HALF, 0.0, 0.0)  # cans and bottles are modelled lying along y
QUARTER_TURN: Quaternion = (HALF, 0.0, 0.0, HALF)
HALF_TURN: Quaternion = (0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Model:
    """A movable object: what instructions call it, its box (m) as modelled, how it is set down."""

    name: str
    box: tuple[float, float, float]
    turn: Quaternion


COKE = "opened_coke_can"
CAN_BOX = (0.066, 0.123, 0.066)
MODELS = {
    COKE: Model("coke can", CAN_BOX, STOOD_UP),
    "baked_opened_coke_can_v2": Model("coke can", CAN_BOX, STOOD_UP),
    "baked_opened_pepsi_can_v2": Model("pepsi can", CAN_BOX, STOOD_UP),
    "baked_opened_7up_can_v2": Model("7up can", CAN_BOX, STOOD_UP),
    "baked_opened_redbull_can_v2": Model("redbull can", (0.0585, 0.172, 0.0585), STOOD_UP),
    "blue_plastic_bottle": Model(
        "blue plastic bottle", (0.0601, 0.203, 0.0605), (0.5, 0.5, 0.5, 0.5)
    ),
    "baked_apple_v2": Model("apple", (0.08, 0.08, 0.08), AS_MODELLED),
    "orange": Model("orange", (0.07, 0.07, 0.068), QUARTER_TURN),
    "baked_sponge_v2": Model("sponge", (0.07, 0.10, 0.036), QUARTER_TURN),
}


@dataclass(frozen=True)
class Placed:
    """An object at the start: model, place on the table (m), turn about its origin."""

    model: str
    xy: tuple[float, float]
    turn: Quaternion

    @property
    def radius(self) -> float:
        """Half the diagonal of its box on the table (m), as SIMPLER measures it."""
        return float(np.linalg.norm(rotate(list(self.turn), list(MODELS[self.model].box))[:2]) / 2)
