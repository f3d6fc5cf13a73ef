"""What a rollout is made of: its config, and the makers of environments and policies by name."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfflow.configs.entry import one_of
from selfflow.datasets.spec import (
    SEEDS,
    ActionChunk,
    Observation,
    Task,
    UserError,
    check_seeds,
    task_named,
)
from selfflow.envs.base import RobotEnv
from selfflow.envs.bridge_tasks import BRIDGE_RULES
from selfflow.envs.gripper import GRIPPERS
from selfflow.envs.simpler import SHADERS, samples_of
from selfflow.envs.simpler_assets import URDF_VERSIONS
from selfflow.envs.simpler_expert import expert_for
from selfflow.envs.simpler_variants import MATCHED, check_variant
from selfflow.envs.tasks import DRAWER_TASKS, FILES, RULES
from selfflow.envs.twin_look import USUAL, Look
from selfflow.policies.base import Policy
from selfflow.policies.limits import Limits
from selfflow.policies.scripted import HoldStill, RandomWalk

PLACEMENTS = ("mild", "grid", "variants", "train")
SIMPLER_ONLY = ["urdf_version", "shader", "samples", "variant"]  # keys that the others have not
DECODING = ("decode", "execute", "steps", "solver", "guidance", "ensemble", "delay", "best_of")
# keys that came after some rollouts had begun
LATER = (*DECODING[3:], "decode", "max_metres", "max_radians", "low_pass", "workspace")
LATER += ("randomise", "handles", "robot", "photo", "look")
# keys that the others have not
TWIN_ONLY = {
    "randomise": "none",
    "handles": "visual",
    "robot": "primitives",
    "photo": False,
    "look": USUAL,
}
BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints" / "twin"
BUNDLED_SIMPLER = BUNDLED.with_name("simpler")


@dataclass(frozen=True)
class RolloutConfig:
    """Every key of configs/rollout.yaml, which explains them."""

    task: str
    backend: str
    placement: str
    gripper: str
    policy: str
    checkpoint: str | None
    execute: int | None
    steps: int | None
    episodes: int
    seed: int
    split: str
    workers: int
    videos: int
    out: str
    urdf_version: str = "recolor_cabinet_visual_matching_1"
    shader: str = "ibl"
    suite: str | None = None
    variant: str = MATCHED
    samples: int | None = None
    pictures: bool = True
    decode: str = "head"
    solver: str = "euler"
    guidance: float = 1.0
    ensemble: float | None = None
    delay: int = 0
    best_of: int = 1
    max_metres: float | None = None
    max_radians: float | None = None
    low_pass: float = 0.0
    workspace: list[float] | None = None
    randomise: str = "none"
    handles: str = "visual"
    robot: str = "primitives"
    photo: bool = False
    look: Look = USUAL

    @property
    def spec(self) -> Task:
        """The task. Raises UserError."""
        return task_named(self.task)

    @property
    def run(self) -> Path:
        """The checkpoint's folder: without one the bundled policy, of which SIMPLER's cabinet has
        its own."""
        if self.checkpoint:
            return Path(self.checkpoint)
        cabinet = self.backend == "simpler" and self.spec.name in DRAWER_TASKS
        return BUNDLED_SIMPLER if cabinet else BUNDLED

    @property
    def decoding(self) -> dict[str, Any]:
        """How a checkpoint acts: the fields of policies/decoding.py."""
        return {key: getattr(self, key) for key in DECODING}

    @property
    def limits(self) -> Limits:
        """The last stage before the robot. Raises UserError."""
        box = self.workspace
        rest = self.max_metres, self.max_radians, self.low_pass
        return Limits(*rest, tuple(box) if box is not None else None)

    @property
    def unused(self) -> list[str]:
        """Keys of decoding and limits that are as they were before there were such keys: left out
        of a run's identity, so that older runs go on."""
        return [key for key in LATER if getattr(self, key) == _DEFAULTS[key]]

    @property
    def seeds(self) -> range:
        """One seed an episode."""
        return range(self.seed, self.seed + self.episodes)

    def identity(self) -> dict[str, Any]:
        """What two runs must share so that one may continue the other."""
        # none changes an episode: a policy that could see pictures is refused without them
        free = ["episodes", "workers", "videos", "out", "suite", "pictures", *self.unused]
        free += [] if self.backend == "simpler" else SIMPLER_ONLY
        known = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        if self.backend == "simpler":
            known["samples"] = samples_of(self.shader, self.samples)
        known["task"] = self.spec.name
        known["checkpoint"] = self._fingerprint() if self.policy == "checkpoint" else None
        return known

    def _fingerprint(self) -> str:
        from selfflow.worldmodel.checkpoint import CheckpointError, resolve

        try:
            found = resolve(self.run)
        except CheckpointError as e:
            raise UserError(str(e)) from e
        told = found.name
        for name in ("model", "value")[: 1 if self.best_of == 1 else 2]:
            with open(found / f"{name}.safetensors", "rb") as f:
                told += f" sha256 {hashlib.file_digest(f, 'sha256').hexdigest()[:16]}"
        return told


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(RolloutConfig)}
_DEFAULTS |= {"checkpoint": None, "execute": None, "steps": None}


