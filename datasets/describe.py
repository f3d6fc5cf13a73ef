"""A dataset described in YAML, so that one's own data need no code.

    data: [my_data::my_robot.yaml]

configs/robots/example_robot.yaml explains every key; what the numbers become is in pose_actions.py.
A bare name (`my_data::fractal_lerobot`) is one of the specs in configs/robots.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from selfflow.datasets.episodes import DatasetSpec
from selfflow.datasets.pose_actions import (
    FRAMES,
    KINDS,
    ROTATIONS,
    Arm,
    Gripper,
    Part,
    Plan,
    convert,
)
from selfflow.datasets.spec import ACTION_DIM, DELTA_LIMITS, EMBODIMENTS, Embodiment, UserError

SHIPPED = Path(__file__).resolve().parents[1] / "configs/robots"
HOW = "docs/your_own_data.md says how"
TOP = ("embodiment", "cameras", "instruction", "text", "state", "action", "terminate")
ROBOT = ("name", "control_hz", "tool_link", "limits")
POSE = ("position", "position_unit", "rotation", "rotation_as", "rotation_unit")
STATE = (*POSE, "gripper", "open", "closed")
ACTION = ("kind", "frame", *STATE, "relative")


def load_spec(path: str | Path) -> DatasetSpec:
    """The spec in a YAML file, or of a shipped one by its name. Raises UserError, naming the file
    and the key, for whatever is wrong in it."""
    place = Path(path).expanduser()
    if not place.exists() and not place.suffix and len(place.parts) == 1:
        names = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
        if place.name not in names:
            raise UserError(f"spec {path}: no such file, nor one of {', '.join(names)}; {HOW}")
        place = SHIPPED / f"{place.name}.yaml"
    try:
        values = yaml.safe_load(place.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"spec {path}: cannot be read ({' '.join(str(e).split())}); {HOW}") from e
    try:
        return spec_of(values)
    except UserError as e:
        raise UserError(f"spec {path}: {e}") from e


def spec_of(values: Any) -> DatasetSpec:
    """The spec that a YAML file's content says. Raises UserError naming the key."""
    _check_keys("the spec", values, TOP, ("embodiment", "cameras"))
    cameras = _mapping(values, "cameras")
    instruction, text = _text(values, "instruction"), _text(values, "text")
    if (instruction is None) == (text is None):
        raise UserError("give either instruction: (key of the text) or text: (one for all)")
    state, action = (_mapping(values, key) for key in ("state", "action"))
    _check_keys("state", state, STATE)
    _check_keys("action", action, ACTION)
    end = _text(values, "terminate")
    plan = Plan(
        state=_arm("state", state) if state else None,
        action=_arm("action", action) if action else None,
        kind=_choice("action.kind", action.get("kind", "delta"), KINDS),
        frame=_choice("action.frame", action.get("frame", "base"), FRAMES),
        terminate=None if end in (None, "last") else part(end),
        ends_done=end == "last",
    )
    _check_plan(plan)
    return DatasetSpec(
        embodiment=_embodiment(values["embodiment"], tuple(map(str, cameras))),
        cameras={str(name): str(key) for name, key in cameras.items()},
        instruction=instruction,
        numbers=dict.fromkeys(_keys(plan), 0),
        convert=partial(convert, plan),
        text=text or "",
    )


def needs_spec(path: str | Path, what: str, found: Mapping[str, str]) -> UserError:
    """The error of a dataset that nobody described. `found`: its keys and what each of them is."""
    listed = ", ".join(f"{key} ({kind})" for key, kind in found.items()) or "nothing"
    return UserError(
        f"data={path}: this {what} needs a spec that says what is what in it; it has {listed}. "
        f"Write one ({HOW}) and give {path}::my_robot.yaml"
    )


def part(text: str) -> Part:
    """`key`, `key[6]` or `key[0:3]`."""
    found = re.fullmatch(r"([^\[\]]+)(?:\[(\d+)(?::(\d+))?\])?", text.strip())
    if found is None:
        raise UserError(f"{text}: give a key, key[6] or key[0:3]")
    key, start, stop = found.groups()
    if start is None:
        return Part(key)
    first = int(start)
    return Part(key, first, first + 1 if stop is None else int(stop))


