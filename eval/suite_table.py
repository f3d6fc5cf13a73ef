"""The table of a whole SIMPLER evaluation (eval/suite.py), for the terminal and as markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfflow.eval.report import shading, wilson

Row = dict[str, Any]
HEAD = ("task", "variant", "colouring", "last step", "early stop", "ever", "of", "%, 95 % interval")


def tallies(rows: Sequence[Row], groups: Mapping[str, Sequence[str]]) -> dict[str, Row]:
    """Episodes, successes in the three readings and the interval of the last step's, by group of
    tasks, over the variants that the paper averages; groups without an episode are left out."""
    found = {}
    for group, tasks in groups.items():
        mine = [row for row in rows if row["task"] in tasks and row["counts"]]
        if not mine:
            continue
        episodes = sum(row["episodes"] for row in mine)
        readings = {
            reading: sum(row["successes_by_reading"][reading] for row in mine)
            for reading in ("last_step", "early_stop", "ever")
        }
        interval = wilson(readings["last_step"], episodes)
        found[group] = {"episodes": episodes, "wilson_95": interval} | readings
    return found


def table_rows(summary: Row) -> tuple[tuple[str, ...], list[list[tuple[str, ...]]]]:
    """Head, and three groups of rows: variants where some task has several, tasks, families."""
    variants = [
        (row["task"], row["variant"], _short(row["urdf_version"]), *_numbers(row | by))
        for row in summary["variants"]
        for by in [row["successes_by_reading"]]
    ]
    several = len(variants) > len(summary["tasks"])
    more = ("all", "all") if several else ()
    groups = [
        [(name, *more, *_numbers(row)) for name, row in group.items()]
        for group in (summary["tasks"], summary["families"])
    ]
    head = HEAD if several else (HEAD[0], *HEAD[3:])
    return head, [variants if several else [], *groups]


def _numbers(row: Row) -> tuple[str, ...]:
    low, high = (100 * bound for bound in row["wilson_95"])
    counts = (row["last_step"], row["early_stop"], row["ever"], row["episodes"])
    rate = 100 * row["last_step"] / row["episodes"]
    return *map(str, counts), f"{rate:.1f} ({low:.1f} to {high:.1f})"


def _short(colouring: str) -> str:
    return colouring.replace("recolor_", "").replace("visual_matching_", "") or "-"


def title(summary: Row) -> str:
    """What was evaluated, in which colouring and shading, how often."""
    policy = summary["checkpoint"] or summary["policy"]
    look = f"colouring {summary['urdf_version']}, shading {shading(summary)}"
    count = sum(row["episodes"] for row in summary["variants"])
    suite = summary["suite"].replace("_", " ")
    return f"SIMPLER, {suite}, {look}, policy {policy}, {count} trials"


def show(summary: Row, console: Console) -> None:
    """Prints the success of every variant, task and family, and what was not run."""
    table = Table(title=title(summary), title_justify="left")
    head, groups = table_rows(summary)
    for name in head:
        table.add_column(name, overflow="fold")
    for rows, style in zip(groups, (None, None, "bold"), strict=True):
        for cells in rows:
            table.add_row(*cells, style=style)
        table.add_section()
    if summary["variants"]:
        console.print(table)
    for line in remarks(summary):
        console.print(escape(line), soft_wrap=True)


def markdown(summary: Row) -> str:
    """What `show` prints, to be pasted into a document."""
    lines = [title(summary), ""]
    if summary["variants"]:
        head, (*most, families) = table_rows(summary)
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(cells)} |" for rows in most for cells in rows]
        lines += [f"| **{cells[0]}** | {' | '.join(cells[1:])} |" for cells in families]
        lines.append("")
    for line in remarks(summary):
        lines += [f"- {line.strip()}"] if line.startswith(" ") else [line, ""]
    return "\n".join([*lines, ""])


def remarks(summary: Row) -> list[str]:
    """Which scores are not comparable, or on photographs seen; what was not run and why."""
    apart = sorted({r["task"] for r in summary["variants"] if r["paper_shader"] != r["shader"]})
    lines = []
    if apart:
        tasks = ", ".join(apart)
        lines.append(f"Not comparable with published scores, which are ray-traced: {tasks}")
    if "rt" in {row["shader"] for row in summary["variants"]}:
        lines.append("Ray-traced, without the denoiser of published scores: parity is not checked")
    seen = sorted({r["task"] for r in summary["variants"] if r.get("photographs_seen")})
    if seen:
        lines.append(f"Photographs seen in training: {', '.join(seen)}")
    counts: dict[tuple[str, str, str], int] = {}
    for row in summary["not_run"]:
        key = (row["task"], row["name"], row["reason"])
        counts[key] = counts.get(key, 0) + row["cells"]
    if counts:
        lines.append(f"Not run: {sum(counts.values())} trials")
    for (task, name, reason), trials in counts.items():
        lines.append(f"  {task}, {name}: {trials} trials: {reason}")
    return lines
