"""SIMPLER's evaluations: the paper's counts, what cannot run, and the command over them."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import TASKS, Task, UserError
from selfflow.envs import simpler_assets
from selfflow.envs.base import RobotEnv
from selfflow.envs.fake import make_fake
from selfflow.envs.simpler_assets import URDF_VERSIONS
from selfflow.envs.simpler_standins import build
from selfflow.envs.tasks import DRAWER_TASKS
from selfflow.eval import grids, parts, simpler_rollout, suite, suite_table
from selfflow.eval.grids import FAMILIES, SUITES, Variant, why_not
from selfflow.eval.parts import RolloutConfig


def counted(variants: list[Variant]) -> dict[str, int]:
    of = Counter(v.task for v in variants if v.counts for _ in range(v.cells))
    return {family: sum(of[task] for task in tasks) for family, tasks in FAMILIES.items()}


def test_visual_matching_has_the_paper_s_counts():
    variants = SUITES["visual_matching"]()
    full = {"coke can": 300, "move near": 240, "open drawer": 108, "close drawer": 108}
    full |= {"place apple": 108} | {name: 24 for name in FAMILIES if name.startswith("WidowX")}
    assert counted(variants) == full
    for colouring in URDF_VERSIONS:
        one = [v for v in variants if v.urdf_version == colouring]
        of = {"coke can": 75, "move near": 60, "open drawer": 27, "close drawer": 27}
        of["place apple"] = 27
        assert {k: n for k, n in counted(one).items() if n} == of
    assert {v.shader for v in variants if "drawer" in v.task} == {"rt"}
    assert {v.shader for v in variants if "drawer" not in v.task} == {"ibl"}


def test_variant_aggregation_has_the_paper_s_counts():
    variants = SUITES["variant_aggregation"]()
    have = {family: n for family, n in counted(variants).items() if n}
    assert have == {
        "coke can": 675,
        "move near": 480,
        "open drawer": 189,
        "close drawer": 189,
        "place apple": 189,
    }
    cameras = Counter(v.task for v in variants if not v.counts)
    assert cameras == dict.fromkeys((*grids.COKE, "move_near"), 2)


@pytest.mark.parametrize("name", SUITES)
def test_variants_are_distinct_and_speak_of_known_things(name):
    variants = SUITES[name]()
    assert {v.task for v in variants} <= TASKS.keys()
    assert {v.urdf_version for v in variants} <= {"", *URDF_VERSIONS}
    assert len({v.folder for v in variants}) == len(variants)
    assert all(v.needs for v in variants)


def test_why_not_names_the_first_reason():
    variant = Variant("move_near", grids.MATCHED, "none", 60, "ibl", ("a.png", "b.png"))
    assert why_not(variant, TASKS, lambda name: True) is None
    lacks = why_not(variant, TASKS, lambda name: False)
    assert lacks == "asset missing: a.png and 1 more"
    assert why_not(variant, [], lambda name: True) == "the backend does not have this task"


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def assets(monkeypatch, tmp_path):
    """backend=simpler is the simulator for tests, episodes are short, asset files empty."""

    def make(task: Task, placement: str, **options: object) -> RobotEnv:
        return make_fake(dataclasses.replace(task, max_steps=5), placement)

    monkeypatch.setitem(parts.BACKENDS, "simpler", make)
    monkeypatch.setattr(parts, "RULES", DRAWER_TASKS)
    root = tmp_path / "assets"
    monkeypatch.setenv("SIMPLER_ASSETS", str(root))
    for variant in SUITES["visual_matching"]():
        for name in variant.needs:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def composed(out: Path, *overrides: str) -> RolloutConfig:
    words = ["policy=hold", f"out={out}", *overrides]
    return compose(RolloutConfig, "rollout", ["eval=simpler_visual_matching", *words])


def aggregation(out: Path, *overrides: str) -> RolloutConfig:
    words = ["eval=simpler_variant_aggregation", "policy=hold", f"out={out}", *overrides]
    return compose(RolloutConfig, "rollout", words)


def complete(root: Path) -> None:
    """Puts there what variant aggregation needs, as if it were genuine."""
    for variant in SUITES["variant_aggregation"]():
        for name in variant.needs:
            path = root / name.replace("*", "glb")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"genuine")


def test_an_evaluation_runs_every_variant_and_lists_the_others(assets, tmp_path, capsys):
    (assets / "data/real_inpainting/open_drawer_a2.png").unlink()
    config = composed(tmp_path / "run", "episodes=1")
    simpler_rollout.check(config)
    summary = simpler_rollout.main(config)
    ran = {(row["task"], row["urdf_version"]) for row in summary["variants"]}
    assert ran == {("open_drawer_place", colouring) for colouring in URDF_VERSIONS}
    assert all(row["episodes"] == 1 for row in summary["variants"])
    assert summary["families"]["place apple"]["episodes"] == 4
    assert {"last_step", "early_stop", "ever"} < summary["families"]["place apple"].keys()
    everything = {v.folder for v in SUITES["visual_matching"]()}
    fields = [field.name for field in dataclasses.fields(Variant)]
    rows = summary["not_run"]
    skipped = {Variant(**{name: row[name] for name in fields}).folder for row in rows}
    done = {f"open_drawer_place-visual_matching-{colouring}" for colouring in URDF_VERSIONS}
    assert skipped | done == everything
    assert not skipped & done
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == done
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["not_run"]
    printed = capsys.readouterr().out
    assert "Not run: " in printed
    assert "open_drawer_a2.png" in printed
    assert "move_near, visual_matching: 240 trials: the backend does not have" in printed
    assert "Not comparable with published scores" in printed
    simpler_rollout.check(config)  # the same command continues


@pytest.mark.usefixtures("assets")
def test_a_file_found_missing_at_work_leaves_the_other_variants(tmp_path, monkeypatch):
    """A variant's `needs` do not name every mesh."""
    make = parts.BACKENDS["simpler"]

    def lacking(task: Task, placement: str, **options: object) -> RobotEnv:
        if options["urdf_version"] == URDF_VERSIONS[1]:
            raise simpler_assets.AssetMissing("its robot.urdf is missing")
        return make(task, placement, **options)

    monkeypatch.setitem(parts.BACKENDS, "simpler", lacking)
    summary = simpler_rollout.main(composed(tmp_path / "run", "task=open_top_drawer", "episodes=1"))
    ran = [row["urdf_version"] for row in summary["variants"]]
    assert ran == [URDF_VERSIONS[0], *URDF_VERSIONS[2:]]
    reasons = {row["urdf_version"]: row["reason"] for row in summary["not_run"]}
    assert reasons == {URDF_VERSIONS[1]: "its robot.urdf is missing"}


