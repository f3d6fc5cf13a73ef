"""The contract between robots, simulators, data and policies. Every part imports this file.

    observation = {
        "images":      {camera name: uint8 (H, W, 3)},  # native size; the policy resizes
        "proprio":     float32 (8,)  x, y, z, qw, qx, qy, qz, gripper opening
        "instruction": str,                             # may change within an episode
    }
    action = float32 (7,)  dx, dy, dz, rx, ry, rz, gripper opening target

One convention, stated here and nowhere else:
- frames: proprioception is the pose of `Embodiment.tool_link` in the robot's base frame, in metres,
  quaternion wxyz with w >= 0; the action's position delta (m) and axis-angle rotation delta (rad)
  are in the same base frame and apply to the *sensed* pose: p + d, exp(r)·q (SIMPLER's WidowX
  applies them to its controller's last target instead: envs/widowx.py);
- gripper: 1 = open, 0 = closed, absolute, in proprioception and in actions;
- time: one action a control step, `Embodiment.control_hz` steps a second;
- state for evaluation only (object poses, drawer opening, contacts) is in `info["privileged"]`,
  never in the observation; success is `info["success"]`.
"""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float

ACTION_DIM, PROPRIO_DIM = 7, 8
POSITION, ROTATION, GRIPPER = slice(0, 3), slice(3, 6), 6  # parts of an action
TOOL_POSITION, TOOL_QUATERNION, OPENING = slice(0, 3), slice(3, 7), 7  # parts of proprioception
ACTION_NAMES = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper_open")


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, the choices, and the cure.

    Entry points print it without a traceback and exit with status 2.
    """


class Observation(TypedDict):
    """What a policy may see; drawn in the module's docstring."""

    images: dict[str, np.ndarray]
    proprio: np.ndarray
    instruction: str


@dataclass(frozen=True)
class ActionChunk:
    """K actions to execute in turn, in physical units.

    `terminate[k]` says before action k that the current subtask is done: the environment advances
    to the next subtask and the rest of the chunk is dropped; on the last subtask the episode ends.
    """

    actions: Float[np.ndarray, "K 7"]
    terminate: Bool[np.ndarray, "K"] | None = None


@dataclass(frozen=True)
class Embodiment:
    """A robot as data and policies see it. Statistics are keyed by `name`."""

    name: str
    control_hz: float
    cameras: tuple[str, ...]  # the first is the one that single-camera policies use
    tool_link: str  # the link whose pose is sensed and commanded
    limits: tuple[float, ...]  # |action| bound by dimension; the gripper is in [0, 1]
    frame: str = "robot base"
    rotation: str = "axis-angle"
    gripper: str = "opening, 1 = open"

    def clip(self, action: Float[np.ndarray, "7"]) -> tuple[Float[np.ndarray, "7"], bool]:
        """The action within limits, and whether anything had to be clipped."""
        high = np.asarray(self.limits, np.float64)
        low = np.where(np.arange(ACTION_DIM) == GRIPPER, 0.0, -high)
        clipped = np.clip(action, low, high)
        return clipped, bool(np.any(np.abs(clipped - action) > 1e-9))


DELTA_LIMITS = (1.0, 1.0, 1.0, np.pi / 2, np.pi / 2, np.pi / 2, 1.0)  # SIMPLER's action box

EMBODIMENTS = {
    e.name: e
    for e in (
        Embodiment("google_robot", 3.0, ("overhead_camera",), "link_gripper_tcp", DELTA_LIMITS),
        Embodiment("widowx", 5.0, ("3rd_view_camera",), "ee_gripper_link", DELTA_LIMITS),
    )
}


@dataclass(frozen=True)
class Task:
    """A task by its one name: robot, step limit, and one instruction per subtask.

    Braces in an instruction stand for what the episode's placement says (envs/tasks.py).
    """

    name: str
    embodiment: str
    max_steps: int
    instructions: tuple[str, ...]
    force_advance_at: int | None = None  # step at which the next subtask starts whatever happens


def _drawer(verb: str, drawer: str) -> Task:
    return Task(f"{verb}_{drawer}_drawer", "google_robot", 113, (f"{verb} {drawer} drawer",))


