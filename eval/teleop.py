"""python eval/teleop.py task=open_drawer_place out=data/my_teleop

Drive the robot yourself, by the keyboard of a terminal, a gamepad or a SpaceMouse, and record
demonstrations into an episode store like eval/record_demos.py's: the same record, the same header,
and the store is continued. The picture is in your browser. Ctrl-C loses at most the episode in
progress. Rehearsal for teleoperating a real robot: docs/teleop.md.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from selfflow.configs.entry import compose, launch, one_of
from selfflow.datasets.spec import (
    GRIPPER,
    OPENING,
    POSITION,
    ROTATION,
    SEEDS,
    Embodiment,
    Observation,
    UserError,
)
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreWriter
from selfflow.envs.base import RobotEnv
from selfflow.envs.twin_look import Look
from selfflow.eval import devices, record_demos
from selfflow.eval.devices import DEVICES, Device, Input, open_device
from selfflow.eval.parts import TWIN_ONLY
from selfflow.eval.video import captioned
from selfflow.eval.viewers import Camera, Window, check_live, has_display
from selfflow.eval.web_view import WebView

SHARD = "teleop"  # of the store; recorded demonstrations have 000, 001, ...
VIEWS = ("web", "window", "none")
GRIPPER_STEPS = 4  # that the gripper needs to open or shut, during which time goes on
POLL = 0.02  # s between looks at the device while nothing is pressed


@dataclass(frozen=True)
class TeleopConfig:
    """Every key of configs/teleop.yaml, which explains them."""

    task: str
    backend: str
    placement: str | None
    image_size: list[int] | None
    randomise: str
    handles: str
    robot: str
    photo: bool
    look: Look
    seed: int
    episodes: int | None
    device: str
    keys: str
    move: float
    turn: float
    wait: bool
    speed: float
    keep_failures: bool
    view: str
    port: int
    size: list[int] | None
    out: str

    def recorder(self) -> record_demos.RecordConfig:
        """The same, as the recorder of demonstrations has it. Raises UserError."""
        same = ("task", "backend", "placement", "image_size", "seed", "out", *TWIN_ONLY)
        given = {key: getattr(self, key) for key in same}
        return replace(compose(record_demos.RecordConfig, "record", ["episodes=1"]), **given)


def check(config: TeleopConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    record_demos.check(config.recorder())
    one_of("device", config.device, DEVICES)
    one_of("view", config.view, VIEWS)
    if config.device == "script":
        devices.script_steps(config.keys)
    elif config.keys:
        raise UserError(f"keys={config.keys}: only with device=script; choose that")
    for key, low, high in (("move", 0.0, 1.0), ("turn", 0.0, 1.5), ("speed", 0.0, 100.0)):
        if not low <= getattr(config, key) <= high:
            raise UserError(f"{key}={getattr(config, key)}: must be between {low} and {high}")
    if config.episodes is not None and config.episodes < 1:
        raise UserError(f"episodes={config.episodes}: must be 1 or more, or null")
    check_live(config.port, config.size)
    if config.view == "window" and (config.backend != "mujoco" or not has_display()):
        raise UserError("view=window: needs backend=mujoco and a display; choose view=web")
    if config.device == "script" and not config.keys.split():
        raise UserError('device=script: give keys="w*5 f+a*3 space t enter"')


class Pilot:
    """Turns what a device says into actions; remembers where the gripper is to be."""

    def __init__(self, robot: Embodiment, move: float, turn: float, opening: float) -> None:
        """`opening` is the sensed one: the gripper stays as it is until it is told."""
        self._robot, self._scale = robot, np.repeat([move, turn], 3)
        self.opening, self._closing = float(round(opening)), 0

    def action(self, wanted: Input, still: bool) -> Float[np.ndarray, "7"] | None:
        """The action of one control step; where nothing is to be done, one without motion if
        `still`, else None."""
        if wanted.toggle:
            self.opening, self._closing = 1 - self.opening, GRIPPER_STEPS
        if not (wanted.moves or self._closing or still):
            return None
        self._closing = max(0, self._closing - 1)
        action = np.zeros(7)
        scaled = wanted.motion * self._scale
        action[POSITION], action[ROTATION] = scaled[:3], scaled[3:]
        action[GRIPPER] = self.opening
        return self._robot.clip(action)[0]


@dataclass
class Take:
    """An episode while it is recorded: N observations, N - 1 actions."""

    env: RobotEnv
    told: str  # the present instruction
    seen: list[Observation]
    infos: list[dict[str, Any]]
    actions: list[np.ndarray] = field(default_factory=list)
    terminate: list[bool] = field(default_factory=list)  # before each action, and at the end
    done: bool = False  # the subtask, before the next action
    advanced: int = 0  # subtasks that the operator ended
    truncated: bool = False
    note: str = ""  # what the operator is to know

    @classmethod
    def start(cls, env: RobotEnv, seed: int) -> "Take":
        """Resets the scene."""
        observation, info = env.reset(seed=seed)
        return cls(env, observation["instruction"], [observation], [info])

    def step(self, action: np.ndarray) -> None:
        """Acts, and notes what comes of it."""
        observation, _, _, self.truncated, info = self.env.step(action)
        self.actions.append(action)
        self.terminate.append(self.done)
        self.seen.append(observation)
        self.infos.append(info)
        self.told, self.done = observation["instruction"], False
        self.note = "  STEP LIMIT: enter or backspace" * self.truncated

    def next_subtask(self) -> None:
        """The operator says that the subtask is done; the next action belongs to the next one."""
        if not self.done:
            self.told = self.env.advance_subtask()["instruction"]
            self.done, self.advanced = True, self.advanced + 1

    def record(self, last: bool, **meta: Any) -> EpisodeRecord:
        """As the recorder of demonstrations has it; what was executed is the label. `last` says
        that the last subtask was called done; `meta` is noted with the episode."""
        begin, end = self.infos[0], self.infos[-1]
        actions = np.stack(self.actions).astype(np.float32)
        states = [info["privileged"] for info in self.infos]
        return EpisodeRecord(
            images={k: [o["images"][k] for o in self.seen] for k in self.env.embodiment.cameras},
            proprio=np.stack([o["proprio"] for o in self.seen]),
            actions=actions,
            executed=actions,
            terminate=np.array([*self.terminate, self.done or last]),
            instruction=[o["instruction"] for o in self.seen],
            seed=begin["seed"],
            success=bool(end["success"]),
            privileged={k: np.stack([s[k] for s in states]) for k in states[0]},
            draws=begin["draws"],
            meta={
                "progress": end["progress"],
                "ik_failed": end["ik_failed"],
                "forced": self.env.subtask > self.advanced,
            }
            | meta,
        )


Show = Callable[[Take, Pilot], None]


def drive(
    env: RobotEnv, device: Device, seed: int, config: TeleopConfig, show: Show
) -> tuple[str, EpisodeRecord | None]:
    """One episode by the operator: how it was ended (KEEP, DISCARD or QUIT) and what was recorded,
    None before the first action. At the step limit it waits to be kept or discarded."""
    take = Take.start(env, seed)
    opening = float(take.seen[0]["proprio"][OPENING])
    pilot = Pilot(env.embodiment, config.move, config.turn, opening)
    period = 1 / (env.embodiment.control_hz * config.speed) if config.speed else 0.0
    began = due = time.monotonic()
    show(take, pilot)
    while True:
        wanted = device.read()
        if end := ending(take, wanted, config.keep_failures):
            last = devices.DONE in wanted.commands and env.final_subtask and not take.done
            spent = round(time.monotonic() - began, 1)  # s that the operator took
            said = {"device": config.device, "seconds": spent}
            said |= record_demos.options_meta(config.recorder())
            return end, take.record(last, **said) if take.actions else None
        if wanted.commands:
            show(take, pilot)
        action = None if take.truncated else pilot.action(wanted, still=not config.wait)
        if action is None:
            time.sleep(POLL if period else 0)
            due = time.monotonic()
            continue
        take.step(action)
        show(take, pilot)
        due = max(due + period, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else 0)


def ending(take: Take, wanted: Input, keep_failures: bool) -> str:
    """Follows the operator's commands; KEEP, DISCARD or QUIT where one ends the episode."""
    asked = wanted.commands
    if devices.HELP in asked:
        print(f"\n{devices.KEY_HELP}", flush=True)
    for end in (devices.QUIT, devices.DISCARD):
        if end in asked:
            return end
    finishes = devices.KEEP in asked
    if devices.DONE in asked:
        if take.env.final_subtask and not take.done:
            finishes = True
        else:
            take.next_subtask()
    if finishes and not (take.infos[-1]["success"] or keep_failures):
        take.note = "  no success yet: go on, or discard it"
        return ""
    return devices.KEEP if finishes else ""


