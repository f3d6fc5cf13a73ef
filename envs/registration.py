"""Every task as a gymnasium environment by its id; importing this module registers them.

    gymnasium.make("selfflow.envs.registration:selfflow/Simpler-OpenTopDrawer-v0")   # imports it

| id | simulator | options (keywords of `make`) |
|---|---|---|
| `selfflow/Twin-<Task>-v0` | the MuJoCo twin | those of envs/twin.py |
| `selfflow/Simpler-<Task>-v0` | SIMPLER's scene on SAPIEN 3 | those of envs/simpler.py |

gymnasium 1 has no plug-ins: the part before the colon, or an import of this module, registers them.
`<Task>` is the name in selfflow.datasets.spec, in capitals: open_top_drawer is OpenTopDrawer. The
simulator is imported where an environment is made. No step limit is added: `RobotEnv` truncates.

Several processes: `gymnasium.vector.AsyncVectorEnv([make, make])`. Where this process draws itself,
give it `context="spawn"`: a fork cannot use the renderer, and says so.
"""

import gymnasium

from selfflow.datasets.spec import TASKS, task_named
from selfflow.envs.base import RobotEnv
from selfflow.envs.tasks import FILES, RULES


def make_twin_env(*, task: str, placement: str = "mild", **options: object) -> RobotEnv:
    """The task in the MuJoCo twin; options as envs.twin.make_mujoco. Raises UserError."""
    from selfflow.envs.twin import make_mujoco

    return make_mujoco(task_named(task), placement, **options)  # type: ignore[arg-type]


def make_simpler_env(*, task: str, placement: str = "mild", **options: object) -> RobotEnv:
    """The task in SIMPLER's scene; options as envs.simpler.make_simpler. Raises UserError."""
    from selfflow.envs.simpler import make_simpler

    return make_simpler(task_named(task), placement, **options)  # type: ignore[arg-type]


MAKERS = {
    "Twin": (make_twin_env, FILES),
    "Simpler": (make_simpler_env, RULES),
}


def env_id(simulator: str, task: str) -> str:
    """selfflow/Twin-OpenTopDrawer-v0 of ("Twin", "open_top_drawer")."""
    return f"selfflow/{simulator}-{task.title().replace('_', '')}-v0"


def register_all() -> list[str]:
    """Registers every task that a simulator has, if it is not registered yet; returns all ids."""
    ids = []
    for simulator, (maker, rules) in MAKERS.items():
        for task in (name for name in TASKS if name in rules):
            ids.append(env_id(simulator, task))
            if ids[-1] not in gymnasium.registry:
                entry = f"{__name__}:{maker.__name__}"
                gymnasium.register(ids[-1], entry, kwargs={"task": task})
    return ids


IDS = register_all()
