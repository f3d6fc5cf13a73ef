"""Language-Table (xArm with a rod, 10 Hz) as IRASim's clips keep it (clips.py).

    actions     (T - 1, 2) displacement of the rod in the table's plane, xy (m) in the base frame
    texts       the instruction; the published clip has none

What is converted, and what is not:
- the rod moves in a plane and has no gripper: dz and the turn are 0, the target open, as in Octo;
- the last frame has no action; the clip does not say where the rod is: no proprioception;
- the control rate is that of the published data set; the clip's mp4 says 4 frames a second.
"""

import numpy as np

from selfflow.datasets.episodes import DatasetSpec, Signals, no_signals
from selfflow.datasets.spec import ACTION_DIM, GRIPPER, Embodiment

ACTION = "actions"
ROBOT = Embodiment(
    "language_table",
    10.0,
    ("front",),
    "rod",
    (0.1, 0.1, 0.1, np.pi / 2, np.pi / 2, np.pi / 2, 1.0),
)


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """The plane's actions in the project's convention."""
    none, moves = no_signals(instruction), numbers[ACTION][: len(instruction)]
    actions = np.zeros((len(instruction), ACTION_DIM), np.float32)
    actions[: len(moves), :2] = moves
    actions[: len(moves), GRIPPER] = 1
    return Signals(
        proprio=none.proprio,
        proprio_valid=none.proprio_valid,
        actions=actions,
        action_valid=np.arange(len(instruction)) < len(moves),
        terminate=none.terminate,
        instruction=instruction,
    )


LANGUAGE_TABLE_CLIPS = DatasetSpec(
    embodiment=ROBOT,
    cameras={"front": "0"},
    instruction="texts",
    numbers={ACTION: 2},
    convert=convert,
)
