"""The ablation: its plan, its sittings with a fake runner, and the report of made-up records."""

from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval import ablation_report as report
from selfflow.eval.ablation_config import ARMS, MAIN, AblationConfig, check
from selfflow.eval.ablation_plan import (
    CURVE,
    FINETUNE,
    PRETRAIN,
    ROLLOUT,
    Job,
    chosen,
    planned,
)
from selfflow.eval.ablation_records import (
    check_records,
    harvest,
    identity,
    loss_of,
    read_records,
    write_records,
)
from selfflow.eval.ablation_show import detectable, seconds
from selfflow.eval.chart import COLOURS
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.results import append_episode
from selfflow.eval.rollout import Episode
from selfflow.eval.world_model import WorldModelConfig
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.worldmodel.train_config import TrainConfig

CONFIGS: dict[str, tuple[type, str]] = {
    "selfflow.worldmodel.train": (TrainConfig, "train"),
    "selfflow.policies.finetune": (FinetuneConfig, "finetune"),
    "selfflow.eval.world_model": (WorldModelConfig, "world_model"),
    "selfflow.eval.simpler_rollout": (RolloutConfig, "rollout"),
}
# one of every kind, and of every key that an arm adds
COMPOSED = [f"main/{arm}/1/pretrain" for arm in ("dual", "repa", "self_flow_full")]
COMPOSED += [f"main/{arm}/1/finetune" for arm in ("scratch", "self_flow_full_kept")]
COMPOSED += [f"main/vanilla/1/{kind}" for kind in ("curve", "video", "rollout-001000")]
COMPOSED += ["larger/self_flow/1/pretrain"]


@pytest.fixture
def config(tmp_path: Path) -> AblationConfig:
    places = [f"{k}={tmp_path}/{k}" for k in ("out", "records")]
    return compose(AblationConfig, "ablation", [*places, f"document={tmp_path}/ablation.md"])


def fake(config: AblationConfig, job: Job) -> dict[str, Any]:
    """A record as a job of that kind leaves it; self_flow is better, and slower."""
    _, arm, seed, _ = job.name.split("/")
    good = "self_flow" in arm
    head = {"job": job.name, "kind": job.kind, "arguments": identity(config, job), "minutes": 3.0}
    if job.steps:
        term = {"step": job.steps[-1], "loss": 0.5 - 0.1 * good}
        return head | {"steps": job.steps[-1], "step_s": 1.0 + good, "log": [term]}
    if job.kind == ROLLOUT:
        outcome = [int(i % 2 == 0 or (good and i % 4 == 1)) for i in range(config.episodes)]
        seeds = list(range(config.seed, config.seed + config.episodes))
        opened = {"opened": [1.0] * config.episodes}
        return head | {"seeds": seeds, "success": outcome, "ever": outcome, "progress": opened}
    cells = {}
    for n, step in enumerate(config.points, start=1):
        value = 1.0 / (n + good) + 0.001 * int(seed)
        probes = {f"video tau=0.5: {t}": [1 - value, 0, 0] for t in ("drawer", "apple", "gripper")}
        cells[str(step)] = {"video": [value, 0, 0], "action": [0.1, 0, 0], **probes}
        cells[str(step)] |= {
            "psnr, all frames": [13.0 + good, 0, 0],
            "psnr, first frame": [0, 0, 0],
        }
    return head | {"episodes": 60, "cells": cells}


def test_the_plan_is_all_arms_and_seeds_each_job_once(config: AblationConfig) -> None:
    runs = planned(config)
    assert len([r for r in runs if r.size == MAIN]) == len(ARMS) * 3
    assert len(runs) == 8 * 3 + 2 * 2 * 3
    jobs = chosen(config)
    assert len({job.name for job in jobs}) == len(jobs) == len({job.out for job in jobs})
    kinds = [job.kind for job in jobs]
    assert kinds.count(PRETRAIN) == 5 * 3 + 12  # arms that differ in fine-tuning only share one
    assert kinds.count(FINETUNE) == 24
    assert kinds.count(ROLLOUT) == 48
    # what a job starts from lies before it
    for number, job in enumerate(jobs):
        for word in job.arguments:
            key, _, path = word.partition("=")
            if key in ("init", "teacher"):
                assert any(path.startswith(str(before.out)) for before in jobs[:number])