def check(config: RolloutConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    task = config.spec
    one_of("backend", config.backend, BACKENDS)
    have = tasks_of(config.backend)
    if task.name not in have:
        raise UserError(
            f"task={task.name}: not built yet with backend={config.backend}; "
            f"choose one of {', '.join(have)}, or backend=simpler"
        )
    one_of("placement", config.placement, PLACEMENTS)
    one_of("gripper", config.gripper, GRIPPERS)
    one_of("urdf_version", config.urdf_version, URDF_VERSIONS)
    one_of("shader", config.shader, SHADERS)
    samples_of(config.shader, config.samples)
    if config.backend == "simpler":
        check_variant(task.name, config.variant)
    elif config.variant != MATCHED:
        raise UserError(f"variant={config.variant}: only with backend=simpler; choose that")
    check_twin(config.backend, task, **twin_options(config))
    if config.gripper != "opening" and config.backend != "simpler":
        raise UserError(
            f"gripper={config.gripper}: only with backend=simpler; choose that, or gripper=opening"
        )
    one_of("policy", config.policy, POLICIES)
    if config.policy == "checkpoint" and not config.pictures:
        raise UserError("pictures=false: a checkpoint needs them; leave it out, or policy=expert")
    one_of("split", config.split, SEEDS)
    least = {"episodes": 1, "workers": 1, "videos": 0, "execute": 1, "steps": 1}
    for key, minimum in least.items():
        value = getattr(config, key)
        if value is not None and value < minimum:
            raise UserError(f"{key}={value}: must be {minimum} or more")
    _check_seeds(config)
    assert config.limits
    if config.policy == "checkpoint":
        _load(config, task.embodiment)
    elif given := [k for k in ("checkpoint", *DECODING) if getattr(config, k) != _DEFAULTS[k]]:
        raise UserError(f"{given[0]}={getattr(config, given[0])}: only with policy=checkpoint")


def tasks_of(backend: str) -> tuple[str, ...]:
    """Names of the tasks that the simulator has: the twin has the Google robot's, the fake stands
    at the cabinet, and ManiSkill has the WidowX only."""
    if backend == "mujoco":
        return tuple(FILES)
    if backend == "maniskill":
        return tuple(BRIDGE_RULES)
    return tuple(RULES if backend == "simpler" else DRAWER_TASKS)


def check_twin(backend: str, task: Task, randomise: str = "none", **options: Any) -> None:
    """Raises UserError for what the twin cannot be, and for its keys with another simulator."""
    if backend == "mujoco":
        from selfflow.envs.twin import check_options

        options.pop("look", None)  # it has checked itself
        return check_options(task, randomise, **options)
    for key, value in {"randomise": randomise, **options}.items():
        if value != TWIN_ONLY[key]:
            if isinstance(value, Look):
                given = dataclasses.asdict(value).items()
                key, value = next((f"look.{k}", v) for k, v in given if v != getattr(USUAL, k))
            shown = str(value).lower() if isinstance(value, bool) else value
            raise UserError(f"{key}={shown}: only with backend=mujoco; leave it out")


def twin_options(config: Any) -> dict[str, Any]:
    """The TWIN_ONLY keys of any config that has them."""
    return {key: getattr(config, key) for key in TWIN_ONLY}


def noted(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the twin as single values, to be kept with an episode: room, shadows and samples
    in the place of look."""
    rest = {key: value for key, value in options.items() if key != "look"}
    return rest | dataclasses.asdict(options["look"])


def from_noted(meta: dict[str, Any]) -> dict[str, Any]:
    """The options that `noted` has written among others; what was not noted is as it was before
    there was such a key."""
    look = {f.name: meta[f.name] for f in dataclasses.fields(Look) if f.name in meta}
    return {key: meta.get(key, usual) for key, usual in TWIN_ONLY.items()} | {"look": Look(**look)}


def make_env(config: RolloutConfig) -> RobotEnv:
    """The task in the config's simulator."""
    own = {"simpler": ("gripper", *SIMPLER_ONLY), "mujoco": tuple(TWIN_ONLY)}
    names = own.get(config.backend, ())
    options = {name: getattr(config, name) for name in names}
    return BACKENDS[config.backend](
        config.spec, config.placement, pictures=config.pictures, **options
    )


def make_policy(config: RolloutConfig, env: RobotEnv) -> Policy:
    """The config's policy. Only the scripted expert looks into the environment."""
    return POLICIES[config.policy](config, env)


class Expert:
    """The scripted expert as a policy. It sees the simulator's state and not the observation: its
    score is a ceiling, not a competitor."""

    def __init__(self, env: RobotEnv) -> None:
        self.embodiment = env.embodiment.name
        self._env, self._expert = env, expert_for(env.task)

    def reset(self, seed: int | None = None) -> None:
        """Starts its plan anew; it draws nothing at random."""
        self._expert.reset()

    def act(self, observation: Observation) -> ActionChunk:
        """One action, and whether the subtask is done before it; the last never is."""
        action, done = self._expert.act(self._env.simulator.privileged())
        return ActionChunk(action[None], np.array([done and not self._env.final_subtask]))


# Simulators and the model are imported where they are asked for: sapien is an extra, and torch
# takes seconds to load.


def _mujoco(task: Task, placement: str, **options: Any) -> RobotEnv:
    from selfflow.envs.twin import make_mujoco

    return make_mujoco(task, placement, **options)


def _simpler(task: Task, placement: str, **options: Any) -> RobotEnv:
    try:
        from selfflow.envs.simpler import make_simpler
    except ModuleNotFoundError as e:
        if e.name != "sapien":
            raise
        raise UserError("backend=simpler: SAPIEN is not installed; run make simpler-setup") from e
    return make_simpler(task, placement, **options)


def _maniskill(task: Task, placement: str, pictures: bool = True) -> RobotEnv:
    from selfflow.envs.maniskill import make_maniskill

    return make_maniskill(task, placement, pictures)


def _fake(task: Task, placement: str, pictures: bool = True) -> RobotEnv:
    from selfflow.envs.fake import make_fake

    return make_fake(task, placement, pictures)


def _checkpoint(config: RolloutConfig, env: RobotEnv) -> Policy:
    return _load(config, env.embodiment.name)


def _load(config: RolloutConfig, embodiment: str) -> Policy:
    if not config.run.is_dir():
        raise UserError(
            f"checkpoint={config.run}: no such folder; give a run's folder, or policy=expert"
        )
    from selfflow.policies.flow_policy import load_policy

    return load_policy(config.run, embodiment, **config.decoding)


def _expert(config: RolloutConfig, env: RobotEnv) -> Policy:
    return Expert(env)


def _hold(config: RolloutConfig, env: RobotEnv) -> Policy:
    return HoldStill(env.embodiment.name)


def _random(config: RolloutConfig, env: RobotEnv) -> Policy:
    return RandomWalk(env.embodiment.name)


BACKENDS: dict[str, Callable[..., RobotEnv]] = {
    "mujoco": _mujoco,
    "simpler": _simpler,
    "maniskill": _maniskill,
    "fake": _fake,
}
POLICIES: dict[str, Callable[[RolloutConfig, RobotEnv], Policy]] = {
    "checkpoint": _checkpoint,
    "expert": _expert,
    "hold": _hold,
    "random": _random,
}


def _check_seeds(config: RolloutConfig) -> None:
    try:
        check_seeds(config.seed, config.episodes, config.split)
    except UserError as e:
        for split, allowed in SEEDS.items():
            if config.seeds[0] in allowed and config.seeds[-1] in allowed:
                raise UserError(f"{e}, or give split={split}") from e
        raise
