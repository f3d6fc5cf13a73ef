"""python eval/ablation_report.py   (reads docs/ablation/records.jsonl, runs nothing)

Writes what the finished runs of eval/ablation.py say into its document, between two markers, and
plots as PNG beside the records. An arm that lacks a job is counted, and nothing of it is
shown. Keys: configs/ablation.yaml, as for eval/ablation.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from selfflow.configs.entry import launch
from selfflow.datasets.spec import UserError
from selfflow.eval.ablation_config import ARMS, MAIN, REFERENCE, AblationConfig, check_plan
from selfflow.eval.ablation_curves import (
    KINDS,
    curve_tables,
    markdown,
    plot,
    plot_success,
    points,
    pretrainings,
    rolled,
)
from selfflow.eval.ablation_plan import FINETUNE, PRETRAIN, VIDEO, Run, planned
from selfflow.eval.ablation_records import (
    Record,
    check_records,
    curve_of,
    number,
    read_records,
)
from selfflow.eval.ablation_stats import ALPHA, holm, mcnemar, paired_t
from selfflow.eval.report import wilson
from selfflow.eval.results import write_text

START, END = "<!-- ablation: results -->", "<!-- ablation: end -->"
Arms = dict[tuple[str, str], list[Run]]  # (size, arm) -> its runs, by seed
# what each arm is compared with: the question, then what varies beside it
FAMILIES = {
    f"Against {REFERENCE}": [(arm, REFERENCE) for arm in ARMS if arm != REFERENCE],
    "Within Self-Flow": [
        ("self_flow_kept", "self_flow"),
        ("self_flow_full_kept", "self_flow_full"),
        ("self_flow_full", "self_flow"),
    ],
}


@dataclass(frozen=True)
class Compared:
    """Success of two arms after the whole fine-tuning."""

    arm: str
    other: str
    wins: int  # pairs (training seed, evaluation seed) that only `arm` succeeded at
    losses: int
    p: float  # McNemar's, exact
    by_seed: list[float]  # differences of the success rates


def check(config: AblationConfig) -> None:
    """Raises UserError for what makes no plan, for records of another config, and for a document
    without the markers."""
    check_plan(config)
    jobs = [job for run in planned(config) for job in run.jobs]
    check_records(config, jobs, read_records(Path(config.records)))
    path = Path(config.document)
    if path.is_file():
        _around(path)


def main(config: AblationConfig) -> None:
    """Writes document and plots; says where the document lies."""
    records = read_records(Path(config.records))
    runs = planned(config)
    arms = complete(runs, records)
    done = sum(all(job.name in records for job in run.jobs) for run in runs)
    parts = [head(runs, done, arms)]
    if arms:
        parts += [success_table(arms, records)]
        parts += [plotted(config, "success", "Success by arm", plot_success, arms, records)]
        parts += [*comparisons(arms, records), *measures(arms, records)]
        parts += [by_size(arms, records), *curve_tables(arms, records)]
        title = "Curves of the pretraining against steps and minutes"
        parts += [plotted(config, "curves", title, plot, arms, records)]
    document(Path(config.document), "\n\n".join(part for part in parts if part))
    print(f"{done} runs of {len(runs)} planned are done; report: {config.document}")


def plotted(
    config: AblationConfig,
    name: str,
    title: str,
    draw: Callable[[Path, Arms, dict[str, Record]], bool],
    *given: Any,
) -> str:
    """Draws NAME.png beside the records; its line in the document, none where nothing was drawn."""
    image = Path(config.records).with_name(f"{name}.png")
    link = os.path.relpath(image, Path(config.document).parent)
    return f"![{title}]({link})" if draw(image, *given) else ""


def complete(runs: list[Run], records: dict[str, Record]) -> Arms:
    """The arms whose runs are all done."""
    arms: Arms = {}
    for run in runs:
        arms.setdefault((run.size, run.arm), []).append(run)
    return {
        key: own
        for key, own in arms.items()
        if all(job.name in records for run in own for job in run.jobs)
    }


def head(runs: list[Run], done: int, arms: Arms) -> str:
    """What there is, and what is not shown."""
    everyone = dict.fromkeys((run.size, run.arm) for run in runs)
    missing = [f"{arm} ({size})" for size, arm in everyone if (size, arm) not in arms]
    lines = [f"**{done} runs of {len(runs)} planned are done.**"]
    if missing:
        lines.append(f"Not complete, so nothing of them is shown: {', '.join(missing)}.")
    return " ".join(lines)


def success_table(arms: Arms, records: dict[str, Record]) -> str:
    """Rates by fraction of the fine-tuning, all training seeds together."""
    rows = []
    for (size, arm), runs in arms.items():
        if size != MAIN:
            continue
        rates = []
        for outcomes in rolled(runs, records).values():
            low, high = wilson(sum(outcomes), len(outcomes))
            rate = sum(outcomes) / len(outcomes)
            rates.append(
                f"{sum(outcomes)}/{len(outcomes)}: {_percent(rate)} "
                f"({_percent(low)}–{_percent(high)})"
            )
        last = [records[run.rollouts[-1].name] for run in runs]
        seeds = ", ".join(_percent(fmean(r["success"])) for r in last)
        rows.append([arm, *rates, seeds, _progress(last), _minutes(runs, records)])
    if not rows:
        return ""
    marks = rolled(arms[MAIN, rows[0][0]], records)
    heads = ["arm", *(f"success after {mark} steps (Wilson 95 %)" for mark in marks)]
    heads += ["by training seed", "progress at the end", "training minutes a run"]
    note = "Wilson's interval takes episodes as independent; those of one seed are not quite."
    return "\n\n".join(["### Success", markdown(heads, rows), note])


def comparisons(arms: Arms, records: dict[str, Record]) -> list[str]:
    """Paired tests of each family; Holm's correction counts the planned pairs, done or not."""
    parts = []
    for title, pairs in FAMILIES.items():
        found = [compared(arms, records, *pair) for pair in pairs]
        adjusted = holm([c.p if c else 1.0 for c in found])
        rows = [_row(c, p) for c, p in zip(found, adjusted, strict=True) if c]
        if rows:
            heads = ["arms", "difference, points (95 %, t over training seeds)"]
            heads += ["by training seed", "won : lost pairs", "McNemar p", "Holm p", "verdict"]
            parts.append(f"### {title}\n\n{markdown(heads, rows)}")
    return parts


