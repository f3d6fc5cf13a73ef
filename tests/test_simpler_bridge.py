"""SIMPLER's WidowX scenes: parity with traces of the original, rules, placements, the expert."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfflow.datasets.rotations import canonical, compose, from_axis_angle
from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs.bridge_expert import MAX_MOVE, MAX_TURN, BridgeExpert
from selfflow.envs.bridge_tasks import (
    APART,
    KEEP_AWAY,
    PAIRS,
    TRIALS,
    PutOnRules,
    draw_bridge_placement,
    grid_cell,
)

SHARED = Path(__file__).parents[2] / "shared"
ORACLE = SHARED / "oracle" / "simpler"
CARROT = task_named("widowx_carrot_on_plate")
EPISODES = {0: 0, 1: 9}  # the oracle's configurations


def _oracle(name: str):
    path = ORACLE / f"widowx_carrot_{name}.npz"
    if not path.exists():
        pytest.skip(f"no oracle trace {path}")
    with np.load(path) as z:
        return {key: z[key] for key in z.files} | {"meta": json.loads(str(z["meta"]))}


def _simulator(name: str, **options):
    from selfflow.envs.simpler_bridge import SimplerBridgeScene

    return SimplerBridgeScene(task_named(name), **options)


def _replay(name: str) -> dict[str, np.ndarray]:
    """Largest differences at each step: tool, carrot, fingers (m); arm, drive targets (rad); and
    success, ours and the original's."""
    from selfflow.envs.widowx import ARM, FINGERS

    trace, simulator = _oracle(name), _simulator(CARROT.name)
    simulator.reset(grid_cell(CARROT.name, trace["meta"]["episode_id"]), np.random.default_rng(0))
    robot, order = simulator.scene.robot, list(trace["joint_names"])
    arm, fingers = [[order.index(joint) for joint in joints] for joints in (ARM, FINGERS)]
    rules = PutOnRules(CARROT)
    rules.reset(simulator.privileged())
    errors = {key: [] for key in ("tool", "arm", "fingers", "drive", "carrot", "ours", "theirs")}
    for n, action in enumerate(trace["action"]):
        sensed, after = simulator.proprio().astype(np.float64), n + 1
        turned = canonical(compose(from_axis_angle(action[3:6]), sensed[3:7]))
        reached = simulator.step(sensed[:3] + action[:3], turned, (action[6] + 1) / 2)
        assert reached != trace["ik_failed"][n]
        state = simulator.privileged()
        rules.step(state, 0)
        for key, ours, theirs in (
            ("tool", state["tool"][:3], trace["ee_pose"][after, :3]),
            ("carrot", state["source"][:3], trace["object_pose"][after, 0, :3]),
        ):
            errors[key].append(np.linalg.norm(ours - theirs))
        for key, ours, theirs in (
            ("arm", robot.arm_angles, trace["qpos"][after, arm]),
            ("fingers", robot.finger_angles, trace["qpos"][after, fingers]),
            ("drive", robot.arm_drive, trace["drive_target"][after, arm]),
        ):
            errors[key].append(np.abs(ours - theirs).max())
        errors["ours"].append(rules.success())
        errors["theirs"].append(bool(trace["success"][n]))
    simulator.close()
    return {key: np.array(values) for key, values in errors.items()}


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("config", EPISODES)
@pytest.mark.parametrize("sequence", ["smooth", "axis"])
def test_replays_the_original_without_contact(sequence: str, config: int):
    """The goals were 2 mm at the tool, 2e-3 rad median, fingers 0.02 rad (here m), 40 steps."""
    errors = _replay(f"{sequence}_{config}")
    print(
        f"{sequence}_{config}: tool {1e3 * errors['tool'].max():.3f} mm, arm median "
        f"{np.median(errors['arm']):.1e} max {errors['arm'].max():.1e} rad, fingers "
        f"{1e3 * errors['fingers'].max():.3f} mm, carrot {1e3 * errors['carrot'].max():.3f} mm"
    )
    assert len(errors["tool"]) == 40
    assert errors["tool"].max() < 2e-4
    assert np.median(errors["arm"]) < 5e-4
    assert errors["arm"].max() < 2e-3
    assert errors["drive"].max() < 5e-4
    assert errors["fingers"].max() < 1e-4
    assert errors["carrot"].max() < 1e-4


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("config", EPISODES)
def test_puts_the_carrot_on_the_plate_as_the_original(config: int):
    """Through grasp and release: the carrot within 1 cm to the end, the same success flag."""
    errors = _replay(f"contact_{config}")
    print(
        f"contact_{config}: carrot {1e3 * errors['carrot'][-1]:.1f} mm at the end, "
        f"{1e3 * errors['carrot'].max():.1f} mm at most; success from step "
        f"{errors['ours'].argmax()}, the original {errors['theirs'].argmax()}"
    )
    assert errors["carrot"].max() < 0.01
    assert errors["tool"].max() < 1e-3
    assert errors["ours"][-1]
    np.testing.assert_array_equal(errors["ours"], errors["theirs"])


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("config", EPISODES)
def test_first_frame_is_the_original_s(config: int):
    trace = _oracle(f"smooth_{config}")
    folder = ORACLE / "widowx_carrot_png"
    with Image.open(folder / f"widowx_carrot_{config}_first.png") as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    with Image.open(folder / f"widowx_carrot_{config}_firstseg.png") as image:
        ids = np.asarray(image)
    arena = next(int(k) for k, v in trace["meta"]["segmentation_ids"].items() if v == "arena")
    simulated = (ids != arena) & (ids != 0)
    simulator = _simulator(CARROT.name)
    simulator.reset(grid_cell(CARROT.name, EPISODES[config]), np.random.default_rng(0))
    difference = np.abs(simulator.render()["3rd_view_camera"].astype(int) - expected)
    print(f"frame {config}: {difference[simulated].mean():.3f} of 255 over what is simulated")
    assert difference[simulated].mean() < 0.1  # of 255; the specification asks for 1.5
    assert difference[~simulated].mean() < 0.01  # the photograph
    state = simulator.privileged()
    np.testing.assert_allclose(state["source"][:3], trace["object_pose"][0, 0, :3], atol=1e-4)
    np.testing.assert_allclose(state["target"][:3], trace["object_pose"][0, 1, :3], atol=1e-4)
    np.testing.assert_allclose(state["base"], _canonical(trace["base_pose"]), atol=1e-6)
    camera = simulator.scene.camera.get_global_pose()
    entity = _canonical(np.concatenate([camera.p, camera.q]))
    np.testing.assert_allclose(entity, _canonical(trace["camera_pose_last"]), atol=1e-5)
    info = simulator.camera_info()["3rd_view_camera"]
    np.testing.assert_allclose(info["intrinsics"], trace["camera_K"], atol=1e-4)
    simulator.close()


