"""The Google robot's table scenes: parity with the original, rules, placements, experts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfflow.datasets.rotations import canonical, compose, from_axis_angle, rotate
from selfflow.datasets.spec import task_named
from selfflow.envs.gripper import StickyGripper
from selfflow.envs.placements import KEEP_AWAY
from selfflow.envs.simpler import make_simpler
from selfflow.envs.simpler_expert import expert_for
from selfflow.envs.task_move_near import CELLS
from selfflow.envs.tasks import TABLE_TASKS, draw_placement, instruction, objects, rules_of

SHARED = Path(__file__).parents[2] / "shared"
ORACLE = SHARED / "oracle" / "simpler"
STANDING = "pick_standing_coke_can"


def _oracle(name: str) -> dict[str, Any]:
    path = ORACLE / f"coke_upright_{name}.npz"
    if not path.exists():
        pytest.skip(f"no oracle trace {path}")
    with np.load(path) as z:
        return {key: z[key] for key in z.files} | {"meta": json.loads(str(z["meta"]))}


def _start(trace: dict[str, Any]) -> Any:
    """The simulator at the trace's start."""
    simulator: Any = make_simpler(task_named(STANDING)).simulator
    x, y = trace["meta"]["object_xy"]
    placement = draw_placement(task_named(STANDING), "grid", np.random.default_rng(0), 0)
    simulator.reset(placement | {"can_x": x, "can_y": y}, np.random.default_rng(0))
    return simulator


def _put(simulator: Any, pose: np.ndarray) -> None:
    import sapien

    simulator.scene.bodies[0].entity.set_pose(sapien.Pose(pose[:3].tolist(), pose[3:].tolist()))


def _replay(name: str) -> dict[str, np.ndarray]:
    """Differences after each step: tool, object (m); arm, fingers, drive (rad); flags differ."""
    from selfflow.envs.google_robot import ARM, FINGERS

    trace = _oracle(name)
    simulator = _start(trace)
    _put(simulator, trace["object_pose"][0, 0])
    rules = rules_of(task_named(STANDING))
    rules.reset(simulator.privileged())
    robot, order = simulator.scene.robot, list(trace["joint_names"])
    arm, fingers = [[order.index(joint) for joint in joints] for joints in (ARM, FINGERS)]
    gripper = StickyGripper()
    gripper.reset(robot.finger_angles)
    rows = []
    for n, action in enumerate(trace["action"]):
        position, quaternion = robot.tool_pose()
        drives, reached = robot.plan(
            position + action[:3],
            canonical(compose(from_axis_angle(action[3:6]), quaternion)),
            gripper.raw_goal(action[6], robot.finger_drive),
        )
        simulator.run(drives)
        state = simulator.privileged()
        rules.step(state, 0)
        can = state["objects"][0, :3]
        seen = trace["qpos"][n + 1]
        rows.append(
            {
                "tool": np.linalg.norm(state["tool"][:3] - trace["ee_pose"][n + 1, :3]),
                "object": np.linalg.norm(can - trace["object_pose"][n + 1, 0, :3]),
                "arm": np.abs(robot.arm_angles - seen[arm]).max(),
                "fingers": np.abs(robot.finger_angles - seen[fingers]).max(),
                "opening": abs(robot.finger_angles.mean() - seen[fingers].mean()),
                "drive": np.abs(robot.arm_drive - trace["drive_target"][n + 1, arm]).max(),
                "ik": float(reached == trace["ik_failed"][n]),
                "success": float(rules.success() != trace["success"][n]),
            }
        )
    simulator.close()
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("sequence", ["smooth", "axis"])
def test_replays_the_original_without_contact(sequence: str, config: int):
    """The goals were 2 mm at the tool, 2e-3 rad median, fingers 0.02 rad, over 40 steps."""
    errors = _replay(f"{sequence}_{config}")
    print({key: float(value.max()) for key, value in errors.items()}, np.median(errors["arm"]))
    assert errors["ik"].sum() == errors["success"].sum() == 0
    assert errors["tool"].max() < 5e-4
    assert np.median(errors["arm"]) < 1e-3
    assert errors["drive"].max() < 2e-3
    assert errors["opening"].max() < 0.02
    # Closed on nothing the fingers roll on each other, in the original too; 0.025 in smooth_1.
    assert errors["fingers"].max() < (0.03 if (sequence, config) == ("smooth", 1) else 0.02)
    assert errors["object"].max() < 5e-4


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("config", [0, 1])
def test_picks_the_can_as_the_original(config: int):
    """Exact up to the touch. Then the original's can tips by 35 degrees in the grip and ours does
    not; but ours is held, follows the same way and succeeds at the same step or one before."""
    errors = _replay(f"contact_{config}")
    first = int(np.argmax(_oracle(f"contact_{config}")["robot_contact"]))
    print(first, {key: float(value[:first].max()) for key, value in errors.items()})
    print({key: value[first:].round(4).tolist() for key, value in errors.items()})
    assert errors["tool"][:first].max() < 1e-3
    assert errors["arm"][:first].max() < 2e-3
    assert errors["fingers"][:first].max() < 0.02
    assert errors["tool"].max() < 0.01
    assert errors["object"].max() < 0.03
    assert errors["success"].sum() <= 1
    assert errors["success"][-1] == 0


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("config", [0, 1])
def test_first_frame_is_the_original_s(config: int):
    trace = _oracle(f"smooth_{config}")
    folder = ORACLE / "coke_upright_png"
    with Image.open(folder / f"coke_upright_{config}_first.png") as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    with Image.open(folder / f"coke_upright_{config}_firstseg.png") as image:
        ids = np.asarray(image)
    arena = next(int(k) for k, v in trace["meta"]["segmentation_ids"].items() if v == "arena")
    simulated = (ids != arena) & (ids != 0)
    simulator = _start(trace)
    settled, recorded = simulator.privileged()["objects"][0], trace["object_pose"][0, 0]
    np.testing.assert_allclose(settled[:3], recorded[:3], atol=5e-5)
    # It leans by 0.4 degrees (envs/simpler_hulls.py).
    lean = [rotate(q[3:].astype(float), np.array([0.0, 1.0, 0.0])) for q in (settled, recorded)]
    np.testing.assert_allclose(*lean, atol=1e-3)
    difference = np.abs(simulator.render()["overhead_camera"].astype(int) - expected)
    assert difference[simulated].mean() < 0.6  # of 255; the specification asks for 1.5
    assert difference[~simulated].mean() < 0.01  # the photograph
    np.testing.assert_allclose(
        simulator.camera_info()["overhead_camera"]["intrinsics"], trace["camera_K"], atol=1e-4
    )
    simulator.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize(("name", "seed"), [("pick_coke_can", 37), ("move_near", 14)])