def compared(arms: Arms, records: dict[str, Record], arm: str, other: str) -> Compared | None:
    """None where one of the two is not complete. Episodes are paired by training seed and their own
    seed; a KeyError where the two were rolled out on others."""
    if not {(MAIN, arm), (MAIN, other)} <= arms.keys():
        return None
    sides = []
    for name in (arm, other):
        last = [records[run.rollouts[-1].name] for run in arms[MAIN, name]]
        sides.append([dict(zip(r["seeds"], r["success"], strict=True)) for r in last])
    both = list(zip(*sides, strict=True))
    one, two = zip(*((bool(a[s]), bool(b[s])) for a, b in both for s in a | b), strict=True)
    by_seed = [fmean(a.values()) - fmean(b.values()) for a, b in both]
    return Compared(arm, other, *mcnemar(one, two), by_seed)


def verdict(c: Compared, adjusted: float) -> str:
    """Decided before looking: told apart if Holm's p is below alpha and all seeds agree."""
    agree = all(d > 0 for d in c.by_seed) or all(d < 0 for d in c.by_seed)
    if adjusted >= ALPHA or not agree:
        return "not told apart"
    return "better" if c.by_seed[0] > 0 else "worse"


def measures(arms: Arms, records: dict[str, Record]) -> list[str]:
    """World model and policy by training seed: means, and paired differences to the reference."""
    if (MAIN, REFERENCE) not in arms:
        return []
    values = {arm: measured(runs, records) for (size, arm), runs in arms.items() if size == MAIN}
    heads = ["arm", *dict.fromkeys(column for own in values.values() for column in own)]
    means, differences = [], []
    for arm, own in values.items():
        cells = {k: f"{fmean(v):.3f} ({min(v):.3f}–{max(v):.3f})" for k, v in own.items()}
        means.append([arm, *(cells.get(k, "-") for k in heads[1:])])
        if arm == REFERENCE:
            continue
        row = [arm]
        for key in heads[1:]:
            pairs = list(zip(own.get(key, []), values[REFERENCE][key], strict=False))
            row.append(_difference([a - b for a, b in pairs]) if pairs else "-")
        differences.append(row)
    parts = [f"### Measures at the end, mean (least–most) of the seeds\n\n{markdown(heads, means)}"]
    if differences:
        title = (
            f"### Differences to {REFERENCE}, paired by training seed (95 %, t; p not corrected)"
        )
        parts.append(f"{title}\n\n{markdown(heads, differences)}")
    return parts


