"""The MuJoCo twin: what is observed, SIMPLER's motion, repeatability, drawing without OpenGL."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

from selfflow.datasets.rotations import compose, inverse, rotate, to_axis_angle
from selfflow.datasets.spec import GRIPPER, TASKS, UserError, task_named
from selfflow.envs import twin_scene
from selfflow.envs.base import RobotEnv
from selfflow.envs.expert import DrawerExpert, perturb
from selfflow.envs.tasks import DRAWER_TASKS
from selfflow.envs.twin import make_mujoco
from selfflow.envs.twin_render import RayRenderer, make_renderer

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "simpler"
SMALL = (32, 40)


@pytest.fixture(scope="module")
def env():
    env = make_mujoco(task_named("open_drawer_place"), image_size=SMALL)
    yield env
    env.close()


def hold(opening: float = 1.0) -> np.ndarray:
    return np.array([0.0] * 6 + [opening])


def test_observation_carries_no_privileged_state(env: RobotEnv):
    observation, info = env.reset(seed=3)
    assert set(observation) == {"images", "proprio", "instruction"}
    assert observation["images"]["overhead_camera"].shape == (*SMALL, 3)
    assert info["privileged"]["drawers"].tolist() == [0, 0, 0]
    assert info["success"] is False
    assert set(info["draws"]) >= {"robot_x", "robot_yaw", "apple_x", "apple_turn"}


def test_same_seed_same_trace(env: RobotEnv):
    def trace(look: bool = True) -> list[np.ndarray]:
        observation, _ = env.reset(seed=11)
        rng, out = np.random.default_rng(0), [observation["images"]["overhead_camera"].ravel()]
        env.pictures = look
        for _ in range(6):
            action = np.append(rng.normal(0, 0.05, 6), 0.3)
            observation, *_, info = env.step(action)
            out += [observation["proprio"], *info["privileged"].values()]
        env.pictures = True
        return [*out, env.observe()["images"]["overhead_camera"]]

    for a, b, c in zip(trace(), trace(), trace(look=False), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_action_is_a_delta_on_the_sensed_pose(env: RobotEnv):
    """A constant target is reached: every delta re-aims at it from wherever the tool is."""
    observation, _ = env.reset(seed=5)
    start = observation["proprio"].astype(float)
    target = np.add(start[:3], (0.03, -0.02, -0.04))
    for _ in range(20):
        p = observation["proprio"].astype(float)
        turn = to_axis_angle(compose(start[3:7], inverse(p[3:7])))
        observation, *_ = env.step(np.array([*(target - p[:3]), *turn, 1.0]))
    p = observation["proprio"].astype(float)
    assert np.linalg.norm(p[:3] - target) < 2e-3
    assert np.linalg.norm(to_axis_angle(compose(start[3:7], inverse(p[3:7])))) < 5e-3


def test_gripper_one_is_open(env: RobotEnv):
    observation, _ = env.reset(seed=0)
    assert observation["proprio"][-1] > 0.98
    for _ in range(8):
        observation, *_ = env.step(hold(0.0))
    assert observation["proprio"][-1] < 0.1


def test_out_of_range_is_clipped_and_counted_and_nan_is_an_error(env: RobotEnv):
    env.reset(seed=0)
    *_, info = env.step(np.array([9.0, 0, 0, 0, 0, 0, 1.0]))
    assert info["clipped"] == 1
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.zeros(6))


def test_unreachable_pose_holds_and_is_counted(env: RobotEnv):
    observation, _ = env.reset(seed=0)
    before = observation["proprio"][:3]
    observation, *_, info = env.step(np.array([1.0, 1.0, 1.0, 0, 0, 0, 1.0]))
    assert info["ik_failed"] == 1
    assert np.linalg.norm(observation["proprio"][:3] - before) < 2e-3


def test_instruction_changes_on_terminate_or_at_step_100(env: RobotEnv):
    observation, _ = env.reset(seed=0)
    assert observation["instruction"] == "open top drawer"
    assert env.advance_subtask()["instruction"] == "place apple into top drawer"
    with pytest.raises(ValueError, match="no next one"):
        env.advance_subtask()
    observation, _ = env.reset(seed=0)
    instructions = [env.step(hold())[0]["instruction"] for _ in range(101)]
    assert instructions[98] == "open top drawer"
    assert instructions[99] == "place apple into top drawer"


def test_geometry_leaves_the_gap_that_the_hook_needs():
    model = twin_scene.build(*SMALL)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    table = data.geom("table").xpos[2] - model.geom("table").size[2]
    front = data.geom("front_top").xpos[2] + model.geom("front_top").size[2]
    assert 0.100 < table - front < 0.110
    np.testing.assert_allclose(data.geom("front_top").xpos[0] + 0.0075, 0.0175, atol=1e-9)
    drawers = [model.body(f"drawer_{name}").id for name in twin_scene.DRAWER_HEIGHTS]
    steel = [
        g
        for g in np.flatnonzero(np.isin(model.geom_bodyid, drawers)).tolist()
        if np.allclose(model.geom_rgba[g], twin_scene.STEEL)
    ]
    assert len(steel) == 9
    assert not model.geom_contype[steel].any(), "handles are visual only"


def test_jacobian_is_dense():
    """MuJoCo 4.0.0 factorises sparse Hessians wrongly (its #3767)."""
    assert twin_scene.build(*SMALL).opt.jacobian == mujoco.mjtJacobian.mjJAC_DENSE


@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("sequence", ["smooth", "axis"])
def test_moves_like_simpler(env: RobotEnv, sequence: str, config: int):
    """SIMPLER's recorded actions move the twin's tool alike: within 2 cm over 40 steps."""
    file = ORACLE / f"place_apple_{sequence}_{config}.npz"
    if not file.exists():
        pytest.skip(f"no oracle trace {file}")
    trace = np.load(file)
    pose = [(0.644, -0.179, -0.03), (0.652, 0.009, 0.0)][config]
    env.reset(
        seed=0,
        options={"placement": dict(zip(("robot_x", "robot_y", "robot_yaw"), pose, strict=True))},
    )
    opening, errors = 1.0, []
    for action, pose in zip(trace["action"], trace["ee_pose"][1:], strict=True):
        opening = opening if action[GRIPPER] == 0 else float(action[GRIPPER] < 0)
        *_, info = env.step(np.array([*action[:6], opening]))
        errors.append(np.linalg.norm(info["privileged"]["tool"][:3] - pose[:3]))
    print(f"{file.stem}: tool {1e3 * max(errors):.1f} mm")
    assert info["ik_failed"] == 0
    assert max(errors) < 0.02


def test_camera_info_projects_the_tool_where_simplers_camera_is(env: RobotEnv):
    _, info = env.reset(seed=0)
    camera = info["cameras"]["overhead_camera"]
    height, width = SMALL
    np.testing.assert_allclose(camera["intrinsics"][0, 0], 425 * height / 512, rtol=1e-6)
    tool = info["privileged"]["tool"][:3] - info["privileged"]["base"][:3]
    tool = rotate(inverse(info["privileged"]["base"][3:]), tool)
    local = rotate(inverse(camera["pose"][3:]), tool - camera["pose"][:3])
    u, v, w = camera["intrinsics"] @ local
    assert w > 0
    assert v / w < height / 2
    assert u / w > width / 2, "the tool starts at the upper right of the picture"


def test_ray_renderer_draws_the_same_scene(env: RobotEnv):
    """Drawn without OpenGL the picture shows the same layout: apple and cabinet where they were."""
    env.reset(seed=0)
    scene = env.simulator
    rays = RayRenderer(scene.model, 64, 80).render(scene.data, "overhead_camera").astype(float)
    red = (rays[..., 0] > 1.8 * rays[..., 1]) & (rays[..., 0] > 1.8 * rays[..., 2])
    apple = scene.data.body("apple").xpos - scene.data.cam("overhead_camera").xpos
    x, y, z = scene.data.cam("overhead_camera").xmat.reshape(3, 3).T @ apple
    focal = 425 * 64 / 512
    column, row = 40 - 0.5 + focal * x / -z, 32 - 0.5 - focal * y / -z
    assert red.any()
    assert abs(np.nonzero(red)[0].mean() - row) < 1.5
    assert abs(np.nonzero(red)[1].mean() - column) < 1.5


def test_without_opengl_it_says_so_and_draws_rays(monkeypatch, capsys):
    monkeypatch.delenv("SELFFLOW_RENDERER", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    renderer = make_renderer(twin_scene.build(*SMALL), *SMALL)
    assert renderer.kind == "ray"
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "libegl1" in message


def test_the_renderer_can_be_chosen(monkeypatch, capsys):
    model = twin_scene.build(*SMALL)
    monkeypatch.setenv("SELFFLOW_RENDERER", "ray")
    assert make_renderer(model, *SMALL).kind == "ray"
    assert not capsys.readouterr().err
    monkeypatch.setenv("SELFFLOW_RENDERER", "glfw")
    with pytest.raises(UserError, match="egl, osmesa or ray"):
        make_renderer(model, *SMALL)


def test_a_misspelt_placement_is_refused(env: RobotEnv):
    with pytest.raises(ValueError, match="robot_x"):
        env.reset(seed=0, options={"placement": {"robo_x": 0.6}})


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWER_TASKS)
def test_expert_solves_its_task(name: str):
    task = TASKS[name]
    env, expert = make_mujoco(task, image_size=(16, 16)), DrawerExpert(task)
    for seed in (90_000, 90_001):
        _, info = env.reset(seed=seed)
        expert.reset()
        rng, truncated = np.random.default_rng(seed), False
        while not (truncated or info["success"]):
            action, done = expert.act(info["privileged"])
            if done and not env.final_subtask:
                env.advance_subtask()
            *_, truncated, info = env.step(perturb(action, rng, 0.005, 0.02))
        assert info["success"]
    env.close()