def test_a_part_of_it_is_chosen_with_what_it_needs(config: AblationConfig) -> None:
    part = chosen(replace(config, only=["repa"], seeds=[1]))
    names = [job.name for job in part]
    assert names[:3] == ["main/vanilla/1/pretrain", "main/repa/1/pretrain", "main/repa/1/curve"]
    assert len(part) == 7
    sizes = chosen(replace(config, only=["smaller"]))
    assert {job.kind for job in sizes} == {PRETRAIN, CURVE}
    with pytest.raises(UserError, match="did you mean vanilla"):
        check(replace(config, only=["vanila"], plan=True))
    with pytest.raises(UserError, match=r"choose of 0 \.\. 2"):
        check(replace(config, seeds=[3], plan=True))
    with pytest.raises(UserError, match=r"sizes\.main"):
        check(replace(config, sizes={"main": {}}, plan=True))
    with pytest.raises(UserError, match=r"seconds\.self_flow=\.\.\. is required"):
        check(replace(config, seconds={"vanilla": 1.0}, plan=True))
    with pytest.raises(UserError, match="size_arms=nothing"):
        report.check(replace(config, size_arms=["nothing"]))


def test_data_that_hold_held_out_episodes_are_refused(config: AblationConfig, store: Path) -> None:
    """Of the same seed and task: the numbers would not be held out."""
    with pytest.raises(UserError, match="2 of its episodes are in data too, such as seed 0"):
        check(replace(config, data=str(store), heldout=str(store)))


def test_commands_compose(config: AblationConfig) -> None:
    shown, jobs = {}, {job.name: job for job in chosen(replace(config, seeds=[1]))}
    for name in COMPOSED:
        kind, page = CONFIGS[jobs[name].command[1]]
        shown[name] = compose(kind, page, jobs[name].command[2:])
    dual, full = shown["main/dual/1/pretrain"], shown["main/self_flow_full/1/pretrain"]
    assert (dual.objective, dual.attention, dual.seed) == ("dual", "prefix", 1)
    assert (full.objective, full.attention) == ("self_flow", "full")
    assert (dual.steps, dual.batch, dual.sources) == (full.steps, full.batch, full.sources)
    kept = shown["main/self_flow_full_kept/1/finetune"]
    assert kept.keep_self_flow == 0.5
    assert kept.kept.attention == "full"
    assert kept.init.endswith("main/self_flow_full/1/pretrain/checkpoints/step-000600")
    teacher = shown["main/repa/1/pretrain"].teacher
    assert teacher.endswith("main/vanilla/1/pretrain/checkpoints/step-000600")
    assert shown["main/scratch/1/finetune"].init is None
    larger = shown["larger/self_flow/1/pretrain"]
    assert (larger.model.hidden, larger.model.depth) == (256, 8)
    end = shown["main/vanilla/1/rollout-001000"]
    assert end.checkpoint.endswith("main/vanilla/1/finetune/checkpoints/step-001000")
    assert (end.episodes, end.seed) == (50, 210000)


def test_a_rollout_counts_with_all_of_its_seeds(config: AblationConfig) -> None:
    job = next(job for job in chosen(config) if job.kind == ROLLOUT)
    first, short = config.seed, replace(config, episodes=2)

    def ended(seed: int) -> Episode:
        late = seed > first
        return Episode(seed, late, late, True, 9, 9, "ended", (), (), {"opened": 0.5}, 0, 0)

    job.out.mkdir(parents=True)
    for seed in (first + 1, first + 2):  # the last is of a longer config
        append_episode(job.out, ended(seed))
    with pytest.raises(UserError, match=f"does not hold what rollout leaves.*{first}"):
        harvest(short, job, 1.0)
    append_episode(job.out, ended(first))
    found = harvest(short, job, 1.0)
    assert (found["seeds"], found["success"]) == ([first, first + 1], [0, 1])


def test_records_of_another_config_are_refused(config: AblationConfig) -> None:
    job = chosen(config)[0]
    write_records(Path(config.records), {job.name: fake(config, job)})
    with open(config.records, "a") as file:
        file.write('{"job": "torn')  # by a kill
    records = read_records(Path(config.records))
    check_records(config, [job], records)
    moved = replace(config, out=f"{config.out}/elsewhere")
    check_records(moved, chosen(moved)[:1], records)  # where `out` lies does not matter
    longer = replace(config, pretrain_steps=1200)
    with pytest.raises(UserError, match="steps=1200, steps=600"):
        check_records(longer, chosen(longer)[:1], records)


