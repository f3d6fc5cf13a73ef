"""Phases, funnel, saliency and open-loop error by phase, on made-up episodes and the fake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from selfflow.configs.entry import compose
from selfflow.datasets.spec import TASKS, ActionChunk, UserError, task_named
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreHeader, StoreWriter
from selfflow.eval import diagnose, diagnose_funnel, results, simpler_rollout
from selfflow.eval.diagnose import DiagnoseConfig
from selfflow.eval.diagnose_open_loop import ACTED, episodes_of, open_loop, section
from selfflow.eval.diagnose_saliency import covered, decider, overlaid, saliency
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.phases import END, Watch, first_missing, phases_of
from selfflow.eval.rollout import Episode

PLACE = task_named("open_drawer_place")
NAMES = [phase.name for phase in phases_of(PLACE)]
FRONT, OPENED, AT_APPLE, GRASPED, LIFTED, OVER, FLOOR = NAMES
APPLE = (-0.05, 0.0, 0.92)


def state(
    opening: float = 0.0, tool=(0.5, 0.0, 1.2), apple=APPLE, grasped: int = 0, inside: int = 0
) -> dict[str, np.ndarray]:
    turn = (1.0, 0.0, 0.0, 0.0)
    values = {
        "drawers": (opening, 0.0, 0.0),
        "tool": (*tool, *turn),
        "apple": (*apple, *turn),
        "apple_grasped": (grasped,),
        "apple_on_drawer_floor": (inside,),
    }
    return {name: np.array(value, np.float32) for name, value in values.items()}


def watched(*states: dict[str, np.ndarray], success: tuple[int, ...] = ()) -> Watch:
    """The first state is the reset's."""
    watch = Watch(PLACE, states[0])
    for step, now in enumerate(states[1:], start=1):
        watch.see(now, step in success, step)
    return watch


def an_episode(seed: int, *reached: str, success: bool = False, **other) -> Episode:
    known = {
        **dict(seed=seed, success=success, early_stop=success, ever=success, first_success=None),
        **dict(steps=200, reason="step limit", latencies=(), subtask_steps=(), progress={}),
        **dict(clipped=0, ik_failed=0, nearest=(150, 0.031)),
        "phases": {name: 10 * (i + 1) for i, name in enumerate(reached)},
    }
    return Episode(**(known | other))


def test_every_task_has_distinct_phases():
    for task in TASKS.values():
        names = [p.name for p in phases_of(task)]
        assert len(names) == len(set(names)) >= 2
        assert END not in names


def test_a_watch_follows_the_task_and_says_where_it_was_nearest():
    watch = watched(
        state(),
        state(tool=(0.05, 0.0, 0.75)),
        state(0.2),
        state(0.2, tool=(0.1, 0.0, 0.92)),  # 15 cm beside the apple, 10 cm too far
        state(0.2, tool=(0.02, 0.0, 0.92)),
        state(0.2, tool=(0.02, 0.0, 0.92)),
        state(0.2),
    )
    assert watch.reached == {FRONT: 1, OPENED: 2}
    assert watch.next == AT_APPLE
    assert watch.nearest == (4, pytest.approx(0.02, abs=1e-4))  # the earliest of equals


def test_nearest_is_counted_from_when_the_phase_came_first():
    # the tool begins beside the apple, but then the drawer is what is missing
    watch = watched(state(tool=(0.01, 0.0, 0.92)), state(0.2), state(0.2, tool=(0.25, 0.0, 0.92)))
    assert watch.next == AT_APPLE
    assert watch.nearest == (2, pytest.approx(0.25, abs=1e-4))


def test_a_later_phase_of_the_same_thing_passes_the_earlier_ones_and_no_others():
    pushed_in = watched(state(), state(0.2), state(0.2, inside=1))
    assert (pushed_in.reached, pushed_in.next) == ({OPENED: 1, FLOOR: 2}, END)
    shut = watched(state(), state(0.1, inside=1), state(0.13))
    assert (shut.reached, shut.next) == ({FLOOR: 1}, FRONT)
    assert first_missing(phases_of(PLACE), {FLOOR: 3}) == FRONT
    assert first_missing(phases_of(PLACE), {FRONT: 1, GRASPED: 2, OPENED: 3}) == LIFTED


def test_of_the_end_the_last_success_is_kept():
    lost = watched(state(), *[state(0.2, inside=1)] * 3, state(0.01, inside=1), success=(2, 3))
    assert (lost.next, lost.nearest) == (END, (3, 0.0))
    never = watched(state(), *[state(0.2, inside=1)] * 3)
    assert never.nearest == (3, 1.0)


