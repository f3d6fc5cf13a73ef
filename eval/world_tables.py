"""Tables and plots of eval/world_model.py: estimates with intervals, paired differences."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.table import Table

from selfflow.datasets.spec import ACTION_NAMES
from selfflow.eval.bootstrap import Estimate, average, difference, estimate, mean, resamples
from selfflow.eval.chart import Line, Panel, save_chart
from selfflow.eval.held_loss import HeldLosses
from selfflow.eval.images import frechet
from selfflow.eval.open_loop import ActionErrors, VideoScores
from selfflow.eval.probe import TARGETS, Row
from selfflow.eval.video_metrics import weighted_moments

FVD_RESAMPLES = 100  # each takes two eigendecompositions
UNITS = ("m", "m", "m", "rad", "rad", "rad", "opening")  # of an action's dimensions


@dataclass(frozen=True)
class Section:
    """One table: rows by name, each an estimate in every column (None: does not apply)."""

    key: str
    title: str
    columns: list[str]
    rows: list[tuple[str, list[Estimate | None]]]
    digits: int = 3
    printed: bool = True  # else in files only

    def content(self) -> list[dict[str, Any]]:
        """For JSON: a record a cell."""
        return [
            {"row": name, "column": column}
            | {k: _number(getattr(e, k)) for k in ("value", "low", "high")}
            for name, cells in self.rows
            for column, e in zip(self.columns, cells, strict=True)
            if e is not None
        ]

    def table(self) -> Table:
        """For the terminal."""
        out = Table(title=self.title, title_justify="left")
        out.add_column(style="bold")
        for column in self.columns:
            out.add_column(column.replace(", ", "\n").replace(": ", "\n"), no_wrap=True)
        for name, cells in self.rows:
            out.add_row(name, *(self._cell(e, "\n") for e in cells))
        return out

    def markdown(self) -> str:
        """For a file."""
        lines = [f"## {self.title}", "", "| | " + " | ".join(self.columns) + " |"]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        lines += [
            f"| {name} | " + " | ".join(self._cell(e) for e in cells) + " |"
            for name, cells in self.rows
        ]
        return "\n".join(lines) + "\n"

    def _cell(self, e: Estimate | None, space: str = " ") -> str:
        if e is None:
            return "-"
        value, low, high = (f"{x:.{self.digits}f}" for x in (e.value, e.low, e.high))
        return f"{value}{space}{low}…{high}"


def video(scores: Sequence[Sequence[VideoScores]], episodes: int, count: int, seed: int) -> Section:
    """Means over imagined frames, first frame and all; then differences to the first checkpoint."""
    weights = resamples(episodes, count, seed)
    own, still = [pair[0] for pair in scores], scores[0][1]
    metrics = list(still.frames)
    columns = [f"{m}, {which}" for m in metrics for which in ("first frame", "all frames")]

    def cells(s: VideoScores) -> list[Estimate]:
        n = next(iter(s.frames.values())).shape[1]
        found = []
        for metric in metrics:
            found.append(mean(s.frames[metric][:, 0], s.episode, weights))
            found.append(mean(s.frames[metric].ravel(), np.repeat(s.episode, n), weights))
        return [*found, _fvd(s, weights[:FVD_RESAMPLES])]

    table = {s.name: cells(s) for s in (*own, still)}
    clips, features = still.features.shape
    rows = [*table.items(), *_differences({s.name: table[s.name] for s in own})]
    title = f"Imagined video ({clips} clips, {still.fvd} of {features} features)"
    return Section("video", title, [*columns, still.fvd], [(k, [*v]) for k, v in rows])


def actions(errors: Sequence[ActionErrors], episodes: int, count: int, seed: int) -> Section:
    """Mean absolute error by dimension: of the first action, and of the whole chunk."""
    weights = resamples(episodes, count, seed)
    columns = [f"{name} ({unit})" for name, unit in zip(ACTION_NAMES, UNITS, strict=True)]

    def cells(e: np.ndarray, episode: Int[np.ndarray, "B"], first: bool) -> list[Estimate]:
        part = e[:, :1] if first else e
        numbers = np.repeat(episode, part.shape[1])
        return [mean(part[..., d].ravel(), numbers, weights) for d in range(part.shape[2])]

    rows: list[tuple[str, list[Estimate]]] = []
    for first, which in ((True, "first action"), (False, "chunk mean")):
        own = {f"{e.name}, {which}": cells(e.errors, e.episode, first) for e in errors}
        rows += [*own.items(), *_differences(own)]
        rows.append((f"no motion, {which}", cells(errors[0].still, errors[0].episode, first)))
    return Section(
        "actions",
        "Open-loop action error (mean absolute)",
        columns,
        [(k, [*v]) for k, v in rows],
        4,
    )


def loss(losses: Sequence[HeldLosses], episodes: int, count: int, seed: int) -> Section:
    """Mean flow loss of each target modality; then differences to the first checkpoint."""
    weights = resamples(episodes, count, seed)
    columns = list(losses[0].losses)
    own = {e.name: [mean(e.losses[name], e.episode, weights) for name in columns] for e in losses}
    rows = [*own.items(), *_differences(own)]
    return Section("loss", "Held-out flow loss", columns, _rows(rows), 4)


def probe(rows: Sequence[Row], names: Sequence[str]) -> list[Section]:
    """R² by block; then its mean over the blocks, and differences of that mean."""
    out = []
    for pooling, title in (("grid", "Linear probe"), ("mean", "Linear probe of the mean token")):
        own = [row for row in rows if row.pooling == pooling]
        kinds = list(dict.fromkeys((r.tokens, r.tau) for r in own))
        columns = {(k, t): f"{_kind(k)}: {t}" for k in kinds for t in TARGETS}
        found = {(r.name, r.layer, (r.tokens, r.tau), r.target): r.estimate for r in own}
        everyone = list(dict.fromkeys(r.name for r in own))
        depth = {n: max(r.layer for r in own if r.name == n) for n in everyone}
        table = {
            f"{n}, block {k}": [found[n, k, *column] for column in columns]
            for n in everyone
            for k in range(depth[n] + 1)
        }
        averages = {
            n: [
                average([found[n, k, *column] for k in range(1, depth[n] + 1)])
                for column in columns
            ]
            for n in everyone
        }
        summary = [*averages.items(), *_differences({n: averages[n] for n in names})]
        heads = [*columns.values()]
        key = "probe" if pooling == "grid" else "probe_mean_token"
        out.append(
            Section(f"{key}_summary", f"{title}: R², mean over blocks", heads, _rows(summary))
        )
        blocks = f"{title}: R² by block"
        out.append(Section(key, blocks, heads, _rows(table.items()), printed=False))
    return out


def plot_video(
    path: Path, scores: Sequence[Sequence[VideoScores]], episodes: int, count: int, seed: int
) -> None:
    """Each metric by imagined frame: how fast a future goes astray."""
    weights = resamples(episodes, count, seed)
    everyone = [*(pair[0] for pair in scores), scores[0][1]]
    panels = []
    for metric in everyone[0].frames:
        lines = []
        for s in everyone:
            columns = s.frames[metric].T
            found = [mean(column, s.episode, weights) for column in columns]
            numbers = ([getattr(e, k) for e in found] for k in ("value", "low", "high"))
            lines.append(Line(s.name, range(1, len(columns) + 1), *numbers))
        title = "psnr (dB)" if metric == "psnr" else metric
        panels.append(Panel(f"{title}, 95 % intervals", "imagined frame", lines))
    save_chart(panels, path, columns=len(panels))


def plot_probe(path: Path, rows: Sequence[Row]) -> None:
    """R² by block, a panel a target and kind of token."""
    own = [row for row in rows if row.pooling == "grid"]
    panels = []
    for target in TARGETS:
        for kind in dict.fromkeys((r.tokens, r.tau) for r in own):
            lines = []
            for name in dict.fromkeys(r.name for r in own):
                line = [
                    r for r in own if (r.name, r.tokens, r.tau, r.target) == (name, *kind, target)
                ]
                numbers = [[getattr(r, k) for r in line] for k in ("layer", "r2", "low", "high")]
                lines.append(Line(name, *numbers))
            title = f"R2 of {target}, {_kind(kind)}, 95 % intervals"  # the font has no ²
            panels.append(Panel(title, "block (0: the codec's tokens)", lines))
    save_chart(panels, path, columns=len(panels) // len(TARGETS))


def write_markdown(path: Path, sections: Sequence[Section], notes: Sequence[str]) -> None:
    """All tables and notes in one file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    text = "\n".join([*(s.markdown() for s in sections), *(f"- {note}" for note in notes)])
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def _fvd(s: VideoScores, weights: Int[np.ndarray, "R E"]) -> Estimate:
    """Fréchet distance of the clips' features; resampling moves it, so ± 1.96 standard errors."""

    def statistic(rows: np.ndarray) -> np.ndarray:
        return np.array(
            [
                frechet(
                    *weighted_moments(s.features, w[s.episode]),
                    *weighted_moments(s.real_features, w[s.episode]),
                )
                for w in rows
            ]
        )

    return estimate(statistic, weights, centred=True)


def _differences(table: dict[str, list[Estimate]]) -> list[tuple[str, list[Estimate]]]:
    """Every row but the first, minus the first."""
    (name, first), *others = table.items()
    return [
        (f"{other} − {name}", [difference(a, b) for a, b in zip(cells, first, strict=True)])
        for other, cells in others
    ]


def _number(x: float) -> float | None:
    return x if np.isfinite(x) else None  # JSON has no nan


def _rows(cells: Any) -> list[tuple[str, list[Estimate | None]]]:
    return [(name, [*row]) for name, row in cells]


def _kind(kind: tuple[str, float]) -> str:
    tokens, tau = kind
    return tokens if tokens == "context" else f"{tokens} tau={tau:g}"
