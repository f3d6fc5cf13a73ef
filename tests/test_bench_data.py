"""eval/bench/data.py: all sides run, loading processes are counted, bars are read right."""

import subprocess
import sys

import pytest
from rich.console import Console

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval.bench import data
from selfflow.eval.bench.data import BenchConfig, Side


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rounds=0", "rounds=0: must be 1 or more"),
        ("workers=[-1]", "workers are numbers from 0 on"),
        ("tfds_python=nowhere", "no such program"),
    ],
)
def test_mistakes_are_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        data.check(compose(BenchConfig, "bench_data", [override]))


@pytest.mark.slow
def test_all_sides_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["episodes=2", "steps=18", "batches=1", "rounds=1", "workers=[0,1]", "shards=3"]
    found = data.main(compose(BenchConfig, "bench_data", words))
    assert len(found) == 5
    assert all(0 < ms < 100 for row in found.values() for ms in row.values())
    printed = capsys.readouterr().out
    assert "TFDS: not run" in printed
    assert "opening 3 shards" in printed


def test_a_childs_time_is_counted() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    with data.spent() as used:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in data.children()
    child.communicate(b"\n")
    assert 0.28 < used[0] < 1


def test_the_bar_is_held_against_the_loader_without_workers() -> None:
    sides = [Side("fast", "", (1, 1), 0.5), Side("slow", "", (1, 1), 0.5), Side("free", "", (1, 1))]
    found = {"fast": {0: 0.4, 1: 0.9}, "slow": {0: 0.6, 1: 0.1}, "free": {0: 9.0, 1: 9.0}}
    console = Console(width=100, record=True)
    console.print(data.table(sides, found, {"blocks": 1.25}, [0, 1]))
    lines = {
        name: line for line in console.export_text().splitlines() for name in found if name in line
    }
    assert "met" in lines["fast"]
    assert "MISSED" in lines["slow"]
    assert "≤" not in lines["free"]
