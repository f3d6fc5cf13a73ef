"""python eval/play.py task=open_drawer_place        (the scripted expert, in a window or as an mp4)

Shows one episode. A recorded one, in a browser (pip install 'selfflow[web]'), and a policy's:

    python eval/play.py source=data/my_teleop episode=3 web=true
    python eval/play.py source=checkpoint task=open_top_drawer

With a display it runs in MuJoCo's viewer, else it becomes `out`/episode.mp4. What was recorded in
the twin is acted again, from its seed and actions; other recordings are shown by their pictures.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfflow.configs.entry import compose, launch
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import SEEDS, Observation, UserError
from selfflow.datasets.store import EpisodeRecord, EpisodeStore
from selfflow.envs.base import RobotEnv
from selfflow.envs.tasks import config_with
from selfflow.envs.twin_look import Look
from selfflow.eval import parts
from selfflow.eval.parts import POLICIES, TWIN_ONLY, RolloutConfig, from_noted
from selfflow.eval.results import check_writable
from selfflow.eval.rollout import Info, run_episode
from selfflow.eval.video import Film, captioned
from selfflow.eval.viewers import Camera, Window, check_live, has_display, model_of
from selfflow.eval.web_scene import Moment, check_viser, web_scene

Add = Callable[[Moment], None]
Record = Callable[[Observation, Info, int], None]
SAME = 0.005  # m; a replay that differs by more is told


@dataclass(frozen=True)
class PlayConfig:
    """Every key of configs/play.yaml, which explains them."""

    source: str
    task: str
    backend: str
    placement: str
    randomise: str
    handles: str
    robot: str
    photo: bool
    look: Look
    seed: int
    checkpoint: str | None
    episode: int
    frames: bool
    web: bool
    port: int
    mp4: bool
    speed: float
    size: list[int] | None
    out: str

    @property
    def recorded(self) -> bool:
        """Whether `source` names recorded episodes."""
        return self.source not in POLICIES

    def rollout(self, **other: Any) -> RolloutConfig:
        """The episode as a rollout. Raises UserError."""
        split = next((name for name, seeds in SEEDS.items() if self.seed in seeds), "train")
        same = ("task", "backend", "placement", "seed", "checkpoint", *TWIN_ONLY)
        keys = {key: getattr(self, key) for key in same}
        keys |= {"policy": self.source, "split": split} | other
        return replace(compose(RolloutConfig, "rollout", ["episodes=1"]), **keys)


def check(config: PlayConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    if config.recorded:
        _episodes(config)
    else:
        parts.check(config.rollout())
    if config.web:
        check_viser()
    else:
        check_writable(Path(config.out))
    if not 0.01 <= config.speed <= 100:
        raise UserError(f"speed={config.speed}: must be between 0.01 and 100")
    check_live(config.port, config.size)


def _episodes(config: PlayConfig) -> EpisodeSource:
    known = ", ".join(POLICIES)
    if not Path(config.source).expanduser().exists() and not set("/:?") & set(config.source):
        raise UserError(f"source={config.source}: choose {known}, or a path to recorded episodes")
    try:
        source = open_source(config.source)
    except UserError as e:
        raise UserError(str(e).replace("data=", "source=", 1)) from e
    if not 0 <= config.episode < len(source):
        raise UserError(
            f"episode={config.episode}: {config.source} has {len(source)}; "
            f"choose 0..{len(source) - 1}"
        )
    return source


def act(env: RobotEnv, config: PlayConfig, record: Record) -> str:
    """The policy's episode; what came of it."""
    policy = parts.make_policy(config.rollout(), env)
    episode = run_episode(env, policy, config.seed, record)
    outcome = "success" if episode.success else "failure"
    return f"{outcome} after {episode.steps} steps ({episode.reason})"


def replay(env: RobotEnv, episode: EpisodeRecord, record: Record) -> str:
    """What was recorded, acted again; how far the tool was from where it was then."""
    observation, info = env.reset(seed=episode.seed)
    record(observation, info, 0)
    errors = []
    for t, action in enumerate(episode.executed):
        if episode.terminate[t] and not env.final_subtask:
            env.advance_subtask()
        observation, _, _, _, info = env.step(action)
        record(observation, info, t + 1)
        if t + 1 < len(episode.proprio):
            errors.append(np.abs(observation["proprio"] - episode.proprio[t + 1])[:3].max())
    worst, same = float(max(errors, default=0.0)), bool(info["success"]) == episode.success
    text = f"replayed {len(episode.executed)} steps, {'success' if info['success'] else 'failure'}"
    if worst > SAME or not same:
        text += (
            f"; the tool was up to {1000 * worst:.0f} mm from the recording"
            f"{'' if same else ', which ended otherwise'}: the simulator has changed since, "
            "frames=true shows what was recorded"
        )
    return text