@pytest.mark.usefixtures("assets")
def test_a_grid_is_covered_once_from_any_first_seed(tmp_path):
    config = composed(tmp_path / "run", "task=open_top_drawer")
    assert {v.urdf_version for v in suite.plan(config)[0]} == set(URDF_VERSIONS)
    one = suite.single(config, suite.plan(config)[0][0])
    assert one.episodes == 9
    assert {seed % 9 for seed in one.seeds} == set(range(9))
    assert (one.suite, one.placement, one.backend) == (None, "grid", "simpler")


@pytest.mark.usefixtures("assets")
def test_one_colouring_is_a_quarter_of_the_google_robot_s_trials(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "RULES", TASKS)
    full = composed(tmp_path / "run", "pictures=false")
    assert full.urdf_version == suite.ALL
    assert sum(v.cells for v in suite.plan(full)[0]) == 960
    one = composed(tmp_path / "run", "urdf_version=recolor_tabletop_visual_matching_2")
    cells = Counter(v.urdf_version for v in suite.plan(one)[0] for _ in range(v.cells))
    assert cells == {"recolor_tabletop_visual_matching_2": 216, "": 96}
    singles = [suite.single(full, v) for v in suite.plan(full)[0]]
    assert {config.pictures for config in singles} == {False}
    assert {c.urdf_version for c in singles if "widowx" in c.task} == {suite.PLAIN}
    assert suite.identity(full) == suite.identity(one)  # the one continues the other
    by = {"last_step": 2, "early_stop": 2, "ever": 2}
    row = {"task": "move_near", "variant": "x", "episodes": 2, "counts": True}
    row |= {"successes_by_reading": by, "urdf_version": "", "wilson_95": (0.34, 1.0)}
    row |= {"paper_shader": "ibl", "shader": "ibl"}
    tally = suite_table.tallies([row], {"move_near": ("move_near",)})
    summary = suite.identity(one) | {"urdf_version": one.urdf_version, "not_run": []}
    text = suite_table.markdown(summary | {"variants": [row], "tasks": tally, "families": tally})
    assert "| task | last step | early stop | ever | of | %, 95 % interval |" in text
    assert "| move_near | 2 | 2 | 2 | 2 | 100.0 (34.2 to 100.0) |" in text
    traced = suite.identity(composed(tmp_path / "run", "shader=rt"))
    title = suite_table.title(traced | {"urdf_version": suite.ALL, "variants": [row]})
    assert "shading rt, 4 rays a pixel" in title
    plain = aggregation(tmp_path / "run", "urdf_version=recolor_tabletop_visual_matching_2")
    with pytest.raises(UserError, match="urdf_version"):
        suite.plan(plain)


