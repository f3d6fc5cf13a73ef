"""One of SIMPLER's whole evaluations: every variant of eval/grids.py that can run, and a list of
those that cannot. Use: python eval/simpler_rollout.py eval=simpler_visual_matching
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfflow.configs.entry import one_of
from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs import simpler_assets
from selfflow.eval import parts, results
from selfflow.eval.grids import FAMILIES, SUITES, Variant, why_not
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.report import wilson

ALL = "all"
Row = dict[str, Any]


def check(config: RolloutConfig) -> None:
    """Everything that can be wrong before work begins. Raises UserError."""
    one_of("suite", str(config.suite), SUITES)
    for key, only in (("backend", "simpler"), ("placement", "grid")):
        if getattr(config, key) != only:
            raise UserError(f"{key}={getattr(config, key)}: an evaluation has {key}={only}")
    runnable, _ = plan(config)
    results.check_folder(Path(config.out), identity(config))
    for variant in runnable:
        one = single(config, variant)
        results.check_folder(Path(one.out), one.identity())


def plan(config: RolloutConfig) -> tuple[list[Variant], list[tuple[Variant, str]]]:
    """The variants to run, and the others with the reason. Raises UserError for a task that the
    evaluation does not hold, and where nothing could run for what the policy is."""
    variants = SUITES[str(config.suite)]()
    if config.task != ALL:
        name = task_named(config.task).name
        # the first coke task is the other three together
        names = FAMILIES["coke can"] if name == "pick_coke_can" else (name,)
        variants = [v for v in variants if v.task in names]
        if not variants:
            raise UserError(f"task={config.task}: not in suite={config.suite}; give task={ALL}")
    # In a photograph only a room's collision counts; elsewhere its look is the point.
    matching = config.suite == "visual_matching"
    has = simpler_assets.present if matching else simpler_assets.genuine
    reasons = [why_not(v, parts.tasks_of(config.backend), has) for v in variants]
    runnable = [v for v, reason in zip(variants, reasons, strict=True) if reason is None]
    refused = _refused(config, runnable)
    reasons = [r or refused.get(v.task) for v, r in zip(variants, reasons, strict=True)]
    pairs = list(zip(variants, reasons, strict=True))
    return [v for v, r in pairs if r is None], [(v, r) for v, r in pairs if r is not None]


def identity(config: RolloutConfig) -> Row:
    """What two runs must share so that one may continue the other."""
    free = ("episodes", "workers", "videos", "out", "urdf_version")
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in free}


def single(config: RolloutConfig, variant: Variant) -> RolloutConfig:
    """The rollout of one variant: its grid, from the first seed on, in a folder of its own."""
    return dataclasses.replace(
        config,
        suite=None,
        task=variant.task,
        urdf_version=variant.urdf_version or config.urdf_version,
        episodes=min(config.episodes, variant.cells),
        out=str(Path(config.out) / variant.folder),
    )


def run(config: RolloutConfig, rollout: Callable[[RolloutConfig], Row]) -> Row:
    """Runs what is missing of the evaluation with `rollout`, a variant after the other; prints the
    table and returns the summary that it writes. Raises UserError after that if none could run."""
    folder = Path(config.out)
    runnable, skipped = plan(config)
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(folder / results.CONFIG, identity(config))
    rows = []
    for variant in runnable:
        row = rollout(single(config, variant))
        row |= {"variant": variant.name, "cells": variant.cells, "counts": variant.counts}
        rows.append(row | {"urdf_version": variant.urdf_version, "paper_shader": variant.shader})
    summary = identity(config) | {
        "families": families(rows),
        "variants": rows,
        "not_run": [dataclasses.asdict(v) | {"reason": reason} for v, reason in skipped],
    }
    results.write_json(folder / results.SUMMARY, summary)
    console = Console() if Console().is_terminal else Console(width=120)
    show(summary, console)
    console.print(f"Summary, and a folder a variant: {folder}", soft_wrap=True)
    if not rows:
        raise UserError(f"suite={config.suite}: nothing of it could run, as listed above")
    return summary


def families(rows: Sequence[Row]) -> dict[str, Row]:
    """Successes in the three readings, episodes and interval of the tasks reported together."""
    found = {}
    for family, tasks in FAMILIES.items():
        mine = [row for row in rows if row["task"] in tasks and row["counts"]]
        if not mine:
            continue
        episodes = sum(row["episodes"] for row in mine)
        readings = {
            reading: sum(row["successes_by_reading"][reading] for row in mine)
            for reading in ("last_step", "early_stop", "ever")
        }
        interval = wilson(readings["last_step"], episodes)
        found[family] = {"episodes": episodes, "wilson_95": interval} | readings
    return found


def show(summary: Row, console: Console) -> None:
    """Prints the success of every variant and family, and what was not run."""
    title = f"SIMPLER, {summary['suite'].replace('_', ' ')}, shading {summary['shader']}"
    table = Table(title=title, title_justify="left")
    for name in ("task", "variant", "colouring", "last step", "early stop", "ever", "of"):
        table.add_column(name, overflow="fold")
    for row in summary["variants"]:
        by = row["successes_by_reading"]
        numbers = (by["last_step"], by["early_stop"], by["ever"], row["episodes"])
        colours = row["urdf_version"].replace("recolor_", "").replace("visual_matching_", "")
        names = (row["task"], row["variant"], colours or "-")
        table.add_row(*names, *map(str, numbers))
    table.add_section()
    for family, row in summary["families"].items():
        numbers = (row["last_step"], row["early_stop"], row["ever"], row["episodes"])
        low, high = row["wilson_95"]
        names = (family, "all", f"last step {100 * low:.1f} to {100 * high:.1f} %")
        table.add_row(*names, *map(str, numbers), style="bold")
    if summary["variants"]:
        console.print(table)
    _show_not_run(summary["not_run"], console)
    apart = sorted({r["task"] for r in summary["variants"] if r["paper_shader"] != r["shader"]})
    if apart:
        console.print(
            f"Not comparable with published scores, which are ray-traced: {', '.join(apart)}"
        )


def _show_not_run(skipped: Sequence[Row], console: Console) -> None:
    counts: dict[tuple[str, str, str], int] = {}
    for row in skipped:
        key = (row["task"], row["name"], row["reason"])
        counts[key] = counts.get(key, 0) + row["cells"]
    if counts:
        console.print(f"Not run: {sum(counts.values())} trials")
    for (task, name, reason), trials in counts.items():
        console.print(escape(f"  {task}, {name}: {trials} trials: {reason}"), soft_wrap=True)


def _refused(config: RolloutConfig, runnable: Sequence[Variant]) -> dict[str, str]:
    """By task, why the policy cannot do it; asked once a robot. Raises UserError where it can do
    none, or where something else than the policy is wrong."""
    firsts = {TASKS[v.task].embodiment: v for v in reversed(runnable)}
    wrong: dict[str, UserError] = {}
    for robot, variant in firsts.items():
        try:
            parts.check(single(config, variant))
        except UserError as e:
            wrong[robot] = e
    if wrong and len(wrong) == len(firsts):
        raise next(iter(wrong.values()))
    return {v.task: str(wrong[r]) for v in runnable if (r := TASKS[v.task].embodiment) in wrong}