def status(take: Take, pilot: Pilot) -> str:
    """The line that the operator sees."""
    info, task = take.infos[-1], take.env.task
    measures = "  ".join(f"{k} {v:.2f}" for k, v in info["progress"].items())
    return (
        f"seed {take.infos[0]['seed']}  step {len(take.actions)}/{task.max_steps}  gripper "
        f"{'open' if pilot.opening else 'shut'}  {measures}"
        f"{'  SUCCESS' if info['success'] else ''}{take.note}"
    )


@contextmanager
def shown(config: TeleopConfig, env: RobotEnv, page: WebView | None) -> Iterator[Show]:
    """The live picture and the status line, as a function to call after every step."""
    size = (config.size[0], config.size[1]) if config.size else None
    camera = Camera(env, size)
    window = Window(env) if config.view == "window" else None
    terminal = sys.stdout.isatty()

    def show(take: Take, pilot: Pilot) -> None:
        line, success = status(take, pilot), bool(take.infos[-1]["success"])
        if terminal:
            print(f"\r\x1b[K{line}"[:200], end="", flush=True)
        if page:
            text = f"{take.told}   [gripper {'open' if pilot.opening else 'shut'}]{take.note}"
            image = camera.picture(take.seen[-1])
            page.show(captioned(image, text, len(take.actions), success))
        if window:
            window.show()

    try:
        yield show
    finally:
        if terminal:
            print()
        camera.close()
        if window:
            window.close()