def test_variant_aggregation_runs_each_variant_in_its_own_places(assets, tmp_path):
    complete(assets)
    (assets / "data/custom/mk_station2.urdf").unlink()
    config = aggregation(tmp_path / "run", "task=open_drawer_place", "episodes=1")
    simpler_rollout.check(config)
    summary = simpler_rollout.main(config)
    names = [row["variant"] for row in summary["variants"]]
    assert names == ["base", "background_1", "background_2", "brighter", "darker", "cabinet_3"]
    assert {row["placement"] for row in summary["variants"]} == {"variants"}
    assert {row["urdf_version"] for row in summary["variants"]} == {"none"}
    held = json.loads((tmp_path / "run/open_drawer_place-darker-none/config.json").read_text())
    assert held["variant"] == "darker"
    assert [row["name"] for row in summary["not_run"]] == ["cabinet_2"]
    assert summary["tasks"] == {"open_drawer_place": summary["families"]["place apple"]}
    lines = (tmp_path / "run" / suite.TABLE).read_text().splitlines()
    assert lines[0] == (
        "SIMPLER, variant aggregation, colouring all, shading ibl, policy hold, 6 trials"
    )
    assert lines[2].startswith("| task | variant | colouring | last step |")
    assert lines[4] == "| open_drawer_place | base | none | 0 | 0 | 0 | 1 | 0.0 (0.0 to 79.3) |"
    assert "| open_drawer_place | all | all | 0 | 0 | 0 | 6 | 0.0 (0.0 to 39.0) |" in lines
    assert "| **place apple** | all | all | 0 | 0 | 0 | 6 | 0.0 (0.0 to 39.0) |" in lines
    assert "Not run: 27 trials" in lines


@pytest.mark.usefixtures("assets")
def test_what_the_policy_cannot_drive_is_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "RULES", TASKS)
    config = composed(tmp_path / "run")
    checked = []

    def check(one: RolloutConfig) -> None:
        checked.append(one.task)
        if one.task.startswith("widowx"):
            raise UserError("it drives google_robot")

    monkeypatch.setattr(parts, "check", check)
    runnable, skipped = suite.plan(config)
    assert len(checked) == 2  # one for a robot
    assert {(v.task, reason) for v, reason in skipped} == {
        (task, "it drives google_robot") for task in grids.WIDOWX
    }
    assert len(runnable) == 4 * (3 + 1 + 6 + 1)


@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backend=mujoco"], "backend=mujoco: an evaluation has backend=simpler"),
        (["placement=mild"], "placement=mild: an evaluation has placement=grid"),
        (["variant=base"], "variant=base: an evaluation has its own"),
        (["urdf_version=blue"], "urdf_version=blue"),
        (["task=nope"], "no such task"),
        (["suite=visual_matchin"], "did you mean visual_matching"),
        (["policy=best"], "policy=best"),
        (["seed=7"], "split=train"),
    ],
)
def test_check_names_the_cure(tmp_path, words, says):
    with pytest.raises(UserError, match=says) as caught:
        simpler_rollout.check(composed(tmp_path / "run", *words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("assets")
def test_variant_aggregation_without_its_files_lists_everything(tmp_path, capsys):
    config = aggregation(tmp_path / "run")
    runnable, skipped = suite.plan(config)
    assert not runnable
    assert all(reason.startswith("asset missing") for _, reason in skipped)
    simpler_rollout.check(config)
    with pytest.raises(UserError, match="nothing of it could run, as listed above"):
        simpler_rollout.main(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    counts = [row["cells"] for row in summary["not_run"] if row["counts"]]
    assert sum(counts) == 675 + 480 + 7 * 54 + 189
    assert f"Not run: {sum(counts) + 2 * (75 + 60)} trials" in capsys.readouterr().out


def test_a_standin_counts_as_missing_in_variant_aggregation_alone(assets, tmp_path):
    room = "data/hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb"
    complete(assets)
    (assets / room).write_bytes(build(room, assets) or b"")
    runnable, skipped = suite.plan(aggregation(tmp_path / "run"))
    for variant, reason in skipped:
        missing = room in variant.needs
        assert reason == (
            f"asset missing: {room}" if missing else "the backend does not have this task"
        )
    assert len(runnable) == 7 * 7  # at the cabinet
    assert {v.task for v in runnable} == DRAWER_TASKS.keys()
    room_needed = dataclasses.replace(SUITES["visual_matching"]()[-1], needs=(room,))
    assert why_not(room_needed, TASKS, simpler_assets.present) is None