def _canonical(pose: np.ndarray) -> np.ndarray:
    return np.concatenate([pose[:3], canonical(pose[3:])])


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_actions_move_the_target_and_an_unreachable_one_holds_the_arm():
    simulator = _simulator(CARROT.name, image_size=(120, 160))
    simulator.reset(grid_cell(CARROT.name, 0), np.random.default_rng(0))
    start = simulator.proprio().astype(np.float64)
    for _ in range(5):  # the arm lags behind: from the sensed pose this would end far below 5 cm
        sensed = simulator.proprio().astype(np.float64)
        assert simulator.step(np.add(sensed[:3], [0.0, 0.0, 0.01]), sensed[3:7], 1.0)
    for _ in range(8):
        sensed = simulator.proprio().astype(np.float64)
        simulator.step(sensed[:3], sensed[3:7], 0.0)
    sensed = simulator.proprio().astype(np.float64)
    np.testing.assert_allclose(sensed[:3], np.add(start[:3], [0.0, 0.0, 0.05]), atol=1e-3)
    assert sensed[7] < 0.01
    assert not simulator.step(np.add(sensed[:3], [1.0, 0.0, 0.0]), sensed[3:7], 0.0)
    np.testing.assert_allclose(simulator.proprio()[:3], sensed[:3], atol=2e-3)
    simulator.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_a_reset_repeats_exactly():
    simulator = _simulator("widowx_eggplant_in_basket", image_size=(120, 160))
    frames, states = [], []
    for trial in (5, 6, 5):
        simulator.reset(grid_cell("widowx_eggplant_in_basket", trial), np.random.default_rng(0))
        sensed = simulator.proprio().astype(np.float64)
        for _ in range(3):
            simulator.step(np.add(sensed[:3], [0.01, 0.0, -0.01]), sensed[3:7], 0.0)
        frames.append(simulator.render()["3rd_view_camera"])
        states.append(simulator.privileged())
    np.testing.assert_array_equal(frames[0], frames[2])
    assert (frames[0] != frames[1]).any()
    for key, value in states[0].items():
        np.testing.assert_array_equal(value, states[2][key])
    simulator.close()


