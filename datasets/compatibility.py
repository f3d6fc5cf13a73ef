"""Do the statistics of a checkpoint fit other data? What finetune.py asks before it trains.

By dimension of action and tool position, of their 1 % and 99 % quantiles:

    range ratio  (q99 - q01) of the data over that of the checkpoint
    offset       between the middles of both ranges, in half ranges of the checkpoint

| verdict | when | what scaling with the checkpoint's statistics would do |
|---|---|---|
| fits | ratio within 1/2 .. 2, offset below 1/2 | little |
| narrow | ratio below 1/2 | the data fill a small part of -1 .. 1: weak learning signal |
| wide | ratio above 2 | actions are clipped |
| shifted | offset of 1/2 or more | actions are clipped at one end |
| constant there | the checkpoint's is constant, the data's is not | the dimension is lost |
| constant here | the data's is constant | nothing to learn in it |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from selfflow.datasets.normalize import CONSTANT, CONVENTIONS, Statistics
from selfflow.datasets.spec import ACTION_NAMES, GRIPPER, TOOL_POSITION, UserError

RATIO, OFFSET = 2.0, 0.5
HARMLESS, ALONE = ("fits", "constant here"), "constant there"


@dataclass(frozen=True)
class Comparison:
    """One dimension."""

    name: str
    ratio: float
    offset: float
    verdict: str

    @property
    def same(self) -> bool:
        """Whether they are equal, as of the same data."""
        return self.verdict == "fits" and abs(self.ratio - 1) < 1e-6 and abs(self.offset) < 1e-6

    @property
    def fits(self) -> bool:
        """Whether the checkpoint's statistics serve the data in this dimension."""
        return self.verdict in HARMLESS


def compare(theirs: Statistics, data: Statistics) -> list[Comparison]:
    """A checkpoint's statistics and the data's in all that is scaled: the action's six arm
    dimensions, and the tool's position where both sense it."""
    pairs = list(
        zip(
            ACTION_NAMES[:GRIPPER],
            zip(theirs.action_q01, theirs.action_q99, strict=True),
            zip(data.action_q01, data.action_q99, strict=True),
            strict=False,
        )
    )
    if _sensed(theirs) and _sensed(data):
        there = list(zip(theirs.proprio_q01, theirs.proprio_q99, strict=True))[TOOL_POSITION]
        here = list(zip(data.proprio_q01, data.proprio_q99, strict=True))[TOOL_POSITION]
        pairs += list(zip(("x", "y", "z"), there, here, strict=True))
    return [_dimension(*pair) for pair in pairs]


def _sensed(stat: Statistics) -> bool:
    return set(stat.proprio_q01) != {-1.0} or set(stat.proprio_q99) != {1.0}


def conventions(theirs: Statistics, data: Statistics) -> list[str]:
    """What both say differently of rate, frame, rotation, gripper and limits."""
    return [
        f"{key} is {getattr(theirs, key)} there, {getattr(data, key)} here"
        for key in CONVENTIONS
        if getattr(theirs, key) != getattr(data, key)
    ]


def table(title: str, rows: Sequence[Comparison]) -> Table:
    """The comparison to print."""
    found = Table(title=title, title_justify="left")
    for heading in ("dimension", "range ratio", "offset", "verdict"):
        found.add_column(
            heading, justify="left" if heading in ("dimension", "verdict") else "right"
        )
    for row in rows:
        found.add_row(row.name, f"{row.ratio:.2f}", f"{row.offset:+.2f}", row.verdict)
    return found


def settle(
    data: Mapping[str, Statistics],
    init: Mapping[str, Statistics],
    scale_by: str | None,
    where: str,
) -> dict[str, Statistics]:
    """Statistics to train with on `data` from the checkpoint at `where`, which has `init`.

    Prints the comparison for every robot that both know. Where they fit, or `scale_by` is "data",
    the data's own; with "init" the checkpoint's. Raises UserError where they do not fit and
    `scale_by` does not say which, or where "init" has none, or of another action space.
    """
    chosen = dict(data)
    for name, own in data.items():
        if name not in init:
            if scale_by == "init":
                have = ", ".join(sorted(init))
                raise UserError(f"scale_by=init: init={where} has none for {name}; only [{have}]")
            print(f"statistics of {name}: the data's; init={where} has none")
            continue
        differ, rows = conventions(init[name], own), compare(init[name], own)
        if all(row.same for row in rows) and not differ:
            continue
        console = Console()
        console.print(table(f"statistics of {name}: the data against init={where}", rows))
        misfits = [f"{row.name} {row.verdict}" for row in rows if not row.fits]
        if differ and scale_by != "data":
            raise UserError(
                f"init={where} means another action space by {name}: {'; '.join(differ)}; "
                "scale_by=data scales by the data and learns it anew"
            )
        if misfits and scale_by is None:
            raise UserError(
                f"init={where} has other statistics of {name}: {', '.join(misfits)}; "
                "choose scale_by=data (its scale is learned anew) or init (kept, the rest clipped)"
            )
        if scale_by == "init":
            chosen[name] = init[name]
    return chosen


def _dimension(name: str, there: tuple[float, float], here: tuple[float, float]) -> Comparison:
    span, own = there[1] - there[0], here[1] - here[0]
    if span < CONSTANT:
        same = own < CONSTANT and abs(here[0] - there[0]) < CONSTANT
        return Comparison(name, 1.0 if same else float("inf"), 0.0, "fits" if same else ALONE)
    ratio, offset = own / span, (sum(here) - sum(there)) / span
    if own < CONSTANT:
        verdict = "constant here" if abs(offset) <= 1 else "shifted"
    elif abs(offset) >= OFFSET:
        verdict = "shifted"
    elif ratio > RATIO:
        verdict = "wide"
    else:
        verdict = "narrow" if ratio < 1 / RATIO else "fits"
    return Comparison(name, ratio, offset, verdict)