def _arm(where: str, values: Mapping[str, Any]) -> Arm:
    given_as = str(values.get("rotation_as", ""))
    if "rotation" in values or given_as:
        _choice(f"{where}.rotation_as", given_as, ROTATIONS)
    position, rotation = (_text(values, key) for key in ("position", "rotation"))
    unit = _number(where, values, "rotation_unit", 1.0)
    if unit != 1.0 and given_as not in ("rotvec", "rpy"):
        raise UserError(f"{where}.rotation_unit: only rotvec and rpy have a unit")
    return Arm(
        position=None if position is None else part(position),
        rotation=None if rotation is None else part(rotation),
        gripper=_gripper(where, values),
        rotation_as=given_as or "rotvec",
        position_unit=_number(where, values, "position_unit", 1.0),
        rotation_unit=unit,
    )


def _gripper(where: str, values: Mapping[str, Any]) -> Gripper | None:
    text = _text(values, "gripper")
    if text is None:
        return None
    relative = values.get("relative", False)
    if not isinstance(relative, bool):
        raise UserError(f"{where}.relative={relative}: give true or false")
    ends = [_number(where, values, key, None) for key in ("open", "closed")]
    if ends[0] == ends[1]:
        raise UserError(f"{where}: open and closed are both {ends[0]}; give the gripper's two ends")
    if relative and (ends[0] * ends[1] >= 0):
        raise UserError(f"{where}: a relative gripper's open and closed have opposite signs")
    return Gripper(part(text), ends[0], ends[1], relative)


def _check_plan(plan: Plan) -> None:
    action, state = plan.action, plan.state
    if state is not None and state.position is None:
        raise UserError("state.position: is missing; give key[0:3]")
    if action is None:
        return
    if plan.kind == "reached" and (action.position or action.rotation):
        raise UserError("action: of kind reached has no position or rotation; the state says them")
    if plan.kind != "reached" and action.position is None:
        raise UserError("action.position: is missing; give key[0:3]")
    if state is None and (plan.kind in ("target", "reached") or plan.frame == "tool"):
        raise UserError(f"action: kind {plan.kind} in frame {plan.frame} needs the state")
    if plan.kind == "target" and action.rotation and state is not None and not state.rotation:
        raise UserError(
            "state.rotation: is missing; a commanded rotation leads from the sensed one"
        )
    if plan.frame == "tool" and plan.kind != "delta":
        raise UserError("action.frame: only a delta can be in the tool's frame")


def _embodiment(value: Any, cameras: tuple[str, ...]) -> Embodiment:
    if not isinstance(value, Mapping):
        return EMBODIMENTS[_choice("embodiment", value, EMBODIMENTS)]
    _check_keys("embodiment", value, ROBOT, ("name", "control_hz"))
    limits = value.get("limits", DELTA_LIMITS)
    if not isinstance(limits, list | tuple) or len(limits) != ACTION_DIM:
        raise UserError(f"embodiment.limits: give {ACTION_DIM} numbers, one an action dimension")
    name = str(value["name"])
    if value["name"] in EMBODIMENTS:
        raise UserError(
            f"embodiment.name={value['name']}: is known; write embodiment: {value['name']}"
        )
    rate = _number("embodiment", value, "control_hz", None)
    bounds = tuple(_positive("embodiment.limits", x) for x in limits)
    tool = str(value.get("tool_link", "tool"))
    return Embodiment(name, rate, cameras, tool, bounds)


def _keys(plan: Plan) -> list[str]:
    """Keys of the numbers that a plan needs."""
    parts = [plan.terminate]
    for arm in (plan.state, plan.action):
        if arm is not None:
            parts += [arm.position, arm.rotation, arm.gripper and arm.gripper.part]
    return [one.key for one in parts if one is not None]


def _check_keys(
    where: str, values: Any, known: Collection[str], required: Collection[str] = ()
) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: give keys and values, of {', '.join(known)}; {HOW}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where}: no key {key}; {hint}")
    for key in required:
        if values.get(key) is None:
            raise UserError(f"{where}: {key} is missing; {HOW}")


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{key}: give keys and values below it; {HOW}")
    return value


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key}={value}: give a text")
    return value


def _choice(where: str, value: Any, choices: Collection[str]) -> str:
    if value not in list(choices):
        raise UserError(f"{where}={value}: choose one of {', '.join(choices)}")
    return str(value)


def _number(where: str, values: Mapping[str, Any], key: str, default: float | None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}.{key}={value}: give a number")
    return _positive(f"{where}.{key}", value) if key not in ("open", "closed") else float(value)


def _positive(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{where}={value}: give a number above 0")
    return float(value)