def _solved(name: str, trial: int) -> bool:
    """Whether the expert solves SIMPLER's trial, by the last step of an episode."""
    task, simulator = task_named(name), _simulator(name, image_size=(120, 160))
    env = _env(simulator, task)
    _, info = env.reset(seed=trial)
    expert = BridgeExpert(task)
    expert.reset()
    truncated = False
    while not truncated:
        action, done = expert.act(info["privileged"])
        assert not done
        *_, truncated, info = env.step(action)
    assert info["clipped"] == 0
    env.close()
    return info["success"]


def _env(simulator, task):
    from selfflow.envs.base import RobotEnv

    return RobotEnv(simulator, task, "grid")


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("name", PAIRS)
def test_the_expert_solves_a_trial(name: str):
    assert _solved(name, 9)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("name", PAIRS)
def test_the_expert_solves_every_fourth_trial(name: str):
    failed = [trial for trial in range(0, TRIALS, 4) if not _solved(name, trial)]
    print(f"{name}: failed {failed}")
    assert not failed


def test_placements_are_simpler_s_24():
    for name in PAIRS:
        cells = [grid_cell(name, trial) for trial in range(TRIALS)]
        assert len({tuple(cell.values()) for cell in cells}) == TRIALS
        assert grid_cell(name, TRIALS) == cells[0]
    carrot = grid_cell(CARROT.name, 9)  # the oracle's second configuration
    expected = [-0.235, 0.075, -np.pi / 2, -0.085, -0.075]
    np.testing.assert_allclose(list(carrot.values()), expected, atol=1e-12)
    cubes = [grid_cell("widowx_stack_cube", trial) for trial in range(TRIALS)]
    assert {round(abs(cell["source_y"]), 3) for cell in cubes[:12]} == {0.05}
    assert {round(abs(cell["source_y"]), 3) for cell in cubes[12:]} == {0.1}


@pytest.mark.parametrize("name", PAIRS)
def test_drawn_placements_keep_away_from_the_trials(name: str):
    task = TASKS[name]
    trials = [grid_cell(name, trial) for trial in range(TRIALS)]
    for seed in range(50):
        drawn = draw_bridge_placement(task, "mild", np.random.default_rng(seed), seed)
        source = np.array([drawn["source_x"], drawn["source_y"]])
        for trial in trials:
            near = np.linalg.norm(source - [trial["source_x"], trial["source_y"]])
            assert near >= KEEP_AWAY
        assert np.linalg.norm(source - [drawn["target_x"], drawn["target_y"]]) >= APART


def _state(offset, touches: float = 0.0) -> dict[str, np.ndarray]:
    """A carrot whose centre is at `offset` from the plate's."""
    target = np.array([-0.2, 0.1, 0.87])
    poses = {"target": target, "source": target + offset}
    state: dict[str, np.ndarray] = {}
    for name, place in poses.items():
        state[name] = np.array([*place, 1.0, 0.0, 0.0, 0.0])
        state[f"{name}_centre"] = place
    return state | {
        "source_grasped": np.zeros(1),
        "source_touches_other": np.array([touches]),
    }