def test_the_report_shows_complete_arms_only(config: AblationConfig) -> None:
    runs = planned(config)
    jobs = [j for r in runs if r.arm in ("vanilla", "self_flow", "scratch") for j in r.jobs]
    records = {job.name: fake(config, job) for job in jobs}
    del records["main/scratch/2/rollout-000500"]
    write_records(Path(config.records), records)
    Path(config.document).write_text(f"# Method\n{report.START}\nold\n{report.END}\nafter\n")
    report.check(config)
    report.main(config)
    text = Path(config.document).read_text()
    assert text.startswith("# Method\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "**20 runs of 36 planned are done.**" in text
    assert "scratch (main)" in text  # counted as missing
    assert "| scratch |" not in text  # and nothing shown
    assert "75/150: 50 % (42 %–58 %)" in text
    # 13 of 50 more seeds a training
    assert "| self_flow − vanilla | +26.0" in text
    row = next(line for line in text.splitlines() if line.startswith("| self_flow − vanilla"))
    assert "39 : 0" in row
    assert row.endswith("| better |")
    # 1/(n+1) reaches 1/5 a point of the curve sooner, at twice the seconds a step
    row = next(line for line in text.splitlines() if line.startswith("| self_flow | 2.00 |"))
    assert "480, 480, 480 | 16.0, 16.0, 16.0" in row
    assert "≤" not in row  # not at the first point already
    ends = text.partition("### Ends of the curves by size")[2].partition("###")[0]
    rows = [line for line in ends.splitlines() if "| self_flow |" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| main", "| smaller", "| larger"]
    for row in rows:  # video 1/5 and 1/6 and action 0.1; probe 1 less video; 0.001 a seed more
        assert "| 0.301 | 0.268 | -0.033 (" in row
        assert "| 0.799 | 0.832 | +0.033 (" in row
    for name in ("curves.png", "success.png"):  # two pretrainings; two fractions of an arm
        with Image.open(Path(config.records).with_name(name)) as image:
            drawn = {colour for _, colour in image.getcolors(image.width * image.height) or ()}
        assert {*COLOURS[:2]} <= drawn
        assert f"({name})" in text


def test_the_correction_counts_planned_arms(config: AblationConfig) -> None:
    runs = [r for r in planned(config) if r.arm in ("vanilla", "self_flow") and r.size == MAIN]
    records = {job.name: fake(config, job) for run in runs for job in run.jobs}
    arms = report.complete(runs, records)
    found = report.compared(arms, records, "self_flow", "vanilla")
    assert found is not None
    (table,) = report.comparisons(arms, records)
    assert f"{found.p:.3g} | {7 * found.p:.3g} | better" in table
    split = replace(found, by_seed=[0.3, 0.3, -0.1])
    assert report.verdict(split, 0.001) == "not told apart"  # a seed disagrees
    assert report.verdict(found, 0.06) == "not told apart"


def test_episodes_are_paired_by_their_seeds(config: AblationConfig) -> None:
    runs = [r for r in planned(config) if r.arm in ("vanilla", "self_flow") and r.size == MAIN]
    records = {job.name: fake(config, job) for run in runs for job in run.jobs}
    arms = report.complete(runs, records)
    before = report.compared(arms, records, "self_flow", "vanilla")
    own = records["main/vanilla/1/rollout-001000"]
    for key in ("seeds", "success"):
        own[key] = own[key][1:] + own[key][:1]  # in another order
    assert report.compared(arms, records, "self_flow", "vanilla") == before
    own["seeds"][0] += 1000
    with pytest.raises(KeyError):
        report.compared(arms, records, "self_flow", "vanilla")


def test_a_value_that_is_no_number_is_not_averaged_away() -> None:
    assert isnan(loss_of({"video": [None, None, None], "action": [0.1, 0.1, 0.1]}))


def test_a_document_without_the_markers_is_refused(config: AblationConfig) -> None:
    Path(config.document).write_text("# My own\n")
    with pytest.raises(UserError, match="has no lines"):
        report.check(config)
    assert Path(config.document).read_text() == "# My own\n"


def test_the_plan_knows_hours_and_what_is_detectable(config: AblationConfig) -> None:
    first, other = (chosen(replace(config, seeds=[s]))[0] for s in (0, 1))
    assert seconds(config, first, {}) == pytest.approx(600 * 0.5)
    records = {first.name: fake(config, first)}
    assert seconds(config, other, records) == pytest.approx(180)  # as its like took
    assert "150 pairs at a rate of 50%: 16 points; 21" in detectable(config)[1]


def test_a_torn_record_is_none_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"job": "a", "minutes": 1}\n{"job": "b"}\n{"job": "c", "min')
    assert read_records(path) == {"a": {"job": "a", "minutes": 1}, "b": {"job": "b"}}
    path.write_text('{"job": "a"}\n{"minutes": 1}\n')
    with pytest.raises(UserError, match=r"records\.jsonl: line 2 is damaged.*its job is run again"):
        read_records(path)
