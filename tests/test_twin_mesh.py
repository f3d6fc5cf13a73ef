"""The twin in the original robot's meshes, before SIMPLER's photograph: seen only, and in place."""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pytest

from selfflow.datasets.spec import UserError, task_named
from selfflow.envs import simpler_assets, twin_body, twin_mesh, twin_scene
from selfflow.envs.twin import make_mujoco
from selfflow.envs.twin_mesh import Fingers, Photo, Pose, carried_by, link_pose, read_urdf
from selfflow.envs.twin_render import RayRenderer, make_renderer

ASSETS = Path(__file__).parents[2] / "shared" / "simpler_assets"
SIZE = (64, 80)
HEAD = {"joint_head_pan": -0.00285961, "joint_head_tilt": 0.7851361}


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ASSETS / simpler_assets.ROBOT_FOLDER).is_dir():
        pytest.skip(f"no SIMPLER data files in {ASSETS}")
    monkeypatch.setenv("SIMPLER_ASSETS", str(ASSETS))


@pytest.fixture
def meshes(assets: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    """Conversion of each file once for all tests of this module."""
    pytest.importorskip("trimesh", reason="trimesh reads the meshes")
    cache = tmp_path_factory.getbasetemp() / "mesh_cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(twin_mesh, "TEXTURE_SIDE", 16)


@pytest.fixture(scope="module")
def plain() -> mujoco.MjModel:
    return twin_scene.build(*SIZE)


def pose_of(data: mujoco.MjData, body: str) -> Pose:
    return Pose(data.body(body).xpos, data.body(body).xquat)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_links_and_tool_are_where_the_urdf_has_them(
    assets: None, plain: mujoco.MjModel, seed: int | None
):
    """Every link that is drawn, and the tool frame, within 1 mm; also at random joint angles."""
    links, model = read_urdf(simpler_assets.robot_urdf(twin_mesh.COLOURS)), plain
    data = mujoco.MjData(model)
    arm = np.zeros(7) if seed is None else np.random.default_rng(seed).uniform(-0.8, 0.8, 7)
    data.qpos[[model.joint(n).qposadr[0] for n in twin_body.ARM_JOINTS]] = twin_body.HOME + arm
    mujoco.mj_forward(model, data)
    names = [f"joint_{n}" for n in twin_body.ARM_JOINTS]
    angles = dict(zip(names, twin_body.HOME + arm, strict=True)) | HEAD
    bodies = {model.body(b).name for b in range(model.nbody)}
    base = pose_of(data, "base")
    for name in links:
        body, place = carried_by(links, name, bodies)
        found = base.inverse() * pose_of(data, body) * place
        np.testing.assert_allclose(found.p, link_pose(links, name, angles).p, atol=1e-3)
    tool = base.inverse() * Pose(data.site("tcp").xpos, np.array([1.0, 0, 0, 0]))
    np.testing.assert_allclose(tool.p, link_pose(links, "link_gripper_tcp", angles).p, atol=1e-3)


@pytest.mark.sim
@pytest.mark.slow
def test_urdf_kinematics_agree_with_sapien(assets: None):
    sapien = pytest.importorskip("sapien", reason="SAPIEN's kinematics are compared with")
    path = simpler_assets.robot_urdf(twin_mesh.COLOURS)
    loader = sapien.Scene().create_urdf_loader()
    loader.fix_root_link = True
    robot = loader.load(str(path))
    names = [joint.name for joint in robot.active_joints]
    angles = dict(zip(names, np.random.default_rng(3).uniform(0, 1, len(names)), strict=True))
    robot.set_qpos(np.array(list(angles.values())))
    links = read_urdf(path)
    for link in robot.links:
        found = (robot.get_root_pose().inv() * link.entity_pose).p
        np.testing.assert_allclose(found, link_pose(links, link.name, angles).p, atol=1e-4)


@pytest.mark.slow
def test_only_the_looks_change(meshes: None):
    """The same actions give the same trace to the bit, and another picture."""

    def trace(robot: str) -> tuple[np.ndarray, list[bytes]]:
        env = make_mujoco(task_named("open_drawer_place"), image_size=SIZE, robot=robot)
        observation, _ = env.reset(seed=1)
        rng, states = np.random.default_rng(0), []
        for _ in range(3):
            now, *_, info = env.step(np.append(rng.normal(0, 0.03, 6), 0.2))
            states += [now["proprio"].tobytes()]
            states += [value.tobytes() for value in info["privileged"].values()]
        env.close()
        return observation["images"]["overhead_camera"], states

    (usual, usual_states), (mesh, mesh_states) = trace("primitives"), trace("google_mesh")
    assert usual_states == mesh_states
    assert np.abs(usual.astype(float) - mesh).max() > 30


@pytest.mark.slow
def test_meshes_touch_nothing_and_primitives_are_hidden(meshes: None, plain: mujoco.MjModel):
    model = twin_scene.build(*SIZE, robot="google_mesh")
    added = [g for g in range(model.ngeom) if model.geom(g).name.startswith(twin_mesh.PREFIX)]
    assert len(added) == model.ngeom - plain.ngeom > 20
    assert not model.geom_contype[added].any()
    assert not model.geom_conaffinity[added].any()
    np.testing.assert_array_equal(model.body_mass, plain.body_mass)
    np.testing.assert_array_equal(model.body_inertia, plain.body_inertia)
    robot = model.body_rootid[model.geom_bodyid] == model.body("base").id
    assert set(np.flatnonzero(robot & (model.geom_rgba[:, 3] > 0))) == set(added)


@pytest.mark.slow
def test_fingers_close_with_the_twins(meshes: None):
    """Open as the URDF at angle 0; shut, the tips of both sides meet within 5 mm."""
    model = twin_scene.build(*SIZE, robot="google_mesh")
    data, fingers = mujoco.MjData(model), Fingers(model)
    mujoco.mj_forward(model, data)
    start = data.geom_xpos.copy()
    fingers.turn(data)
    np.testing.assert_allclose(data.geom_xpos, start, atol=1e-9)
    data.qpos[[model.joint(n).qposadr[0] for n in twin_mesh.FINGERS]] = twin_body.FINGER_TRAVEL
    mujoco.mj_kinematics(model, data)
    fingers.turn(data)
    hand = pose_of(data, "gripper").inverse()
    for side, sign in (("left", 1), ("right", -1)):
        geom = model.geom(f"google_link_finger_tip_{side}_0_0").id
        mesh = model.geom_dataid[geom]
        first, n = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        points = model.mesh_vert[first : first + n] @ data.geom_xmat[geom].reshape(3, 3).T
        inside = [(hand * Pose(p + data.geom_xpos[geom], hand.q)).p[1] * sign for p in points]
        assert abs(min(inside)) < 5e-3


@pytest.mark.parametrize("kind", ["gl", "ray"])
def test_share_of_pixels(plain: mujoco.MjModel, kind: str):
    model = plain
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = RayRenderer(model, *SIZE) if kind == "ray" else make_renderer(model, *SIZE)
    before = renderer.render(data, "overhead_camera")
    floor = np.arange(model.ngeom) == model.geom("floor").id
    of_floor, rest = (renderer.share(data, "overhead_camera", g) for g in (floor, ~floor))
    assert 0.1 < of_floor.mean() < 0.9
    np.testing.assert_allclose(of_floor + rest, 1.0, atol=0.3)  # the sky is neither
    np.testing.assert_array_equal(renderer.render(data, "overhead_camera"), before)
    renderer.close()


def test_photo_is_behind_the_simulated(assets: None):
    """A floor, wall and furniture give way to the photograph; the cabinet and the apple do not."""
    task = task_named("open_drawer_place")
    env, behind = (make_mujoco(task, "grid", SIZE, photo=photo) for photo in (False, True))
    usual, pasted = (e.reset(seed=13)[0]["images"]["overhead_camera"] for e in (env, behind))
    photo = Photo(behind.simulator.model, task, SIZE)._photo("b0")
    env.close()
    behind.close()
    np.testing.assert_array_equal(pasted[:5, :12], photo[:5, :12].round())
    middle = np.s_[20:26, 25:55]  # of the table's top
    np.testing.assert_array_equal(pasted[middle], usual[middle])


def test_what_is_missing_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    task = task_named("pick_coke_can")
    monkeypatch.setenv("SIMPLER_ASSETS", str(tmp_path))
    for robot, photo in (("google_mesh", False), ("primitives", True)):
        with pytest.raises(UserError, match=r"missing .*simpler_assets.py source="):
            make_mujoco(task, robot=robot, photo=photo)
    with pytest.raises(UserError, match="robot=lego: choose one of primitives, google_mesh"):
        make_mujoco(task, robot="lego")


def test_missing_trimesh_is_told(meshes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    with pytest.raises(UserError, match=r"selfflow\[mesh\]"):
        make_mujoco(task_named("pick_coke_can"), robot="google_mesh")


def test_rollout_keys_belong_to_the_twin():
    from selfflow.eval.parts import RolloutConfig, check_twin

    task = task_named("open_drawer_place")
    with pytest.raises(UserError, match="robot=google_mesh: only with backend=mujoco"):
        check_twin("simpler", task, robot="google_mesh")
    with pytest.raises(UserError, match="photo=true: only with backend=mujoco"):
        check_twin("fake", task, photo=True)
    options = ("mild", "opening", "hold", None, None, None, 1, 200000, "test", 1, 0, "")
    config = RolloutConfig(task.name, "mujoco", *options)
    assert "robot" not in config.identity(), "older runs go on"
    assert replace(config, photo=True).identity()["photo"] is True
