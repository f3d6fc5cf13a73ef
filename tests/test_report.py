"""Intervals against closed forms and published values; summaries of hand-made episodes; films."""

import io
import math

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from selfflow.eval.report import percentile, summarize, table, wilson
from selfflow.eval.rollout import Episode
from selfflow.eval.video import Film, captioned, contact_sheet, thumbnail


def an_episode(seed: int, **other) -> Episode:
    known = {
        "seed": seed,
        "success": False,
        "early_stop": False,
        "ever": False,
        "first_success": None,
        "steps": 10,
        "reason": "step limit",
        "latencies": (0.1, 0.2),
        "subtask_steps": (),
        "progress": {"opening": 0.1},
        "clipped": 0,
        "ik_failed": 1,
    }
    return Episode(**(known | other))


def test_wilson_published_values():
    # Newcombe's examples (1998), score method without correction
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_where_the_score_test_just_rejects(case):
    successes, n = case
    z = 1.959963984540054
    for bound in wilson(successes, n):
        if 0 < bound < 1:  # |p - bound| = z · its standard error under the bound
            error = math.sqrt(bound * (1 - bound) / n)
            assert abs(successes / n - bound) == pytest.approx(z * error, rel=1e-6)
    low, high = wilson(successes, n)
    assert low <= successes / n <= high
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="6 successes in 5"):
        wilson(6, 5)


def test_percentile():
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile(range(101), 95) == 95
    assert math.isnan(percentile([], 50))


def test_summary_and_table():
    episodes = [
        an_episode(0, success=True, early_stop=True, ever=True, first_success=4, steps=20),
        an_episode(1, ever=True, first_success=4, latencies=(0.4,), clipped=2),
        an_episode(2, reason="policy terminated", steps=1, progress={"opening": 0.4}),
    ]
    summary = summarize(episodes)
    assert summary["successes"] == 1
    assert summary["successes_by_reading"] == {"last_step": 1, "early_stop": 1, "ever": 2}
    assert summary["wilson_95"] == wilson(1, 3)
    assert summary["median_steps"] == 10
    assert summary["decisions"] == 5
    assert summary["latency_ms_p50"] == pytest.approx(200)
    assert summary["latency_ms_p95"] == pytest.approx(360)
    assert summary["reasons"] == {"step limit": 2, "policy terminated": 1}
    assert summary["progress_mean"]["opening"] == pytest.approx(0.2)
    assert (summary["clipped"], summary["ik_failed"]) == (2, 3)
    console = Console(width=80, record=True, file=io.StringIO())
    names = {"task": "open_drawer_place", "backend": "fake", "placement": "mild", "policy": "hold"}
    console.print(table([summary | names]))
    text = console.export_text()
    shown = (
        "open_drawer_place",
        "fake",
        "mild",
        "1 / 3",
        "6.1 % to 79.2 %",
        "10 steps",
        "200.0 ms",
    )
    for part in shown:
        assert part in text


def test_film_plays_with_even_sides_and_the_picture_in_it(tmp_path):
    path = tmp_path / "film.mp4"
    image = np.zeros((33, 47, 3), np.uint8)
    image[:, :, 0] = 200
    with Film(path, 3.0) as film:
        for step in range(7):
            film.add(captioned(image, "open top drawer", step, success=step > 3))
        assert not path.exists()  # only a whole film has the name
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 7
    height, width = frames[0].shape[:2]
    assert (height % 2, width % 2) == (0, 0)
    assert width >= 320
    np.testing.assert_allclose(frames[0][20:200, 20:300].mean((0, 1)), (200, 0, 0), atol=12)
    assert list(tmp_path.iterdir()) == [path]


def test_film_of_an_episode_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with Film(tmp_path / "film.mp4", 3.0) as film:
            film.add(np.zeros((20, 20, 3), np.uint8))
            raise RuntimeError("simulator")

    with pytest.raises(RuntimeError, match="simulator"):
        fail()
    assert not list(tmp_path.iterdir())


def test_contact_sheet_goes_from_first_to_last(tmp_path):
    frames = [np.full((8, 10, 3), i, np.uint8) for i in range(101)]
    contact_sheet(frames, tmp_path / "sheet.png", columns=3, count=5)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16, 30, 3)
    assert [sheet[0, 0, 0], sheet[0, 10, 0], sheet[8, 10, 0]] == [0, 25, 100]
    assert thumbnail(np.zeros((512, 640, 3), np.uint8)).shape == (320, 400, 3)
    contact_sheet(frames[:1], tmp_path / "one.png")
    assert np.asarray(Image.open(tmp_path / "one.png")).shape[0] == 8
