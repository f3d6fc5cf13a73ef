"""The plan of an ablation: its jobs, the hours that are left, and what it can detect."""

from statistics import fmean

from rich.console import Console
from rich.table import Table

from selfflow.eval.ablation_config import ARMS, MAIN, AblationConfig
from selfflow.eval.ablation_plan import (
    CURVE,
    FINETUNE,
    PRETRAIN,
    ROLLOUT,
    VIDEO,
    Job,
    planned,
)
from selfflow.eval.ablation_records import Record
from selfflow.eval.ablation_stats import (
    ALPHA,
    POWER,
    detectable_mean,
    detectable_success,
    with_episodes,
)

UNITS = {"probe": "R²", "loss": "held-out loss", "psnr": "dB PSNR"}


def show(config: AblationConfig, jobs: list[Job], records: dict[str, Record]) -> None:
    """Prints the commands of the sitting's jobs, hours by arm, and what can be told apart."""
    console = Console() if Console().is_terminal else Console(width=120)
    left = [job for job in jobs if job.name not in records]
    for job in left:
        print("python", *job.command)
    console.print(hours_table(config, jobs, records))
    for line in detectable(config):
        console.print(line, highlight=False)
    hours = sum(seconds(config, job, records) for job in left) / 3600
    at_once = f", {hours / n:.1f} of {n} at once" if (n := config.processes) > 1 else ""
    console.print(f"{len(left)} of {len(jobs)} jobs are left, about {hours:.1f} hours{at_once}")


def hours_table(config: AblationConfig, jobs: list[Job], records: dict[str, Record]) -> Table:
    """By size and arm; what several share is counted where it is run first."""
    table = Table(
        title="Hours left (estimated; measured where an arm has run)", title_justify="left"
    )
    kinds = (PRETRAIN, CURVE, VIDEO, FINETUNE, ROLLOUT)
    for column in ("size", "arm", *kinds, "sum"):
        table.add_column(column, justify="left" if column in ("size", "arm") else "right")
    names, seen = {job.name for job in jobs} - records.keys(), set()
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for run in planned(config):
        own = groups.setdefault((run.size, run.arm), dict.fromkeys(kinds, 0.0))
        for job in run.jobs:
            if job.name in names and job.name not in seen:
                seen.add(job.name)
                own[job.kind] += seconds(config, job, records) / 3600
    for (size, arm), own in groups.items():
        cells = [own[kind] for kind in kinds]
        table.add_row(size, arm, *(f"{hours:.1f}" for hours in (*cells, sum(cells))))
    return table


def seconds(config: AblationConfig, job: Job, records: dict[str, Record]) -> float:
    """How long a job lasts: as its like did with other seeds, else by the config's figures."""
    size, arm, _, last = job.name.split("/")
    alike = [
        60 * record["minutes"]
        for name, record in records.items()
        if (size, arm, last) == (name.split("/")[0], name.split("/")[1], name.split("/")[3])
    ]
    if alike:
        return fmean(alike)
    given, factor = config.seconds, 1.0 if size == MAIN else config.seconds.get(size, 1.0)
    if job.kind == PRETRAIN:
        return config.pretrain_steps * factor * given[arm.removesuffix("_full")]
    if job.kind == FINETUNE:
        return config.finetune_steps * given["finetune_kept" if ARMS[arm].kept else "finetune"]
    if job.kind == ROLLOUT:
        return config.episodes * given["episode"]
    return factor * given[job.kind]


def detectable(config: AblationConfig) -> list[str]:
    """What the planned runs can tell apart, a line each: stated before any of them is looked at."""
    pairs, others = config.trainings * config.episodes, len(ARMS) - 1
    one, all_ = (detectable_success(pairs, config.rate, alpha) for alpha in (ALPHA, ALPHA / others))
    spread = with_episodes(config.spread["success"], config.rate, config.episodes)
    seeds = detectable_mean(config.trainings, spread)
    n, rate = config.trainings, f"{config.rate:.0%}"
    own, points = 100 * config.spread["success"], f"{100 * all_:.0f}"
    lines = [
        f"Detectable with power {POWER:g} at alpha {ALPHA:g}, two-sided, by {n} training seeds of "
        f"{config.episodes} episodes each:",
        f"- success of these checkpoints, McNemar over {pairs} pairs at a rate of {rate}: "
        f"{100 * one:.0f} points; {points} as the first of {others} arms (Holm)",
        f"- success of the method, Student's t over {n} training seeds whose true rates deviate by "
        f"{own:.0f} points: {100 * seeds:.0f} points",
    ]
    for key, unit in UNITS.items():
        least = detectable_mean(config.trainings, config.spread[key])
        lines.append(
            f"- {key}, Student's t, deviation {config.spread[key]:g} between training seeds: "
            f"{least:.2g} {unit}"
        )
    return lines
