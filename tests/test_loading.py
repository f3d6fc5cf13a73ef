"""Loading ahead: workers give the same batches, in order, end with the run, and memory is flat."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.augment import Augment
from selfflow.datasets.loading import Worker, prefetch
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.synthetic import write_fractal
from selfflow.datasets.windows import Batch, Mixture, WindowSpec

SPEC = WindowSpec(frames=(0, 4), chunk=5, height=16, width=16)


def same(a: Batch, b: Batch) -> None:
    for f in fields(Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        x, y = (v if isinstance(v, dict) else {"": v} for v in (x, y))
        assert x.keys() == y.keys()
        for key, one in x.items():
            np.testing.assert_array_equal(one, y[key], f.name)
            assert getattr(one, "dtype", None) == getattr(y[key], "dtype", None)


def test_workers_give_the_same_batches_in_order(store: Path) -> None:
    data = [f"{store}@2", str(store)]
    sources, weights = open_sources(data)
    extra = {"drawers": (5, 3), "nothing": (1, 2)}
    spec = replace(SPEC, shift=1, augment=Augment(crop=0.8), extra=extra)
    mixture = Mixture(sources, weights, spec, 1)
    plain = list(prefetch(mixture, range(3, 9), 4, 1, 2))
    for found, expected in zip(
        prefetch(mixture, range(3, 9), 4, 1, 2, workers=2, data=data), plain, strict=True
    ):
        same(found, expected)


def test_a_workers_errors_come_where_their_batch_would(store: Path) -> None:
    sources, weights = open_sources([str(store)])
    mixture = Mixture(sources, weights, SPEC, 0)
    coming = prefetch(mixture, range(4), 2, workers=1, data=[str(store), str(store)])
    with pytest.raises(UserError, match="changed while training"):
        next(coming)
    with Worker(mixture, [str(store)]) as worker:
        worker.ask(mixture.places(0, 2))
        same(worker.take(), mixture.batch(0, 2))
        os.kill(worker.pid, signal.SIGKILL)
        worker.ask(mixture.places(1, 2))
        with pytest.raises(RuntimeError, match="ended with status -9"):
            worker.take()


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_workers_end_with_the_run_however_it_ends(store: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
            from selfflow.datasets.loading import Worker
            from selfflow.datasets.source import open_sources
            from selfflow.datasets.windows import Mixture, WindowSpec
            import time
            sources, weights = open_sources([{str(store)!r}])
            mixture = Mixture(sources, weights, WindowSpec((0,), 1, 16, 16), 0)
            worker = Worker(mixture, [{str(store)!r}])
            worker.ask(mixture.places(0, 2)), worker.take()
            print(worker.pid, flush=True)
            time.sleep(60)
        """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert alive(pid)
        run.kill()
    for _ in range(200):
        if not alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError("a worker outlives its run by 10 s")


MEMORY = """
    import sys
    from selfflow.datasets.loading import prefetch
    from selfflow.datasets.source import open_sources
    from selfflow.datasets.windows import Mixture, WindowSpec

    def anonymous():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(l.split()[1]) / 1024 for l in lines if l.startswith("RssAnon"))

    data = sys.argv[1:]
    sources, weights = open_sources(data)
    mixture = Mixture(sources, weights, WindowSpec((0, 4), 8, 64, 80), 0)
    for step, batch in enumerate(prefetch(mixture, range(20_000 // 32), 32)):
        if step % 125 == 124:
            print(step, anonymous(), flush=True)
"""


@pytest.mark.slow
def test_memory_stays_flat_over_20_000_windows(tmp_path: Path) -> None:
    """RssAnon in MB of a process that only loads; test_mixture.py bounds the signals it keeps."""
    place = write_fractal(tmp_path, episodes=60, steps=100, shards=4)
    script = tmp_path / "load.py"
    script.write_text(textwrap.dedent(MEMORY))
    command = [sys.executable, "-W", "ignore::ResourceWarning", str(script), str(place)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = [float(line.split()[1]) for line in told.splitlines()]
    assert len(values) == 5
    assert max(values) <= 600
    assert max(values) - values[0] < 20, values