def test_the_expert_succeeds(name: str, seed: int):
    env = make_simpler(task_named(name), "grid", image_size=(32, 40))
    _, info = env.reset(seed=seed)
    scripted = expert_for(env.task)
    scripted.reset()
    for _ in range(50):
        action, _ = scripted.act(info["privileged"])
        observation, *_, info = env.step(action)
    assert info["success"]
    assert observation["instruction"] == {37: "pick coke can", 14: "move apple near 7up can"}[seed]
    env.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_same_placement_same_start():
    simulator: Any = make_simpler(task_named("move_near"), image_size=(64, 80)).simulator
    placement = draw_placement(task_named("move_near"), "grid", np.random.default_rng(0), 3)
    states = []
    for _ in range(2):
        simulator.reset(placement, np.random.default_rng(0))
        states.append((simulator.privileged()["objects"], simulator.render()["overhead_camera"]))
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)
    assert states[0][0].shape == (3, 7)
    assert np.all(states[0][0][:, 2] > 0.89)  # on the table
    simulator.close()


# --- rules and placements, without a simulator ---------------------------------------------------


def _coke_state(height: float, grasped: float, touches: float) -> dict[str, np.ndarray]:
    return {
        "objects": np.array([[0.0, 0.0, height, 1, 0, 0, 0]]),
        "grasped": np.array([grasped]),
        "touches": np.array([touches]),
        "tool": np.zeros(7),
    }


@pytest.mark.parametrize("config", [0, 1])
def test_coke_rule_on_the_recorded_states(config: int):
    """Heights and flags as recorded give the recorded success and count of lifted steps."""
    trace = _oracle(f"contact_{config}")
    rules = rules_of(task_named("pick_coke_can"))
    heights = trace["object_pose"][:, 0, 2]
    rules.reset(_coke_state(heights[0], 0, 1))
    for n, height in enumerate(heights[1:]):
        free = trace["info_lifted_object"][n]
        rules.step(_coke_state(height, trace["info_is_grasped"][n], float(not free)), 0)
        assert rules.success() == trace["success"][n]
        assert rules.progress()["lifted_steps"] == trace["info_stat_n_lift_significant"][n]


def test_coke_rule_forgets_the_lift_with_the_grasp_but_not_five_high_steps():
    rules = rules_of(task_named("pick_coke_can"))
    rules.reset(_coke_state(0.9, 0, 1))
    for state, expected in [
        ((0.95, 1, 1), False),  # high but still touching
        ((0.95, 1, 0), True),
        ((0.95, 1, 1), True),  # brushes something on the way
        ((0.95, 0, 0), False),  # thrown
        *[((0.95, 1, 0), True)] * 3,
        ((0.90, 0, 1), True),  # put back after five high steps
    ]:
        rules.step(_coke_state(*state), 0)
        assert rules.success() == expected


def _near_state(*places: tuple[float, float, float]) -> dict[str, np.ndarray]:
    objects = np.array([[*place, 1, 0, 0, 0] for place in places])
    return {"objects": objects, "radii": np.array([0.05, 0.05, 0.05]), "tool": np.zeros(7)}