def show_frames(source: EpisodeSource, number: int, add: Add) -> str:
    """The episode's own pictures."""
    told = source.signals(number).instruction
    success = bool(source.metadata(number).get("success", False))
    for step, text in enumerate(told):
        (image,) = source.frames(number, [step])
        add(Moment(image, text, step, success and step == len(told) - 1))
    return f"{len(told)} recorded pictures"


@contextmanager
def screen(config: PlayConfig, env: RobotEnv | None, name: str, hz: float) -> Iterator[Add]:
    """Where moments are shown: the browser, a window, or a film."""
    scene = None if env is None else model_of(env)
    if config.web:
        with web_scene(scene, name, config.port, hz) as page:
            yield page.add
    elif env is not None and scene is not None and has_display() and not config.mp4:
        yield from _in_window(Window(env), 1 / hz)
    else:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        path = out / "episode.mp4"
        with Film(path, max(1, hz)) as film:
            yield lambda m: film.add(captioned(m.image, m.instruction, m.step, m.success))
        print(f"film: {path}")


def _in_window(window: Window, period: float) -> Iterator[Add]:
    def add(moment: Moment) -> None:
        if window.closed:
            raise KeyboardInterrupt  # as Ctrl-C: the user has seen enough
        window.show()
        time.sleep(period)

    try:
        yield add
        print("the episode is over; close the window", flush=True)
        while not window.closed:
            time.sleep(0.1)
    finally:
        window.close()


def play_simulated(
    config: PlayConfig, rollout: RolloutConfig, run: Callable[..., str], changes: str = "{}"
) -> None:
    """Shows `run(env, record)` step by step; `changes` are those of the task's config, as JSON."""
    env = parts.make_env(rollout)
    env = env.with_config(config_with(env.task, json.loads(changes)))
    size = (config.size[0], config.size[1]) if config.size else None
    camera = Camera(env, size)
    try:
        env.reset(seed=rollout.seed)  # so that the page shows where things start
        with screen(config, env, camera.name, env.embodiment.control_hz * config.speed) as add:

            def record(observation: Observation, info: Info, step: int) -> None:
                add(moment(env, camera, observation, info, step))

            print(f"{rollout.spec.name}, seed {rollout.seed}: {run(env, record)}", flush=True)
    finally:
        camera.close()
        env.close()


def moment(
    env: RobotEnv, camera: Camera, observation: Observation, info: Info, step: int
) -> Moment:
    """What is to be seen of the present state."""
    from selfflow.eval.geom_meshes import poses

    scene = model_of(env)
    return Moment(
        camera.picture(observation),
        observation["instruction"],
        step,
        bool(info["success"]),
        poses(scene[1]) if scene else None,
    )


def main(config: PlayConfig) -> None:
    """Runs the policy, or replays, or shows pictures."""
    if not config.recorded:
        play_simulated(config, config.rollout(), lambda env, record: act(env, config, record))
        return
    source = _episodes(config)
    if isinstance(source, EpisodeStore) and source.header.backend == "mujoco" and not config.frames:
        episode, header = source.record(config.episode), source.header
        again = {"task": header.task, "backend": "mujoco", "placement": header.placement,
                 "seed": episode.seed, "policy": "hold", "checkpoint": None,
                 **from_noted(episode.meta)}  # fmt: skip
        rollout = config.rollout(**again)
        changes = episode.meta.get("task_config", "{}")
        play_simulated(config, rollout, lambda env, record: replay(env, episode, record), changes)
        return
    hz = float(source.metadata(config.episode).get("fps", source.embodiment.control_hz))
    with screen(config, None, source.cameras[0], hz * config.speed) as add:
        print(f"{source.name}: {show_frames(source, config.episode, add)}", flush=True)


if __name__ == "__main__":
    launch(PlayConfig, main, "play", check=check)
