"""The contract: task names, official ids, seeds, clipping."""

import numpy as np
import pytest

from selfflow.datasets.spec import (
    ABSENT,
    ALIASES,
    EMBODIMENTS,
    SEEDS,
    SEVERAL,
    TASKS,
    UserError,
    check_seeds,
    task_named,
)

NAMES = {
    *(f"{v}_{d}_drawer" for v in ("open", "close") for d in ("top", "middle", "bottom")),
    *("open_drawer_place", "pick_coke_can", "move_near"),
    *(f"pick_{orientation}_coke_can" for orientation in ("horizontal", "vertical", "standing")),
    *("widowx_carrot_on_plate", "widowx_spoon_on_towel"),
    *("widowx_stack_cube", "widowx_eggplant_in_basket"),
}


def test_task_names_are_the_agreed_ones() -> None:
    assert set(TASKS) == NAMES
    for name, task in TASKS.items():
        assert task.name == name
        assert task.embodiment in EMBODIMENTS
        assert task.max_steps > 0
        assert all(task.instructions)


def test_place_task() -> None:
    task = task_named("open_drawer_place")
    assert task.max_steps == 200
    assert task.instructions == ("open top drawer", "place apple into top drawer")
    assert task.force_advance_at == 100


def test_every_alias_leads_to_a_task() -> None:
    for official, name in ALIASES.items():
        assert task_named(official) is TASKS[name]
        assert official not in TASKS
    assert task_named("google_robot_open_top_drawer").name == "open_top_drawer"


# What each of SIMPLER's ids is here: of its wrapper, then of its environments.
PARTS = ("top", "middle", "bottom")
ORIENTATIONS = ("horizontal", "vertical", "standing")
GOOGLE = {
    **{f"{v}_{d}_drawer": f"{v}_{d}_drawer" for v in ("open", "close") for d in PARTS},
    **{f"{v}_drawer": None for v in ("open", "close")},
    **{f"pick_{o}coke_can": f"pick_{o}coke_can" for o in ("", *(f"{o}_" for o in ORIENTATIONS))},
    **{f"move_near{v}": "move_near" for v in ("", "_v0", "_v1")},
    **{f"place_in_closed_{d}drawer": None for d in ("", "middle_", "bottom_")},
    "pick_object": None,
    "place_in_closed_top_drawer": "open_drawer_place",
    "place_apple_in_closed_top_drawer": "open_drawer_place",
}
WIDOWX = {
    "spoon_on_towel": "widowx_spoon_on_towel",
    "carrot_on_plate": "widowx_carrot_on_plate",
    "stack_cube": "widowx_stack_cube",
    "put_eggplant_in_basket": "widowx_eggplant_in_basket",
}
ENVIRONMENTS = {
    "GraspSingleOpenedCokeCanInScene-v0": "pick_coke_can",
    "MoveNearGoogleBakedTexInScene-v0": "move_near",
    "MoveNearGoogleBakedTexInScene-v1": "move_near",
    "OpenTopDrawerCustomInScene-v0": "open_top_drawer",
    "OpenMiddleDrawerCustomInScene-v0": "open_middle_drawer",
    "OpenBottomDrawerCustomInScene-v0": "open_bottom_drawer",
    "CloseTopDrawerCustomInScene-v0": "close_top_drawer",
    "CloseMiddleDrawerCustomInScene-v0": "close_middle_drawer",
    "CloseBottomDrawerCustomInScene-v0": "close_bottom_drawer",
    "PlaceIntoClosedTopDrawerCustomInScene-v0": "open_drawer_place",
    "PutSpoonOnTableClothInScene-v0": "widowx_spoon_on_towel",
    "PutCarrotOnPlateInScene-v0": "widowx_carrot_on_plate",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v0": "widowx_stack_cube",
    "PutEggplantInBasketScene-v0": "widowx_eggplant_in_basket",
}
OFFICIAL = {f"google_robot_{name}": ours for name, ours in GOOGLE.items()}
OFFICIAL |= {f"widowx_{name}": ours for name, ours in WIDOWX.items()} | ENVIRONMENTS


def test_the_official_ids_are_all_here() -> None:
    assert (len(GOOGLE), len(WIDOWX), len(ENVIRONMENTS)) == (21, 4, 14)
    assert {*ALIASES, *SEVERAL, *ABSENT} == set(OFFICIAL) - set(TASKS)


@pytest.mark.parametrize(("official", "ours"), OFFICIAL.items())
def test_every_official_id_is_a_task_or_says_why_not(official: str, ours: str | None) -> None:
    if ours is not None:
        assert task_named(official).name == ours
        return
    several = {
        "google_robot_open_drawer": "choose one of open_top_drawer, open_middle_drawer, open_bott",
        "google_robot_close_drawer": "choose one of close_top_drawer, close_middle_drawer, close_b",
        "google_robot_place_in_closed_drawer": "several of SIMPLER's tasks; choose one of open_dra",
    }
    with pytest.raises(UserError) as caught:
        task_named(official)
    says = str(caught.value)
    assert says.startswith(f"task={official}: ")
    assert "\n" not in says
    assert several.get(official, "SIMPLER's that is not here; choose one of open_top_dr") in says


def test_unknown_task_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"task=nope.*open_drawer_place.*widowx_stack_cube"):
        task_named("nope")


def test_seed_ranges_are_disjoint_and_touch() -> None:
    train, select, test = SEEDS["train"], SEEDS["select"], SEEDS["test"]
    assert (train.start, select.start, test.start) == (0, 100_000, 200_000)
    assert (train.stop, select.stop) == (select.start, test.start)


@pytest.mark.parametrize(
    ("first", "count", "split", "fine"),
    [
        (0, 1, "train", True),
        (99_999, 1, "train", True),
        (99_999, 2, "train", False),
        (100_000, 100_000, "select", True),
        (99_999, 1, "select", False),
        (199_999, 1, "test", False),
        (200_000, 50, "test", True),
        (-1, 1, "train", False),
    ],
)
def test_check_seeds(first: int, count: int, split: str, fine: bool) -> None:
    if fine:
        check_seeds(first, count, split)
    else:
        with pytest.raises(UserError, match="choose a first seed"):
            check_seeds(first, count, split)


def test_clip() -> None:
    robot = EMBODIMENTS["google_robot"]
    inside = np.array([0.9, -1.0, 0.0, 1.5, -1.5, 0.0, 0.3])
    clipped, changed = robot.clip(inside)
    np.testing.assert_array_equal(clipped, inside)
    assert not changed
    outside = np.array([2.0, -3.0, 0.0, 9.0, -9.0, 0.0, -0.5])
    clipped, changed = robot.clip(outside)
    np.testing.assert_allclose(clipped, [1, -1, 0, np.pi / 2, -np.pi / 2, 0, 0])
    assert changed
    for gripper, bound in ((-0.1, 0.0), (1.1, 1.0)):
        clipped, changed = robot.clip(np.array([0.0] * 6 + [gripper]))
        assert clipped[6] == bound
        assert changed


def test_embodiments() -> None:
    assert {name: e.control_hz for name, e in EMBODIMENTS.items()} == {
        "google_robot": 3.0,
        "widowx": 5.0,
    }