def measured(runs: list[Run], records: dict[str, Record]) -> dict[str, list[float]]:
    """By name of the measure, a value a training seed."""
    found: dict[str, list[float]] = {}
    for run in runs:
        values = {}
        if any(job.kind == PRETRAIN for job in run.jobs):
            curve = records[_curve(run)]
            values["held-out loss"] = curve_of(curve, "loss")[1][-1]
            values["probe R²"] = curve_of(curve, "probe")[1][-1]
            cells = list(records[run.job(VIDEO).name]["cells"].values())[-1]
            shown = [k for k in cells if k.endswith("all frames") or k.startswith("fvd")]
            values |= {k.replace(", all frames", ""): number(cells, k) for k in shown}
        last = records[run.job(FINETUNE).name]["log"][-1]
        values["action loss of fine-tuning"] = last.get("policy", last["loss"])
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def by_size(arms: Arms, records: dict[str, Record]) -> str:
    """Ends of the curves at every size: each pretraining against the reference of its seeds."""
    rows = []
    for size in dict.fromkeys(size for size, _ in arms):
        ends = {
            name: [[points(run, kind, "steps", records)[1][-1] for run in runs] for kind in KINDS]
            for name, runs in pretrainings(arms, size).items()
        }
        base = ends.pop(REFERENCE, None)
        for name, own in ends.items() if base else ():
            cells = []
            for mine, theirs in zip(own, base or (), strict=True):
                change = _difference([a - b for a, b in zip(mine, theirs, strict=True)])
                cells += [f"{fmean(theirs):.3f}", f"{fmean(mine):.3f}", change]
            rows.append([size, name, *cells])
    if len({row[0] for row in rows}) < 2:  # of one size it is in the tables above
        return ""
    heads = ["size", "pretraining"]
    for title, _ in KINDS.values():
        heads += [f"{title}: {REFERENCE}", "this one", "difference (95 %, t), p not corrected"]
    return f"### Ends of the curves by size\n\n{markdown(heads, rows)}"


def document(path: Path, text: str) -> None:
    """Puts the text between the markers; a new document is just that."""
    before, after = _around(path) if path.is_file() else ("", "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{before}{START}\n{text}\n{END}{after}")


def _around(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"document={path}: has no lines {START} and {END}; add them")
    return before, after


def _row(c: Compared, adjusted: float) -> list[str]:
    seeds = ", ".join(f"{100 * d:+.0f}" for d in c.by_seed)
    mean, low, high, _ = paired_t([100 * d for d in c.by_seed])
    interval = f"{mean:+.1f} ({low:+.0f} … {high:+.0f})"
    numbers = [f"{c.wins} : {c.losses}", f"{c.p:.3g}", f"{adjusted:.3g}", verdict(c, adjusted)]
    return [f"{c.arm} − {c.other}", interval, seeds, *numbers]


def _difference(values: list[float]) -> str:
    mean, low, high, p = paired_t(values)
    return f"{mean:+.3f} ({low:+.3f} … {high:+.3f}), p {p:.2g}"


def _curve(run: Run) -> str:
    return run.job("curve").name


def _progress(records: list[Record]) -> str:
    names = records[0]["progress"]
    return ", ".join(
        f"{name} {fmean(x for r in records for x in r['progress'][name]):.2f}" for name in names
    )


def _minutes(runs: list[Run], records: dict[str, Record]) -> str:
    """Of pretraining and fine-tuning: steps times the median second of a step."""
    found = []
    for run in runs:
        # the first pretraining of repa's run is its teacher's
        jobs = [j for j in run.jobs if j.kind == FINETUNE]
        jobs += [j for j in run.jobs if j.kind == PRETRAIN][-1:]
        found.append(sum(records[j.name]["steps"] * records[j.name]["step_s"] for j in jobs) / 60)
    return f"{fmean(found):.0f}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


if __name__ == "__main__":
    launch(AblationConfig, main, "ablation", check=check)
