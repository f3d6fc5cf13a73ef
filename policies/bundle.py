"""What a robot bundle says of its policy: spec.json for programs, MODEL_CARD.md for people."""

from dataclasses import asdict, dataclass
from typing import Any

from selfflow.datasets.spec import ACTION_NAMES, GRIPPER, PROPRIO_DIM, Embodiment
from selfflow.policies.acting import robot_of
from selfflow.policies.decoding import Decoding
from selfflow.worldmodel.checkpoint import Checkpoint

PROPRIO_NAMES = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper_opening")
PROPRIO_UNITS = ("m", "m", "m", "1", "1", "1", "1", "1")
ACTION_UNITS = ("m", "m", "m", "rad", "rad", "rad", "1")
GRIPPER_MEANING = "1 is open, 0 is closed; absolute"
OWN = asdict(Decoding())  # how a policy acts unless the rollout said otherwise
assert len(PROPRIO_NAMES) == len(PROPRIO_UNITS) == PROPRIO_DIM


@dataclass(frozen=True)
class Evaluation:
    """A rollout's summary.json, and the folder that it lies in."""

    folder: str
    summary: dict[str, Any]


def spec(given: Checkpoint) -> dict[str, Any]:
    """Observation and action by embodiment, as selfflow.datasets.spec has them."""
    robots = [robot_of(given, name) for name in given.statistics]
    return {
        "format": 1,
        "embodiments": {robot.name: embodiment_spec(given, robot) for robot in robots},
    }


def embodiment_spec(given: Checkpoint, robot: Embodiment) -> dict[str, Any]:
    """What one robot gives and takes."""
    return {
        "control_hz": robot.control_hz,
        "observation": observation_spec(given, robot),
        "action": action_spec(given, robot),
    }


def observation_spec(given: Checkpoint, robot: Embodiment) -> dict[str, Any]:
    """The three parts of an observation."""
    layout = given.config["layout"]
    used = {
        "shape": ["height", "width", 3],
        "dtype": "uint8",
        "colour": "RGB",
        "size": "any",
        "resized_to": [layout["height"], layout["width"]],
        "frames": layout["context"],
        "frame_stride_steps": layout["stride"],
        "history": "kept by the policy; give the present image only",
    }
    return {
        "images": {robot.cameras[0]: used},
        "proprio": {
            "shape": [PROPRIO_DIM],
            "dtype": "float32",
            "names": list(PROPRIO_NAMES),
            "units": list(PROPRIO_UNITS),
            "frame": robot.frame,
            "link": robot.tool_link,
            "quaternion": "wxyz, w >= 0",
            "gripper": GRIPPER_MEANING,
        },
        "instruction": {"dtype": "str", "encoder": given.config["text_encoder"]},
    }


def action_spec(given: Checkpoint, robot: Embodiment) -> dict[str, Any]:
    """The chunk that a decision returns."""
    chunk, execute = given.config["layout"]["chunk"], given.config["decision"]["execute"]
    return {
        "shape": [execute, len(ACTION_NAMES)],
        "dtype": "float32",
        "names": list(ACTION_NAMES),
        "units": list(ACTION_UNITS),
        "frame": robot.frame,
        "meaning": "position delta and axis-angle rotation delta applied to the sensed pose of "
        "the link: p + d, exp(r) q; gripper opening target",
        "link": robot.tool_link,
        "rotation": robot.rotation,
        "gripper": GRIPPER_MEANING,
        "low": [0.0 if i == GRIPPER else -high for i, high in enumerate(robot.limits)],
        "high": list(robot.limits),
        "clipped": "by whoever executes the actions",
        "predicted": chunk,
        "executed": execute,
        "terminate": {
            "shape": [execute],
            "dtype": "bool",
            "meaning": "the subtask is done before this action; the rest of the chunk is dropped",
        },
    }


