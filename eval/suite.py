"""One of SIMPLER's whole evaluations: every variant of eval/grids.py that can run, and a list of
those that cannot. Use: python eval/simpler_rollout.py eval=simpler_visual_matching

Beside a folder a variant, `out` holds summary.json and table.md, the printed table as markdown.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from rich.console import Console

from selfflow.configs.entry import one_of
from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs import simpler_assets
from selfflow.envs.simpler import samples_of
from selfflow.envs.simpler_variants import MATCHED
from selfflow.eval import parts, results
from selfflow.eval.grids import FAMILIES, SUITES, Variant, why_not
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.suite_table import Row, markdown, show, tallies

ALL = "all"
PLACEMENTS = {"visual_matching": "grid", "variant_aggregation": "variants"}
PLAIN = "none"  # the colouring where a variant has none
TABLE = "table.md"


def check(config: RolloutConfig) -> None:
    """Everything that can be wrong before work begins. Raises UserError."""
    one_of("suite", str(config.suite), SUITES)
    for key, only in (("backend", "simpler"), ("placement", PLACEMENTS[str(config.suite)])):
        if getattr(config, key) != only:
            raise UserError(
                f"{key}={getattr(config, key)}: an evaluation has {key}={only} "
                f"with suite={config.suite}"
            )
    if config.variant != MATCHED:
        raise UserError(f"variant={config.variant}: an evaluation has its own; leave it out")
    runnable, _ = plan(config)
    results.check_folder(Path(config.out), identity(config))
    for variant in runnable:
        one = single(config, variant)
        results.check_folder(Path(one.out), one.identity())


def plan(config: RolloutConfig) -> tuple[list[Variant], list[tuple[Variant, str]]]:
    """The variants to run, and the others with the reason. Raises UserError for a task or colouring
    that the evaluation does not hold, and where nothing could run for what the policy is."""
    variants = _of_colouring(config)
    if config.task != ALL:
        name = task_named(config.task).name
        # the first coke task is the other three together
        names = FAMILIES["coke can"] if name == "pick_coke_can" else (name,)
        variants = [v for v in variants if v.task in names]
        if not variants:
            raise UserError(f"task={config.task}: not in suite={config.suite}; give task={ALL}")
    # In a photograph only a room's collision counts; elsewhere its look is the point.
    matching = config.suite == "visual_matching"
    has = cache(simpler_assets.present if matching else simpler_assets.genuine)
    reasons = [why_not(v, parts.tasks_of(config.backend), has) for v in variants]
    runnable = [v for v, reason in zip(variants, reasons, strict=True) if reason is None]
    refused = _refused(config, runnable)
    reasons = [r or refused.get(v.task) for v, r in zip(variants, reasons, strict=True)]
    pairs = list(zip(variants, reasons, strict=True))
    return [v for v, r in pairs if r is None], [(v, r) for v, r in pairs if r is not None]


def identity(config: RolloutConfig) -> Row:
    """What two runs must share so that one may continue the other."""
    free = ["episodes", "workers", "videos", "out", "urdf_version", "pictures", *config.unused]
    known = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    return known | {"samples": samples_of(config.shader, config.samples)}


def single(config: RolloutConfig, variant: Variant) -> RolloutConfig:
    """The rollout of one variant: its grid, from the first seed on, in a folder of its own."""
    return dataclasses.replace(
        config,
        suite=None,
        task=variant.task,
        variant=variant.name,
        urdf_version=variant.urdf_version or PLAIN,
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
        try:
            row = rollout(single(config, variant))
        except simpler_assets.AssetMissing as e:  # a file that its `needs` do not name
            skipped.append((variant, str(e)))
            continue
        row |= {"variant": variant.name, "cells": variant.cells, "counts": variant.counts}
        rows.append(row | {"urdf_version": variant.urdf_version, "paper_shader": variant.shader})
    summary = identity(config) | {
        "urdf_version": config.urdf_version,
        "families": tallies(rows, FAMILIES),
        "tasks": tallies(rows, {name: (name,) for names in FAMILIES.values() for name in names}),
        "variants": rows,
        "not_run": [dataclasses.asdict(v) | {"reason": reason} for v, reason in skipped],
    }
    results.write_json(folder / results.SUMMARY, summary)
    results.write_text(folder / TABLE, markdown(summary))
    console = Console() if Console().is_terminal else Console(width=120)
    show(summary, console)
    console.print(f"Summary, {TABLE}, and a folder a variant: {folder}", soft_wrap=True)
    if not rows:
        raise UserError(f"suite={config.suite}: nothing of it could run, as listed above")
    return summary


def _of_colouring(config: RolloutConfig) -> list[Variant]:
    """The suite's variants in the robot's colouring that is asked for, and those without one."""
    variants = SUITES[str(config.suite)]()
    choices = list(dict.fromkeys(v.urdf_version for v in variants if v.urdf_version))
    one_of("urdf_version", config.urdf_version, [ALL, *choices])
    return [
        v for v in variants if config.urdf_version in (ALL, v.urdf_version) or not v.urdf_version
    ]


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