def test_the_funnel_counts_each_failure_once_where_it_first_stopped():
    episodes = [
        an_episode(1, success=True),  # passes all, whatever was noted
        an_episode(2),
        an_episode(3, FRONT),
        an_episode(4, FRONT, OPENED, AT_APPLE, nearest=(90, 0.01)),
        an_episode(5, OPENED, nearest=(70, 0.05)),  # OPENED passes FRONT
        an_episode(6, OPENED, FLOOR, nearest=(120, 0.0)),
        an_episode(7, OPENED, FLOOR, nearest=(120, 1.0)),
    ]
    rows = diagnose_funnel.funnel(PLACE, episodes)
    assert [r.phase for r in rows] == [*NAMES, END]
    assert [r.through for r in rows] == [6, 5, 4, 3, 3, 3, 3, 1]
    assert [r.before for r in rows] == [7, 6, 5, 4, 3, 3, 3, 3]
    assert [r.lost for r in rows] == [1, 1, 1, 1, 0, 0, 0, 2]
    assert sum(r.lost for r in rows) == sum(not e.success for e in episodes)
    assert (rows[2].missed_by, rows[3].missed_by, rows[-1].missed_by) == (0.05, 0.01, None)
    assert rows[0].cells()[1] == "6/7 = 86 % (49 to 97)"
    failures = diagnose_funnel.failures(PLACE, episodes)
    assert [f.phase for f in failures] == [FRONT, OPENED, GRASPED, AT_APPLE, END, END]
    assert [f.step for f in failures] == [150, 150, 90, 70, 120, 200]
    assert [f.since for f in failures] == [0, 10, 30, 10, 20, 20]
    assert [f.cells()[4] for f in failures[-2:]] == ["it had succeeded", "never a success"]


def test_episodes_keep_their_phases_in_the_file_and_older_ones_are_read(tmp_path: Path):
    episode = an_episode(1, FRONT)
    results.append_episode(tmp_path, episode)
    assert results.read_episodes(tmp_path) == [episode]
    old = json.loads((tmp_path / results.EPISODES).read_text())
    del old["phases"], old["nearest"]
    (tmp_path / results.EPISODES).write_text(json.dumps(old) + "\n")
    (read,) = results.read_episodes(tmp_path)
    assert (read.phases, read.nearest) == ({}, None)


class Eye:
    """Moves by the brightness of a part of the picture, turns by another, and adds noise."""

    embodiment = "google_robot"

    def reset(self, seed: int | None = None) -> None:
        self.random, self.asked = np.random.default_rng(seed), 0

    def act(self, observation) -> ActionChunk:
        image = observation["images"]["camera"].astype(float)
        self.asked += 1
        action = self.random.normal(size=7)
        action[0] += 3e-4 * image[8:16, 24:32].mean() + 1e-9 * self.asked
        action[4] += 1e-3 * image[0:8, 0:8].mean()
        return ActionChunk(np.stack([action, action]))


def test_saliency_is_found_where_the_policy_looks():
    image = np.zeros((24, 32, 3), np.uint8)
    image[8:16, 24:32] = 200
    observation = {"images": {"camera": image}, "proprio": np.zeros(8), "instruction": ""}
    heat = saliency(decider(Eye(), [observation], 5), observation, "camera", 3, 4)
    mean = round(200 / 12)
    expected = np.zeros((3, 3, 4))
    expected[0, 1, 3], expected[1, 0, 0] = 3e-4 * (200 - mean), 1e-3 * mean
    np.testing.assert_allclose(heat, expected, atol=1e-12)  # the noise is the same: no change of it
    red = overlaid(image, heat[0])
    assert (red[..., 0] > red[..., 1]).sum() == 64
    assert red[12, 28, 0] > 200


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (5, 7), (1, 1)])
def test_covers_tile_the_picture(rows: int, columns: int):
    image = np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)
    image[:, :, 0] = np.where(image[:, :, 0] < 128, 0, 255)  # never the mean
    counts = np.zeros((24, 33), int)
    for _, picture in covered(image, rows, columns):
        counts += (picture != image).any(2)
    assert (counts == 1).all()


def demonstration(folder: Path, told: list[str], **privileged: np.ndarray) -> EpisodeStore:
    """An episode whose step t moves by t + 1 mm."""
    n = len(told)
    actions = np.zeros((n, 7), np.float32)
    actions[:, 0], actions[:, 6] = 1e-3 * np.arange(1, n + 1), 1.0
    proprio = np.tile(np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32), (n, 1))
    header = StoreHeader("google_robot", "open_drawer_place", ("overhead_camera",), "fake")
    with StoreWriter(folder, "000", header) as writer:
        writer.append(
            EpisodeRecord(
                images={"overhead_camera": [np.zeros((8, 8, 3), np.uint8)] * n},
                proprio=proprio,
                actions=actions,
                executed=actions,
                terminate=np.arange(n) == n - 1,
                instruction=told,
                seed=0,
                success=True,
                privileged=privileged,
                draws={},
                meta={},
            )
        )
    return EpisodeStore(folder)


class Late:
    """Predicts the first action of each chunk right, then keeps it."""

    embodiment = "google_robot"

    def reset(self, seed: int | None = None) -> None:
        self.asked: list[str] = []

    def act(self, observation) -> ActionChunk:
        self.asked.append(observation["instruction"])
        first = np.array([1e-3 * (4 * (len(self.asked) - 1) + 1), 0, 0, 0, 0, 0, 1])
        return ActionChunk(np.tile(first, (4, 1)))


