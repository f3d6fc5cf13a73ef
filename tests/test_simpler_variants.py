"""Variant aggregation: looks, files, placements; and scenes in rooms made here, measured."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfflow.datasets.rotations import rotate
from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs import sapien_render, simpler_assets
from selfflow.envs import simpler_variants as variants
from selfflow.envs.simpler import make_simpler
from selfflow.envs.simpler_standins import MARK, build
from selfflow.envs.simpler_variants import CLEAR, COKE_LOOKS, HIGH, LESS, LOW, MATCHED, MORE
from selfflow.envs.table_objects import COKE, Placed
from selfflow.envs.task_move_near import TRIPLETS
from selfflow.envs.task_pick_coke_can import PHOTOGRAPHS
from selfflow.envs.tasks import draw_placement

SHARED = Path(__file__).parents[2] / "shared" / "simpler_assets"
STANDING = "pick_standing_coke_can"
AT_TABLE = (STANDING, "move_near")
AT_CABINET = ("open_top_drawer", "open_drawer_place")


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*AT_TABLE, *AT_CABINET])
def test_every_look_differs_and_only_matching_has_a_photograph(task):
    looks = variants.looks(task)
    assert len({repr(look) for look in looks.values()}) == len(looks)
    assert [name for name, look in looks.items() if look.matched] == [MATCHED]
    assert not variants.needs(task, MATCHED)
    for name in looks.keys() - {MATCHED}:
        assert variants.needs(task, name)[0].startswith("data/hab2_bench_assets/stages/")


def test_the_lights_are_simpler_s():
    """Grey levels of the published scenes, brighter and darker at the table and the cabinet."""
    table, cabinet = variants.looks("move_near"), variants.looks("open_top_drawer")
    levels = {name: [grey for _, grey in look.light.beams] for name, look in table.items()}
    assert levels["base"] == levels["table_1"] == [2.2, 0.7, 0.7]
    assert levels["slightly_darker"] == [0.8, 0.8]
    assert levels["slightly_brighter"] == [3.6, 1.3, 1.3]
    main = {name: look.light.beams[0] for name, look in cabinet.items()}
    assert main["base"] == ((-0.2, 0.0, -1.0), 1.0)
    assert (main["darker"][1], main["brighter"][1]) == (0.5, 2.0)
    assert main["vertical_light"] == ((-0.1, 0.0, -1.0), 1.0)
    assert {look.light.ambient for look in table.values()} == {0.3}
    assert cabinet["base"].light.beams[1:] == (((-1, 1, -0.05), 0.5), ((-1, -1, -0.05), 0.5))


def test_what_is_not_baked():
    look = COKE_LOOKS["base"]
    names = {look.model(name) for triplet in TRIPLETS for name in triplet}
    assert names == {
        *("blue_plastic_bottle", "opened_pepsi_can", "orange", "opened_7up_can", "apple"),
        *("sponge", "opened_coke_can", "opened_redbull_can"),
    }
    assert {variants.plain_density(name) for name in names} == {50.0, 150.0, 800.0}
    assert {variants.plain_density(name) for name in MORE} == {50.0, 150.0, 800.0, 1200.0}
    assert variants.looks("open_top_drawer")[MATCHED].model("baked_apple_v2") == "baked_apple_v2"


@pytest.mark.parametrize(
    ("room", "place", "yaw"),
    [
        ("google_pick_coke_can_1_v4_alt_background", (1.6616, 3.0337, 0.0), 0.0),
        ("frl_apartment_stage_simple", (1.6616, 3.0337, 0.0), 0.0),
        ("modern_bedroom_no_roof", (1.8396, 0.7987, 1.669), -179.20),
        ("modern_office_no_roof", (1.4696, 1.3057, 1.48), -89.68),
    ],
)
def test_rooms_stand_upright_where_simpler_puts_them(room, place, yaw):
    position, turn = variants.room_pose(room)
    np.testing.assert_allclose(position, place, atol=1e-9)
    np.testing.assert_allclose(rotate(list(turn), [0.0, 1.0, 0.0]), [0, 0, 1], atol=1e-9)
    x = rotate(list(turn), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(x[:2], [np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))], atol=1e-4)


@given(x=st.floats(-0.35, -0.12), y=st.floats(-0.02, 0.42), models=st.sampled_from([LESS, MORE]))
def test_distractors_keep_to_the_table_and_off_the_can(x, y, models):
    can = Placed(COKE, (x, y), (1.0, 0.0, 0.0, 0.0))
    placed = variants.place_distractors(can, models, "distractors")
    assert [thing.model for thing in placed] == list(models)
    assert {thing.turn for thing in placed} == {can.turn}
    at = np.array([thing.xy for thing in placed])
    assert np.all((at >= LOW) & (at <= HIGH))
    assert np.linalg.norm(at - can.xy, axis=1).min() > CLEAR
    assert placed == variants.place_distractors(can, models, "distractors")
    assert placed != variants.place_distractors(can, models, "others")


def test_variants_have_their_own_robot_places_at_the_cabinet_alone():
    rng = np.random.default_rng(0)

    def starts(task: str, kind: str, count: int) -> list[dict[str, float]]:
        return [draw_placement(task_named(task), kind, rng, seed) for seed in range(count)]

    drawer = starts("close_top_drawer", "variants", 10)
    places = {(s["robot_x"], s["robot_y"]) for s in drawer}
    lattice = {(x, y) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0.0, 0.2)}
    assert places == lattice
    assert drawer[9] == drawer[0]
    assert {s["robot_yaw"] for s in drawer} == {0.0}
    assert {s["drawer_top"] for s in drawer} == {0.2}
    apple = starts("open_drawer_place", "variants", 27)
    assert len({tuple(s.values()) for s in apple}) == 27
    assert {(s["robot_x"], s["robot_y"]) for s in apple} == {(0.65, y) for y in (-0.2, 0.0, 0.2)}
    assert {s["apple_x"] for s in apple} == {-0.08, -0.05, -0.02}
    for task in ("move_near", STANDING, "widowx_stack_cube"):
        assert starts(task, "variants", 24) == starts(task, "grid", 24)
    assert starts("open_drawer_place", "grid", 27) != apple


@pytest.fixture
def _no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPLER_ASSETS", str(tmp_path))


@pytest.mark.usefixtures("_no_files")
@pytest.mark.parametrize(
    ("task", "variant", "says"),
    [
        ("move_near", "distractors_less", "choose one of visual_matching, base, background_1"),
        ("open_top_drawer", "table_1", "cabinet_3, vertical_light, camera_variant"),
        ("widowx_stack_cube", "base", "choose one of visual_matching"),
        ("open_top_drawer", "base", "frl_apartment_stage_simple.glb is missing"),
    ],
)
def test_a_variant_that_is_not_there_is_refused_in_one_line(task, variant, says):
    for call in (variants.check_variant, lambda t, v: make_simpler(TASKS[t], variant=v)):
        with pytest.raises(UserError, match=says) as caught:
            call(task, variant)
        assert "\n" not in str(caught.value)


# --- scenes ---------------------------------------------------------------------------------------


def _fill(root: Path) -> None:
    """An asset folder with every file that a variant needs: links to ours, rooms made here of boxes
    (a table, a floor), and cans of one brand in the place of others."""
    models = root / "data/custom/models"
    rooms = root / "data/hab2_bench_assets/stages"
    for folder in (models, rooms):
        folder.mkdir(parents=True)
    for path in (SHARED / "data/custom").iterdir():
        if path.name != "models":
            (root / "data/custom" / path.name).symlink_to(path)
    (root / "mani_skill2_real2sim").symlink_to(SHARED / "mani_skill2_real2sim")
    (root / "data/real_inpainting").symlink_to(SHARED / "data/real_inpainting")
    for path in (SHARED / "data/custom/models").iterdir():
        if path.name != "blue_plastic_bottle":
            (models / path.name).symlink_to(path)
    for name in ("opened_sprite_can", "opened_fanta_can", "opened_redbull_can"):
        (models / name).symlink_to(SHARED / "data/custom/models/opened_7up_can")
    (models / "blue_plastic_bottle").symlink_to(SHARED / "data/custom/models/opened_pepsi_can")
    table = build("google_pick_coke_can_1_v4.glb", root)
    assert table
    table = table.replace(MARK.encode(), MARK.upper().encode())  # no stand-in any more
    (models / "stone_tabletop.glb").write_bytes(table)
    looks = [look for task in (*AT_TABLE, *AT_CABINET) for look in variants.looks(task).values()]
    for name in {look.room for look in looks if look.room}:
        (rooms / f"{name}.glb").write_bytes(table)


@pytest.fixture(scope="module")
def _rooms(tmp_path_factory):
    """Skips where no scene can run; SIMPLER_ASSETS is a folder with all files, see `_fill`."""
    if not SHARED.is_dir():
        pytest.skip(f"no SIMPLER assets at {SHARED}")
    root = tmp_path_factory.mktemp("assets")
    _fill(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLER_ASSETS", str(root))
        try:
            sapien = sapien_render.require_renderer()
        except UserError as e:
            pytest.skip(f"no SIMPLER scene here: {e}")
        keep = sapien.render.RenderSystem()  # keeps compiled shaders from test to test
        yield keep


def _scene(task: str, variant: str, seed: int = 0, **options: Any) -> tuple[Any, dict]:
    """The simulator after a reset to a cell, and its info; without a picture unless asked for."""
    options = {"urdf_version": "none", "pictures": False} | options
    env = make_simpler(task_named(task), "variants", variant=variant, **options)
    _, info = env.reset(seed=seed)
    return env.simulator, info


def _lights(simulator: Any) -> list[tuple[list[float], float, bool]]:
    """Direction (unit vector), grey level and shadow of the directional lights."""
    import sapien

    kind, found = sapien.render.RenderDirectionalLightComponent, []
    for entity in simulator.scene.scene.entities:
        for light in (c for c in entity.components if isinstance(c, kind)):
            ahead = rotate(np.asarray(light.entity_pose.q, float), np.array([1.0, 0, 0]))
            found.append((ahead.round(5).tolist(), round(float(light.color[0]), 4), light.shadow))
    return found


def _expected(look: variants.Light) -> list[tuple[list[float], float, bool]]:
    units = [np.divide(way, np.linalg.norm(way)).round(5).tolist() for way, _ in look.beams]
    greys = [round(grey, 4) for _, grey in look.beams]
    return [
        (u, g, look.shadow and n == 0) for n, (u, g) in enumerate(zip(units, greys, strict=True))
    ]


def _named(simulator: Any, name: str) -> Any:
    return next(e for e in simulator.scene.scene.entities if e.name == name)


def _solid(entity: Any) -> bool:
    """Whether it has a collision shape."""
    return any(getattr(component, "collision_shapes", []) for component in entity.components)


def _head(simulator: Any) -> list[float]:
    """Pan and tilt (rad)."""
    robot = simulator.scene.robot
    angles = dict(zip(robot.joints, robot.body.get_qpos().tolist(), strict=True))
    return [angles["joint_head_pan"], angles["joint_head_tilt"]]


@pytest.mark.sim
@pytest.mark.usefixtures("_rooms")
@pytest.mark.parametrize(
    ("task", "variant"),
    [
        ("open_top_drawer", "background_1"),
        ("open_drawer_place", "background_2"),
        ("open_drawer_place", "cabinet_3"),
        ("open_top_drawer", "camera_variant"),
    ],
)
def test_a_cabinet_stands_in_its_room(task, variant):
    simulator, info = _scene(task, variant, seed=4)
    look = variants.looks(task)[variant]
    arena = _named(simulator, "arena")
    position, turn = variants.room_pose(str(look.room))
    np.testing.assert_allclose(arena.pose.p, position, atol=1e-6)
    np.testing.assert_allclose(np.abs(arena.pose.q @ np.array(turn)), 1.0, atol=1e-6)
    assert not _solid(arena)  # it is only seen
    assert _lights(simulator) == _expected(look.light)
    base = info["privileged"]["base"]
    start = draw_placement(task_named(task), "variants", np.random.default_rng(0), 4)
    np.testing.assert_allclose(base[:2], [start["robot_x"], start["robot_y"]], atol=1e-6)
    pan, tilt = (-0.025, 0.008) if variant == "camera_variant" else (0.0, 0.0)
    np.testing.assert_allclose(_head(simulator), [-0.00285961 + pan, 0.7851361 + tilt], atol=1e-6)
    assert "photo" not in info["draws"]
    if task == "open_drawer_place":
        assert simulator.scene.apple.entity.name == "apple"
        assert info["privileged"]["apple"][2] > 0.88
    simulator.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_rooms")
def test_a_camera_variant_tilts_the_camera():
    poses = {}
    for variant in ("base", "camera_1", "camera_2"):
        simulator, info = _scene("move_near", variant)
        turn = info["cameras"]["overhead_camera"]["pose"][3:].astype(float)
        ahead = rotate(turn, np.array([0.0, 0.0, 1.0]))
        poses[variant] = np.arcsin(-ahead[2])  # below the horizon
        assert _lights(simulator) == _expected(variants.TABLE_LIGHT)
        simulator.close()
    assert poses["camera_1"] - poses["base"] == pytest.approx(0.15, abs=2e-3)
    assert poses["camera_2"] - poses["base"] == pytest.approx(-0.12, abs=2e-3)


@pytest.mark.sim
@pytest.mark.usefixtures("_rooms")
def test_distractors_lie_about_the_can():
    variant = "distractors_more"
    simulator, info = _scene(STANDING, variant)
    look = variants.looks(STANDING)[variant]
    names = [body.entity.name for body in simulator.scene.bodies]
    assert names == [COKE, *look.distractors]
    objects = info["privileged"]["objects"]
    assert objects.shape == (1 + len(look.distractors), 7)
    dropped = [
        [info["draws"][f"distractor_{n}_{axis}"] for axis in "xy"] for n in range(len(names) - 1)
    ]
    start = draw_placement(task_named(STANDING), "variants", np.random.default_rng(0), 0)
    can = np.array([start["can_x"], start["can_y"]])
    assert np.linalg.norm(dropped - can, axis=1).min() > CLEAR
    assert np.all(objects[:, 2] > 0.87)  # in this cell nothing is knocked off the table
    np.testing.assert_allclose(objects[0, :2], can, atol=0.02)
    assert _solid(_named(simulator, "arena"))
    simulator.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_rooms")
def test_move_near_without_a_third_object_has_two():
    simulator, info = _scene("move_near", "no_distractor", seed=14)
    names = [body.entity.name for body in simulator.scene.bodies]
    assert names == ["apple", "opened_7up_can"]  # seed 14: move apple near 7up can
    assert info["privileged"]["objects"].shape == (2, 7)
    mass = simulator.scene.bodies[0].mass
    simulator.close()
    simulator, _ = _scene("move_near", "base", seed=14)
    assert len(simulator.scene.bodies) == 3
    assert simulator.scene.bodies[0].mass == pytest.approx(mass)
    simulator.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_rooms")
def test_a_coke_can_to_carry_weighs_what_one_to_stay_does():
    """Outside visual matching it is the model that is picked elsewhere, where it is heavier."""
    masses = []
    for seed in (24, 26):  # coke can near redbull can, and the other way round
        simulator, _ = _scene("move_near", "base", seed=seed)
        masses.append({body.entity.name: body.mass for body in simulator.scene.bodies})
        simulator.close()
    assert masses[0] == pytest.approx(masses[1])
    assert masses[0][COKE] == pytest.approx(0.02, rel=0.02)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.usefixtures("_rooms")
def test_pictures_show_the_light_and_no_photograph():
    from selfflow.envs.simpler_scene import load_photo

    means, photographed = {}, {}
    photo = load_photo(simpler_assets.photo(PHOTOGRAPHS[0]), (64, 80))
    for variant in ("slightly_darker", "base", "slightly_brighter", MATCHED):
        simulator, _ = _scene(STANDING, variant, pictures=True, image_size=(64, 80))
        picture = simulator.render()["overhead_camera"]
        means[variant] = picture.mean()
        photographed[variant] = np.all(picture == photo, axis=-1).mean()
        simulator.close()
    print(means, photographed)
    assert means["slightly_darker"] < means["base"] - 2
    assert means["base"] < means["slightly_brighter"] - 2
    assert photographed.pop(MATCHED) > 0.5
    assert max(photographed.values()) < 0.01


@pytest.mark.parametrize("name", ["apple", "opened_pepsi_can"])
def test_the_shared_models_are_genuine(name, monkeypatch):
    if not SHARED.is_dir():
        pytest.skip(f"no SIMPLER assets at {SHARED}")
    monkeypatch.setenv("SIMPLER_ASSETS", str(SHARED))
    assert simpler_assets.genuine(f"data/custom/models/{name}/textured.*")
    room = "data/hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb"
    assert os.environ["SIMPLER_ASSETS"]
    assert not simpler_assets.genuine(room)