TASKS = {
    t.name: t
    for t in (
        *(
            _drawer(verb, drawer)
            for verb in ("open", "close")
            for drawer in ("top", "middle", "bottom")
        ),
        Task(
            "open_drawer_place",
            "google_robot",
            200,
            ("open top drawer", "place apple into top drawer"),
            force_advance_at=100,
        ),
        # the first draws one of the other three's orientations
        *(
            Task(f"pick_{orientation}coke_can", "google_robot", 80, ("pick coke can",))
            for orientation in ("", "horizontal_", "vertical_", "standing_")
        ),
        Task("move_near", "google_robot", 80, ("move {source} near {target}",)),
        Task("widowx_carrot_on_plate", "widowx", 60, ("put carrot on plate",)),
        Task("widowx_spoon_on_towel", "widowx", 60, ("put the spoon on the towel",)),
        Task(
            "widowx_stack_cube",
            "widowx",
            60,
            ("stack the green block on the yellow block",),
        ),
        Task(
            "widowx_eggplant_in_basket",
            "widowx",
            120,
            ("put eggplant into yellow basket",),
        ),
    )
}

_DRAWERS = [(verb, d) for verb in ("open", "close") for d in ("top", "middle", "bottom")]

# SIMPLER's ids, of its wrapper (google_robot_..., widowx_...) and of its environments (...-v0),
# where one names one of our tasks. Three of its WidowX ids are our names.
ALIASES = {
    **{f"google_robot_{verb}_{d}_drawer": f"{verb}_{d}_drawer" for verb, d in _DRAWERS},
    **{
        f"{verb.title()}{d.title()}DrawerCustomInScene-v0": f"{verb}_{d}_drawer"
        for verb, d in _DRAWERS
    },
    "google_robot_place_in_closed_top_drawer": "open_drawer_place",
    "google_robot_place_apple_in_closed_top_drawer": "open_drawer_place",
    "PlaceIntoClosedTopDrawerCustomInScene-v0": "open_drawer_place",
    "google_robot_pick_coke_can": "pick_coke_can",
    "google_robot_pick_horizontal_coke_can": "pick_horizontal_coke_can",
    "google_robot_pick_vertical_coke_can": "pick_vertical_coke_can",
    "google_robot_pick_standing_coke_can": "pick_standing_coke_can",
    "GraspSingleOpenedCokeCanInScene-v0": "pick_coke_can",
    "google_robot_move_near": "move_near",
    "google_robot_move_near_v0": "move_near",
    "google_robot_move_near_v1": "move_near",
    "MoveNearGoogleBakedTexInScene-v0": "move_near",
    "MoveNearGoogleBakedTexInScene-v1": "move_near",
    "widowx_put_eggplant_in_basket": "widowx_eggplant_in_basket",
    "PutEggplantInBasketScene-v0": "widowx_eggplant_in_basket",
    "PutSpoonOnTableClothInScene-v0": "widowx_spoon_on_towel",
    "PutCarrotOnPlateInScene-v0": "widowx_carrot_on_plate",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v0": "widowx_stack_cube",
}
# Those that name several tasks, with the ones that are here.
SEVERAL = {
    "google_robot_open_drawer": tuple(f"open_{d}_drawer" for d in ("top", "middle", "bottom")),
    "google_robot_close_drawer": tuple(f"close_{d}_drawer" for d in ("top", "middle", "bottom")),
    "google_robot_place_in_closed_drawer": ("open_drawer_place",),
}
# Those that name none of ours.
ABSENT = (
    "google_robot_pick_object",
    "google_robot_place_in_closed_middle_drawer",
    "google_robot_place_in_closed_bottom_drawer",
)


def task_named(name: str) -> Task:
    """The task of that name or SIMPLER id. Raises UserError with the choices."""
    task = TASKS.get(ALIASES.get(name, name))
    if task is not None:
        return task
    if name in SEVERAL:
        choices = ", ".join(SEVERAL[name])
        raise UserError(f"task={name}: names several of SIMPLER's tasks; choose one of {choices}")
    what = "a task of SIMPLER's that is not here" if name in ABSENT else "no such task"
    raise UserError(f"task={name}: {what}; choose one of {', '.join(TASKS)}")


# Which seeds may serve what, so that no reported number was tuned on: ranges never overlap.
SEEDS = {
    "train": range(0, 100_000),
    "select": range(100_000, 200_000),
    "test": range(200_000, 2**31),
}


def check_seeds(first: int, count: int, split: str) -> None:
    """Raises UserError unless seeds first .. first + count - 1 all belong to the split."""
    allowed = SEEDS[split]
    if first not in allowed or first + count - 1 not in allowed:
        raise UserError(
            f"seed={first} with episodes={count}: {split} seeds are "
            f"{allowed.start}..{allowed.stop - 1}; choose a first seed in that range"
        )