def model_card(given: Checkpoint, name: str, evaluations: list[Evaluation]) -> str:
    """The card: what the policy is, what it was trained on, what it scored, what it cannot do."""
    parts = [
        f"---\nlibrary_name: selfflow\npipeline_tag: robotics\n---\n\n# {name}",
        _what(given),
        "## Use\n\n```python\nfrom selfflow.policies.load import load\n\n"
        'policy = load("path/to/this/folder")\npolicy.reset(seed=0)\n'
        "chunk = policy.act(observation)  # chunk.actions, chunk.terminate\n```\n\n"
        "`spec.json` has names, shapes, units and frames of observation and actions.",
        _training(given),
        _evaluation(evaluations),
        _limits(given, evaluations),
    ]
    return "\n\n".join(parts) + "\n"


def _what(given: Checkpoint) -> str:
    config, layout = given.config, given.config["layout"]
    count = sum(tensor.numel() for tensor in given.weights.values())
    return (
        "A language-conditioned policy: a Self-Flow backbone reads instruction, proprioception and "
        f"{layout['context']} camera frame(s); a flow-matching head samples chunks of "
        f"{layout['chunk']} actions, of which {config['decision']['execute']} are executed.\n\n"
        f"{count:,} parameters; backbone of {config['model']['depth']} blocks, width "
        f"{config['model']['hidden']}; {config['decision']['steps']} sampling steps a decision."
    )


def _training(given: Checkpoint) -> str:
    made = given.config.get("provenance", {})
    lines = [
        f"| {name} | {', '.join(of['sources'])} | {of['n']} | {of['control_hz']:g} Hz |"
        for name, of in given.statistics.items()
    ]
    table = ["| robot | data | actions | control rate |", "|---|---|---|---|", *lines]
    ran = f"```bash\n{made['command']}\n```" if "command" in made else "The command is not known."
    return (
        "## Training\n\n"
        + "\n".join(table)
        + f"\n\n{ran}\n\nData: {', '.join(made.get('data', [])) or 'not known'}. "
        + f"Step {made.get('step', 'not known')}."
    )


def _evaluation(evaluations: list[Evaluation]) -> str:
    if not evaluations:
        return "## Evaluation\n\nNone was given when this bundle was made."
    head = "| task | simulator | placement | seeds | successes | 95 % interval | as | rollouts |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for each in evaluations:
        s, (low, high) = each.summary, each.summary.get("wilson_95", (0.0, 1.0))
        seeds = f"{s.get('split', 'not known')}, from {s.get('seed', 'not known')}"
        rows.append(
            f"| {s.get('task')} | {s.get('backend')} | {s.get('placement')} | {seeds} | "
            f"{s['successes']} of {s['episodes']} | {100 * low:.1f} % to {100 * high:.1f} % | "
            f"{_decoded(s)} | `{each.folder}` |"
        )
    return "## Evaluation\n\nClosed loop, success at the last step.\n\n" + "\n".join(rows)


def _decoded(summary: dict[str, Any]) -> str:
    """How actions were sampled, where it was not as this checkpoint says."""
    given = [f"{k}={summary[k]}" for k, v in OWN.items() if summary.get(k, v) != v]
    return ", ".join(given) or "it is"


def _limits(given: Checkpoint, evaluations: list[Evaluation]) -> str:
    layout = given.config["layout"]
    robots = [robot_of(given, name) for name in given.statistics]
    seen = ", ".join(f"{r.cameras[0]} of {r.name}" for r in robots)
    lines = [
        f"It sees {seen}, resized to {layout['height']} x {layout['width']} pixels, and no other "
        "camera.",
        "Its actions are not clipped: whoever executes them keeps them within `low` and `high` of "
        "`spec.json`, as the rollouts did.",
        "It knows neither forces nor collisions: the robot's own limits must guard it.",
        f"Instructions are read by {given.config['text_encoder']}; others than those of the "
        "training data are untested.",
    ]
    backends = {str(e.summary.get("backend")) for e in evaluations}
    where = f"in simulation only ({', '.join(sorted(backends))})" if backends else "nowhere"
    lines.append(f"It was evaluated {where}; nothing here says how it does on a real robot.")
    if any(e.summary.get("split") == "select" for e in evaluations):
        lines.append("Selection seeds chose the checkpoint, so that their score is too high.")
    codec = layout.get("codec", {})
    if codec.get("kind", "patch") != "patch":
        lines.append(f"The {codec['kind']} weights of {codec['path']} are needed and not in here.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