@pytest.mark.parametrize(
    ("offset", "touches", "success"),
    [
        ((0.0, 0.0, 0.022), 0.0, True),  # lies on it: 1.9 + 0.3 cm
        ((0.0, 0.0, 0.041), 0.0, True),  # 1.9 cm above it
        ((0.0, 0.0, 0.043), 0.0, False),
        ((0.0, 0.0, -0.001), 0.0, False),
        ((0.0807, 0.0, 0.022), 0.0, True),  # half diagonal 7.78 cm + 0.3 cm
        ((0.0809, 0.0, 0.022), 0.0, False),
        ((0.0, 0.0, 0.022), 1.0, False),
    ],
)
def test_rules_of_the_carrot(offset: tuple[float, ...], touches: float, success: bool):
    rules = PutOnRules(CARROT)
    rules.reset(_state((0.15, 0.0, 0.02), 1.0))
    assert not rules.success()
    rules.step(_state(offset, touches), 0)
    assert rules.success() is success
    assert rules.progress()["moved"] == 1.0


def test_the_spoon_may_touch_the_table_and_the_eggplant_may_be_higher():
    touching = _state((0.0, 0.0, 0.018), 1.0)
    for name, height, success in (
        ("widowx_spoon_on_towel", 0.018, True),
        ("widowx_stack_cube", 0.03, False),
        ("widowx_eggplant_in_basket", 0.079, True),
        ("widowx_eggplant_in_basket", 0.081, False),
    ):
        rules = PutOnRules(task_named(name))
        rules.reset(touching)
        rules.step(_state((0.0, 0.0, height), 1.0), 0)
        assert rules.success() is success, name


def test_expert_commands_from_the_target_and_within_a_step_s_limits():
    expert = BridgeExpert(CARROT)
    expert.reset()
    state = _state((0.15, 0.0, 0.02)) | {
        "tool": np.array([-0.14, 0.03, 1.0, 0.0, np.sqrt(0.5), 0.0, -np.sqrt(0.5)]),
        "tool_target": np.array([-0.13, 0.03, 1.0, 0.0, np.sqrt(0.5), 0.0, -np.sqrt(0.5)]),
        "base": np.array([0.147, 0.028, 0.87, 0.0, 0.0, 0.0, 1.0]),
    }
    action, done = expert.act(state)
    assert not done
    assert np.linalg.norm(action[:3]) == pytest.approx(MAX_MOVE)
    assert np.linalg.norm(action[3:6]) <= MAX_TURN
    assert action[6] == 1.0
    # the base is turned by half a turn: towards the carrot at +x, -y of the target is -x, +y there
    source = np.add(state["source"][:3], [0.0, 0.0, 0.085]) - state["tool_target"][:3]
    expected = source * [-1.0, -1.0, 1.0] * MAX_MOVE / np.linalg.norm(source)
    np.testing.assert_allclose(action[:3], expected, atol=1e-9)
    with pytest.raises(UserError, match="open_top_drawer"):
        BridgeExpert(task_named("open_top_drawer"))


def test_expert_that_takes_over_keeps_the_episode_s_home():
    expert, half = BridgeExpert(CARROT), np.sqrt(0.5)
    first = _state((0.15, 0.0, 0.02)) | {
        "tool": np.array([-0.14, 0.03, 1.0, 0.0, half, 0.0, -half]),
        "tool_target": np.array([-0.13, 0.03, 1.0, 0.0, half, 0.0, -half]),
        "base": np.array([0.147, 0.028, 0.87, 0.0, 0.0, 0.0, 1.0]),
    }
    turned = first | {"tool_target": np.array([-0.1, 0.1, 0.9, 1.0, 0.0, 0.0, 0.0])}
    expert.reset(first)
    expert.act(turned)
    np.testing.assert_array_equal(expert._home, first["tool_target"][3:])
    expert.reset()
    expert.act(turned)
    np.testing.assert_array_equal(expert._home, turned["tool_target"][3:])
