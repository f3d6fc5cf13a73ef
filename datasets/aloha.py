"""ALOHA, two ViperX arms at 50 Hz, as ACT records them: a file per episode in HDF5 (hdf5.py).

    action                        (T, 14) joint positions of both leaders: 6 joints and gripper each
    observations/qpos, qvel       (T, 14) of the followers
    observations/images/<camera>  (T, 480, 640, 3) or JPEG data

Joint positions of two arms are neither a tool's pose nor deltas of one: nothing of them is valid as
this project's proprioception or action. The frames are, and the arrays themselves are measured:
`measured(i, "action")`. JPEG data is taken to be coded as JPEG is: RGB.
"""

import numpy as np

from selfflow.datasets.episodes import DatasetSpec, Signals, no_signals
from selfflow.datasets.spec import Embodiment

CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist", "top")  # top: in simulation
ROBOT = Embodiment(
    "aloha", 50.0, CAMERAS, "none: two arms", (1.0, 1.0, 1.0, np.pi / 2, np.pi / 2, np.pi / 2, 1.0)
)


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """Nothing but the instruction is valid."""
    return no_signals(instruction)


ALOHA = DatasetSpec(
    embodiment=ROBOT,
    cameras={name: f"observations/images/{name}" for name in CAMERAS},
    instruction=None,
    numbers={"action": 0},
    convert=convert,
)