def test_open_loop_errors_are_dealt_to_the_phase_at_their_step(tmp_path: Path):
    states = [state(), state(0.2), *[state(0.2)] * 4, *[state(0.2, inside=1)] * 4]
    arrays = {key: np.stack([s[key] for s in states]) for key in states[0]}
    told = ["open top drawer"] * 6 + ["place apple into top drawer"] * 4
    store = demonstration(tmp_path / "own", told, **arrays)
    parts = [(store, episodes_of(store, PLACE, 5))]
    policy = Late()
    with Progress(disable=True) as progress:
        errors = open_loop(policy, 4, parts, PLACE, progress)
    # steps 0-3, then 4-5 since 6-7 are told otherwise, then 8-9
    assert policy.asked == [told[0], told[4], told[8]]
    assert errors.phase == [FRONT, *[AT_APPLE] * 5, ACTED, ACTED]
    np.testing.assert_allclose(
        errors.predicted[:, 0], 1e-3 * np.array([0, 1, 2, 3, 0, 1, 0, 1]), atol=1e-8
    )
    np.testing.assert_allclose(errors.still[:, 0], 1e-3 * np.array([1, 2, 3, 4, 5, 6, 9, 10]), 1e-5)
    assert errors.predicted[:, 1:].max() == 0
    rows = section(errors, PLACE, 10, 0).content()
    found = {(r["row"], r["column"]): r["value"] for r in rows}
    assert found[f"until {AT_APPLE}", "position (m)"] == pytest.approx(7e-3 / 5)


def test_data_of_another_task_or_without_state_are_refused(tmp_path: Path, store: Path):
    with pytest.raises(UserError, match="holds open_top_drawer, the rollout is of open_drawer"):
        episodes_of(EpisodeStore(store), PLACE, 3)
    bare = demonstration(tmp_path / "bare", ["open top drawer"] * 3)
    with pytest.raises(UserError, match="does not hold the simulator's state"):
        episodes_of(bare, PLACE, 3)


@pytest.fixture(scope="module")
def _rolled_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of a policy that does nothing."""
    out = tmp_path_factory.mktemp("rolled_out")
    keys = ["backend=fake", "policy=hold", "episodes=2", "videos=0", "task=open_top_drawer"]
    simpler_rollout.main(compose(RolloutConfig, "rollout", [*keys, f"out={out}"]))
    return out


@pytest.fixture
def rollout(_rolled_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_rolled_out, tmp_path / "rollout"))


def configured(*overrides: str) -> DiagnoseConfig:
    return compose(DiagnoseConfig, "diagnose", [*overrides])


def test_a_rollout_is_diagnosed(rollout: Path, capsys: pytest.CaptureFixture):
    config = configured(f"folder={rollout}", "failures=1")
    diagnose.check(config)
    found = diagnose.main(config)
    assert [row["lost"] for row in found["phases"]] == [2, 0, 0]
    assert [f["phase"] for f in found["failures"]] == [FRONT, FRONT]
    assert found["notes"] == ["1 of 1 failures run again went exactly as recorded."]
    out = rollout / "diagnosis"
    assert json.loads((out / "diagnosis.json").read_text())["failures"][0]["seed"] == 200_000
    page = (out / "report.md").read_text()
    assert "0 of 2 episodes succeed" in page
    assert "![failures](failures.png)" in page
    assert (out / "failures.png").is_file()
    assert str(out) in capsys.readouterr().out


def test_a_run_that_differs_from_its_record_is_told(rollout: Path):
    lines = (rollout / results.EPISODES).read_text().splitlines()
    first = json.loads(lines[0]) | {"steps": 7}
    (rollout / results.EPISODES).write_text("\n".join([json.dumps(first), *lines[1:], ""]))
    (note,) = diagnose.main(configured(f"folder={rollout}", "failures=2"))["notes"]
    assert note.startswith("1 of 2 failures run again went exactly as recorded: ")


def test_mistakes_are_one_line(rollout: Path, tmp_path: Path):
    for overrides, said in (
        ([f"folder={tmp_path / 'nowhere'}"], "holds no rollout"),
        ([f"folder={rollout}", "data=[x]"], "policy=hold predicts no actions"),
    ):
        with pytest.raises(UserError, match=said):
            diagnose.check(configured(*overrides))
    with pytest.raises(UserError, match="draws=0: must be 1 or more"):
        configured(f"folder={rollout}", "draws=0")
    episode = json.loads((rollout / results.EPISODES).read_text().splitlines()[0])
    del episode["phases"], episode["nearest"]
    (rollout / results.EPISODES).write_text(json.dumps(episode) + "\n")
    with pytest.raises(UserError, match="older rollouts did not note"):
        diagnose.check(configured(f"folder={rollout}"))
