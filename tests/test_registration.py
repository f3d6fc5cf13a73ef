"""gymnasium's ids: registered by import, made by name, whole by gymnasium's own checks."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector.utils import (
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)

from selfflow.datasets.spec import TASKS, UserError
from selfflow.envs import registration, sapien_render, simpler_assets, twin_render
from selfflow.envs.base import RobotEnv
from selfflow.envs.instruction_space import Instruction
from selfflow.envs.tasks import FILES, RULES

SHARED = Path(__file__).parents[2] / "shared" / "simpler_assets"
PREFIX = "selfflow.envs.registration:"


def checked(env: gymnasium.Env) -> None:
    """gymnasium's own checks; physical units have no bounds and are not within [-1, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|normalized space).*")
        check_env(env.unwrapped, skip_render_check=True)


def test_every_task_of_a_simulator_has_an_id():
    assert set(registration.IDS) <= gymnasium.registry.keys()
    twin = {registration.env_id("Twin", task) for task in FILES}
    simpler = {registration.env_id("Simpler", task) for task in TASKS if task in RULES}
    assert set(registration.IDS) == twin | simpler
    assert "selfflow/Twin-OpenDrawerPlace-v0" in twin
    assert "selfflow/Simpler-OpenTopDrawer-v0" in simpler
    assert registration.register_all() == registration.IDS  # again: no warning, nothing twice


def test_gymnasium_imports_the_module_named_before_the_id():
    code = f"import gymnasium; gymnasium.make('{PREFIX}selfflow/Simpler-OpenTopDrawer-v0')"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"SIMPLER_ASSETS": "/nowhere"},
    )
    # it came as far as the scene's own first question
    assert "UserError: no SIMPLER assets at /nowhere" in found.stderr.splitlines()[-1]


def test_the_twin_is_made_by_id_and_passes_gymnasium_s_checks():
    env = gymnasium.make(f"{PREFIX}selfflow/Twin-CloseTopDrawer-v0", placement="grid")
    robot = env.unwrapped
    assert isinstance(robot, RobotEnv)
    assert (robot.task.name, robot.placement) == ("close_top_drawer", "grid")
    observation, info = env.reset(seed=3)
    assert observation["instruction"] == "close top drawer"
    assert info["backend"] == "mujoco"
    checked(env)
    env.close()


def test_simpler_without_its_files_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLER_ASSETS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no SIMPLER assets"):
        gymnasium.make("selfflow/Simpler-OpenTopDrawer-v0")


def test_instructions_are_read_from_shared_memory_when_looked_at():
    """gymnasium's own texts are those of the moment at which the memory was made."""
    space = Instruction()
    memory = create_shared_memory(space, n=2)
    texts = read_from_shared_memory(space, memory, n=2)
    for first in ("open top drawer", "place apple into top drawer (2), please!"):
        write_to_shared_memory(space, 0, first, memory)
        write_to_shared_memory(space, 1, "move 7up can near apple", memory)
        assert tuple(texts) == deepcopy(texts) == (first, "move 7up can near apple")
        assert isinstance(deepcopy(texts), tuple)


def drawn_in_a_fork(report: "multiprocessing.Queue[str]") -> None:
    """Puts what the twin says in a fork of a process that has drawn."""
    try:
        gymnasium.make("selfflow/Twin-OpenTopDrawer-v0").reset()
        report.put("drawn")
    except UserError as e:
        report.put(str(e))


def test_a_fork_that_cannot_draw_says_so(monkeypatch):
    """The parent's process number stands for a parent that has drawn with OpenGL."""
    monkeypatch.setattr(twin_render, "OPENED_BY", {os.getpid()})
    context = multiprocessing.get_context("fork")
    report = context.Queue()
    process = context.Process(target=drawn_in_a_fork, args=(report,))
    process.start()
    assert "forked after its parent had drawn with OpenGL" in report.get(timeout=60)
    process.join()


@pytest.mark.slow
def test_two_processes_of_the_twin_give_what_one_does():
    def make() -> gymnasium.Env:
        return gymnasium.make(f"{PREFIX}selfflow/Twin-OpenTopDrawer-v0")

    actions = np.array([[0.02, 0, 0, 0, 0, 0, 1], [0, 0.02, 0, 0, 0, 0, 0]], np.float32)
    vector = gymnasium.vector.AsyncVectorEnv([make, make], context="spawn")
    try:
        vector.reset(seed=[5, 6])
        for _ in range(2):
            observation, *_ = vector.step(actions)
    finally:
        vector.close()
    for i, seed in enumerate((5, 6)):
        env = make()
        env.reset(seed=seed)
        for _ in range(2):
            alone, *_ = env.step(actions[i])
        env.close()
        np.testing.assert_array_equal(observation["proprio"][i], alone["proprio"])
        assert observation["instruction"][i] == alone["instruction"]
        image = observation["images"]["overhead_camera"][i]
        np.testing.assert_array_equal(image, alone["images"]["overhead_camera"])


@pytest.mark.sim
def test_simpler_is_made_by_id_and_passes_gymnasium_s_checks(monkeypatch):
    if SHARED.is_dir():
        monkeypatch.setenv("SIMPLER_ASSETS", str(SHARED))
    try:
        simpler_assets.station_urdf()
        sapien_render.require_renderer()
    except UserError as e:
        pytest.skip(f"no SIMPLER scene here: {e}")
    name = f"{PREFIX}selfflow/Simpler-OpenTopDrawer-v0"
    env = gymnasium.make(name, placement="grid", image_size=(128, 160), urdf_version="none")
    checked(env)
    env.close()