def record_all(
    config: TeleopConfig, env: RobotEnv, device: Device, writer: StoreWriter, show: Show
) -> None:
    """Episodes until the operator quits or `episodes` are kept; says what becomes of each."""
    seen, kept = EpisodeStore(config.out).seeds(), 0
    for seed in range(config.seed, SEEDS["train"].stop):
        if seed in seen:
            continue
        end, record = drive(env, device, seed, config, show)
        if end == devices.QUIT:
            if record is not None:
                print(f"\nseed {seed}: left after {len(record.actions)} steps, not kept")
            return
        wrong = "discarded by the operator" if end == devices.DISCARD else ""
        wrong = wrong or ("no action" if record is None else record_demos.fault(record))
        if record is None or end == devices.DISCARD or (wrong and not config.keep_failures):
            writer.note_failure(seed, wrong)
            print(f"\nseed {seed}: not kept, {wrong}", flush=True)
            continue
        writer.append(record)
        kept += 1
        print(f"\nseed {seed}: kept, {len(record.actions)} steps {wrong}".rstrip(), flush=True)
        if kept == config.episodes:
            return


def main(config: TeleopConfig) -> None:
    """Opens device, picture and simulator, records, and says what the store holds."""
    recorder = config.recorder()
    header = record_demos.header_of(recorder)
    try:
        with ExitStack() as held:
            page = WebView(config.port, devices.KEY_HELP) if config.view == "web" else None
            if page:
                held.callback(page.close)
            device = open_device(config.device, config.keys, page.take_keys if page else list)
            held.callback(device.close)
            env = record_demos.make_recorded(recorder)
            held.callback(env.close)
            show = held.enter_context(shown(config, env, page))
            writer = held.enter_context(StoreWriter(config.out, SHARD, header))
            record_demos.tell_mixture(recorder)
            print(devices.KEY_HELP)
            if page:
                print(f"picture: {page.url}  (keys work there too)", flush=True)
            record_all(config, env, device, writer, show)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {config.out}")
        raise
    store = EpisodeStore(config.out)
    print(
        f"{len(store)} episodes in {config.out}, {len(store.failures)} attempts not kept, "
        f"{store.skipped} unreadable; look at one: python eval/play.py source={config.out}"
    )


if __name__ == "__main__":
    launch(TeleopConfig, main, "teleop", check=check)