START = ((0.0, 0.0, 0.95), (0.3, 0.0, 0.95), (0.0, 0.3, 0.95))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (((0.11, 0, 0.95), START[1], START[2]), True),
        (((0.09, 0, 0.95), START[1], START[2]), False),  # 0.21 m away; 0.20 is near
        (((0.11, 0, 0.82), START[1], START[2]), True),  # fell over, still on the table
        (((0.11, 0, 0.75), START[1], START[2]), False),  # fell off
        (((0.11, 0, 0.95), START[1], (0.0, 0.3, 0.92)), False),  # knocked the other over
        (((0.11, 0, 0.95), START[1], (0.0, 0.42, 0.95)), False),  # the other moved further
        (((0.02, 0, 0.95), (0.15, 0, 0.95), START[2]), False),  # the target came instead
        (((0.15, 0.1, 0.95), START[1], (0.1, 0.21, 0.95)), False),  # the other is nearer
    ],
)
def test_move_near_rule(places: tuple[tuple[float, float, float], ...], expected: bool):
    rules = rules_of(task_named("move_near"))
    rules.reset(_near_state(*START))
    assert not rules.success()
    rules.step(_near_state(*places), 0)
    assert rules.success() == expected


def _grid(name: str, seeds: range) -> list[dict[str, float]]:
    task, rng = task_named(name), np.random.default_rng(0)
    return [draw_placement(task, "grid", rng, seed) for seed in seeds]


def test_coke_grid_is_the_paper_s():
    cells = _grid("pick_coke_can", range(75))
    assert len({tuple(cell.values()) for cell in cells}) == 75
    assert _grid("pick_coke_can", range(75, 76)) == cells[:1]
    for i, name in enumerate(("horizontal", "vertical", "standing")):
        assert _grid(f"pick_{name}_coke_can", range(25)) == cells[25 * i : 25 * i + 25]
    assert {(cell["can_x"], cell["can_y"]) for cell in cells} == {
        (x, y)
        for x in np.linspace(-0.35, -0.12, 5).tolist()
        for y in np.linspace(-0.02, 0.42, 5).tolist()
    }


def test_move_near_grid_is_the_paper_s():
    task, cells = task_named("move_near"), _grid("move_near", range(CELLS))
    assert CELLS == len({tuple(cell.values()) for cell in cells}) == 60
    assert {instruction(task, 0, cell) for cell in cells[12:24]} == {
        f"move {a} near {b}"
        for a in ("7up can", "apple", "sponge")
        for b in ("7up can", "apple", "sponge")
        if a != b
    }
    assert instruction(task, 0, cells[14]) == "move apple near 7up can"
    placed = objects(task, cells[25])
    assert [thing.model for thing in placed] == [
        "baked_opened_coke_can_v2",
        "baked_apple_v2",
        "baked_opened_redbull_can_v2",
    ]
    assert [thing.xy for thing in placed] == [(-0.33, 0.04), (-0.13, 0.19), (-0.33, 0.34)]
    assert placed[0].radius == pytest.approx(0.066 / np.sqrt(2))


@pytest.mark.parametrize("name", TABLE_TASKS)
def test_mild_placements_are_drawn_and_lie_on_the_table(name: str):
    task, rng = task_named(name), np.random.default_rng(0)
    drawn = [objects(task, draw_placement(task, "mild", rng, 1)) for _ in range(20)]
    assert len({tuple(things) for things in drawn}) == 20
    x, y = np.array([thing.xy for things in drawn for thing in things]).T
    assert x.min() > -0.4
    assert x.max() < -0.05
    assert y.min() > -0.05
    assert y.max() < 0.45
    grid = [objects(task, cell) for cell in _grid(name, range(75))]
    for things in drawn:
        cells = [cell for cell in grid if [t.model for t in cell] == [t.model for t in things]]
        off = [[np.subtract(a.xy, b.xy) for a, b in zip(things, c, strict=True)] for c in cells]
        assert np.linalg.norm(off, axis=-1).min() > KEEP_AWAY


def test_a_bottom_becomes_one_face():
    from selfflow.envs.simpler_hulls import flat_bottom

    turn = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    foot = np.column_stack([np.cos(turn), -1.0 + 0.0004 * (turn > 4), np.sin(turn)])
    body = np.vstack([foot, [[0.0, 1.0, 0.0]]])
    flat = flat_bottom(body)
    assert np.linalg.matrix_rank(flat[:8] - flat[:8].mean(axis=0), tol=1e-9) == 2
    np.testing.assert_array_equal(flat[8], body[8])
    np.testing.assert_allclose(flat[:8], body[:8], atol=5e-4)
    np.testing.assert_allclose(flat_bottom(flat), flat, atol=1e-12)


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_what_is_held_can_be_let_go():
    """A held finger's path starts as if it closed; told to open, it once never did."""
    task = task_named("pick_standing_coke_can")
    env = make_simpler(task, "grid", pictures=False)
    _, info = env.reset(seed=12)
    expert = expert_for(task)
    expert.reset()
    while not info["success"]:
        _, _, _, truncated, info = env.step(expert.act(info["privileged"])[0])
        assert not truncated
    for _ in range(4):
        observation, *_, info = env.step(np.array([0.0] * 6 + [1.0]))
    env.close()
    assert observation["proprio"][7] > 0.95
    assert not info["privileged"]["grasped"][0]
