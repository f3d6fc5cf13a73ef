"""Streaming statistics, warnings about data, and the entry point that writes both."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfflow.configs.entry import compose
from selfflow.datasets.data_checks import Checks, own_rate, warnings
from selfflow.datasets.episodes import Metadata, Signals, no_signals
from selfflow.datasets.normalize import Tally, fit, load
from selfflow.datasets.quantiles import ERROR, SMALLEST, Columns
from selfflow.datasets.reference import FILE, reference_of, references
from selfflow.datasets.rotations import canonical
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.stats import StatsConfig, chosen, main

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared/samples"
RNG = np.random.default_rng(0)
STREAMS = {
    "normal": RNG.normal(0.02, 0.05, 30_000),
    "heavy": RNG.standard_t(1.5, 30_000) * 0.01,
    "gripper": (RNG.random(30_000) < 0.3).astype(float),
    "mostly zero": RNG.normal(size=30_000) * (RNG.random(30_000) < 0.1),
    "constant": np.full(30_000, -0.37),
    "large": RNG.uniform(-3000, 20, 30_000),
}


def totals(values: np.ndarray, exact: int) -> Columns:
    columns = Columns(values.shape[1], exact)
    for part in np.array_split(values, 37):
        columns.add(part)
    return columns


def test_all_but_quantiles_are_exact_whatever_the_stream() -> None:
    values = np.stack(list(STREAMS.values()), axis=1)
    for exact in (10**6, 1000):
        found = totals(values, exact)
        np.testing.assert_allclose(found.mean(), values.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.std(), values.std(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(found.low(), values.min(0))
        np.testing.assert_array_equal(found.high(), values.max(0))
    np.testing.assert_array_equal(
        totals(values, 10**6).quantile(0.01), np.quantile(values, 0.01, axis=0)
    )


@pytest.mark.parametrize("name", STREAMS)
def test_quantiles_beyond_memory_keep_the_stated_error(name: str) -> None:
    """Against the value at the rank below, in a stream that is not kept."""
    values = STREAMS[name]
    found = totals(values[:, None], exact=1000)
    for share in (0.0, 0.01, 0.25, 0.5, 0.99, 1.0):
        true = np.quantile(values, share, method="lower")
        assert abs(found.quantile(share)[0] - true) <= abs(true) * ERROR * 1.001 + SMALLEST
    order = np.random.default_rng(1).permutation(len(values))
    assert totals(values[order][:, None], 1000).quantile(0.99) == found.quantile(0.99)


def test_histograms_count_every_value_in_range() -> None:
    values = STREAMS["normal"][:, None]
    for exact in (10**6, 1000):
        counts = totals(values, exact).histogram(0, -0.1, 0.1, 20)
        inside = ((values > -0.1) & (values < 0.1)).sum()
        assert abs(int(counts.sum()) - inside) <= 0.002 * len(values)
        assert counts.argmax() in (11, 12)


class Recorded:
    """Episodes of a robot that does what it is told, or of one whose record is wrong."""

    skipped = 0
    cameras = ("overhead_camera",)
    embodiment = EMBODIMENTS["google_robot"]
    measures = ("timestamp",)

    def __init__(self, name: str = "fake", wrong: str = "", episodes: int = 20) -> None:
        self.name, self._wrong, self._episodes = name, wrong, episodes

    def __len__(self) -> int:
        return self._episodes

    def length(self, i: int) -> int:
        return 30

    def frames(self, i: int, steps: object, camera: str | None = None) -> list[np.ndarray]:
        return []

    def metadata(self, i: int) -> Metadata:
        return {"fps": 30.0 if self._wrong == "rate" else 3.0}

    def measured(self, i: int, key: str) -> np.ndarray | None:
        times = np.arange(30) / 10 + 1e9
        return times[:, None] if self._wrong == "timestamps" else None

    def signals(self, i: int) -> Signals:
        rng, t = np.random.default_rng(i), 30
        scale = np.array([0.08] * 3 + [0.15] * 3)
        actions = np.column_stack([rng.normal(size=(t, 6)) * scale, np.ones(t)])
        actions[10 + i % 5 : 20, 6] = 0
        opening = np.ones(t)
        for s in range(t - 1):
            opening[s + 1] = np.clip(opening[s] + 0.5 * np.sign(actions[s, 6] - opening[s]), 0, 1)
        position = np.cumsum(actions[:, :3], axis=0) - actions[:, :3]
        proprio = np.column_stack([position, np.tile(canonical([1, 0, 0, 0]), (t, 1)), opening])
        match self._wrong:
            case "gripper":
                actions[:, 6] = 1 - actions[:, 6]
            case "unrelated":
                actions[:, 6] = rng.random(t) < 0.5
            case "both":
                actions[:, 6], proprio[:, 7] = 1 - actions[:, 6], 1 - proprio[:, 7]
            case "signs":
                actions[:, 6] = 2 * actions[:, 6] - 1
            case "millimetres":
                actions[:, :3] *= 1000
            case "scaled":
                actions[:, :3] /= 500
            case "flipped":
                actions[:, 1] *= -1
            case "constant":
                actions[:, 2] = 0.01
            case "rare":
                actions[:, 3] = 0.0
                actions[0, 3] = 0.2 * (i == 0)
        return Signals(
            proprio=proprio.astype(np.float32),
            proprio_valid=np.ones(t, bool),
            actions=actions.astype(np.float32),
            action_valid=np.ones(t, bool),
            terminate=np.zeros(t, bool),
            instruction=["x"] * t,
        )


def signs(source: Recorded) -> list[str]:
    tally, checks = Tally(source.embodiment), Checks()
    for i in range(len(source)):
        tally.add(source, source.signals(i))
        checks.add(source, i, source.signals(i))
    return warnings(tally, checks, reference_of(source.embodiment.name))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("", []),
        ("gripper", ["gripper inverted"]),
        ("unrelated", ["gripper unrelated"]),
        ("both", ["gripper closed at the start of 20 of 20"]),
        ("signs", ["gripper targets are -1 .. 1"]),
        (
            "millimetres",
            ["scale: dx", "scale: dy", "scale: dz", "range: dx", "range: dy", "range: dz"],
        ),
        ("scaled", ["scale: dx", "scale: dy", "scale: dz", "range: dx", "range: dy", "range: dz"]),
        ("flipped", ["motion reversed: dy"]),
        ("constant", ["constant: dz is 0.01"]),
        ("rare", ["q01 = q99: 98 % of rx are 0"]),
        ("rate", ["rate: 20 of 20 episodes looked at have 30 steps/s, google_robot has 3"]),
        ("timestamps", ["rate: 20 of 20 episodes looked at have 10 steps/s"]),
    ],
)
def test_each_fault_gives_its_own_warning(wrong: str, expected: list[str]) -> None:
    found = signs(Recorded(wrong=wrong))
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_real_bridge_data_give_no_warning_and_fit_the_published_ranges() -> None:
    folder = SAMPLES / "octo_bridge_debug"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    source = open_source(str(folder))
    tally, checks = Tally(source.embodiment), Checks()
    for i in range(len(source)):
        tally.add(source, source.signals(i))
        checks.add(source, i, source.signals(i))
    assert warnings(tally, checks, reference_of("widowx")) == []
    assert checks.following().min() > 0.8  # the arm does what the actions say
    assert (checks.towards, checks.away) == (38, 0)
    assert own_rate(source, 0) in (None, 5.0)


def test_statistics_of_the_entry_point_are_those_of_training(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = main(StatsConfig(source=str(store), out=str(tmp_path / "stats")))
    assert load(out / "stats.json") == fit([open_source(str(store))])
    with Image.open(out / "histograms.png") as image:
        assert image.size == (8 * 240, 2 * 176)
        assert len(np.unique(np.asarray(image))) > 20  # something is drawn
    printed = capsys.readouterr().out
    assert "gripper_open" in printed
    assert "stats.json" in printed
    assert sorted(p.name for p in out.iterdir()) == ["histograms.png", "stats.json"]
    main(StatsConfig(source=str(store), out=str(out), episodes=1))
    assert load(out / "stats.json")["google_robot"].n == 12
    assert chosen(100, 3) == [0, 50, 99]


def test_a_mixture_has_an_entry_for_every_robot(store: Path, tmp_path: Path) -> None:
    folder = SAMPLES / "octo_bridge_debug"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    main(StatsConfig(source=[f"{store}@0.9", str(folder)], out=str(tmp_path)))
    found = load(tmp_path / "stats.json")
    assert {name: stat.n for name, stat in found.items()} == {"google_robot": 24, "widowx": 225}
    with Image.open(tmp_path / "histograms.png") as image:
        assert image.size == (8 * 240, 4 * 176)


def test_mistakes_end_in_one_line_and_write_nothing(tmp_path: Path) -> None:
    clip = SAMPLES / "maniskill2_real2sim/rt1_real_standing_coke_can_1.mp4"
    if not clip.is_file():
        pytest.skip(f"{clip} is not there")
    out = tmp_path / "out"
    command = [sys.executable, "datasets/stats.py", f"source={clip}", f"out={out}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "no episode has a valid action" in run.stderr
    assert "its own arrays are none" in run.stdout
    assert len(run.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="no such path"):
        main(StatsConfig(source=str(tmp_path / "none"), out=str(out)))
    for overrides, message in (
        ([], "source=... is required"),
        ([f"source={clip}", "episodes=0"], "give at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            compose(StatsConfig, "stats", overrides)
    assert not out.exists()


def test_published_statistics_are_for_reference_only() -> None:
    assert set(references()) == {"fractal20220817_data", "bridge_dataset"}
    fractal = reference_of("google_robot")
    assert fractal is not None
    assert fractal.action["q99"][3] == pytest.approx(0.58927, abs=1e-5)  # rpy, as published
    assert fractal.steps == 3_786_400
    with pytest.raises(UserError, match="missing or unknown"):
        load(FILE)
    shared = SAMPLES / "stats/config"
    for reference in references().values():
        file = shared / f"{'fractal' if 'fractal' in reference.name else 'bridge'}_statistics.json"
        if not file.is_file():
            pytest.skip(f"{file} is not there")
        published = json.loads(file.read_text())
        for part, own in (("action", reference.action), ("proprio", reference.proprio)):
            for key, theirs in (("q01", "p01"), ("q99", "p99"), ("std", "std"), ("max", "max")):
                np.testing.assert_allclose(own[key], published[part][theirs], rtol=1e-5, atol=1e-9)


def test_a_value_that_is_not_finite_is_an_error() -> None:
    source = Recorded()
    broken = source.signals(0)
    broken.actions[3, 2] = np.nan
    with pytest.raises(UserError, match="fake: a valid action is not finite"):
        Tally(source.embodiment).add(source, broken)
    hidden = replace(broken, action_valid=np.arange(30) != 3)
    Tally(source.embodiment).add(source, hidden)
    empty = Tally(source.embodiment)
    empty.add(source, no_signals(["x"] * 4))
    assert empty.statistics() is None
