"""Looking at data: tables, films with curves, the page in a browser, rerun."""

import importlib.util
import io
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from selfflow.configs.entry import compose
from selfflow.datasets import episode_rerun
from selfflow.datasets.curves import BACK, CHANGE, COLOURS, ENDED, UNKNOWN, Panel, fitted, runs
from selfflow.datasets.episode_film import picture_sizes, write_film
from selfflow.datasets.episode_page import page, serve, write_page
from selfflow.datasets.episodes import Signals
from selfflow.datasets.features import print_features, spread, survey
from selfflow.datasets.show import ShowConfig, check, main
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, UserError

SCRIPT = Path(__file__).parents[1] / "datasets/show.py"
T, TEXT = 20, '<script>alert("x")</script> & more'


class Made:
    """Two episodes: actions known from step 5 on, done at step 9, another text from step 10 on."""

    name, embodiment, skipped = "made", EMBODIMENTS["google_robot"], 3
    cameras: tuple[str, ...] = ("front", "wrist")
    measures = ("force",)

    def __len__(self) -> int:
        return 2

    def length(self, i: int) -> int:
        return T

    def frames(self, i: int, steps: Sequence[int], camera: str | None = None) -> list[np.ndarray]:
        colour = (200, 30, 30) if camera == "wrist" else (30, 160, 60)
        return [np.full((48, 64, 3), colour, np.uint8) for _ in steps]

    def signals(self, i: int) -> Signals:
        t = np.arange(T)
        actions = np.zeros((T, 7), np.float32)
        actions[5:, 0] = np.linspace(-1, 1, T - 5)
        actions[5:, 6] = 1
        return Signals(
            proprio=np.ones((T, 8), np.float32),
            proprio_valid=np.ones(T, bool),
            actions=actions,
            action_valid=t >= 5,
            terminate=t == 9,
            instruction=["open"] * 10 + [TEXT] * 10,
        )

    def metadata(self, i: int) -> dict:
        return {"fps": 4.0, "success": True} if i else {"fps": 4.0, "place": "lab"}

    def measured(self, i: int, key: str) -> np.ndarray:
        return np.zeros((T, 3, 2), np.float32)


def test_the_tables() -> None:
    source = Made()
    found = survey(source, [0, 1])
    assert (found.episodes, found.steps, found.actions, found.terminated) == (2, 40, 30, 2)
    assert found.instructions == {"open": 2, TEXT: 2}
    assert found.succeeded == {"not known": 1, "yes": 1}
    out = io.StringIO()
    print_features(Console(file=out, width=120), source, found)
    text = out.getvalue()
    for part in ("google_robot at 3 Hz, 2 episodes, 3 records", "48×64×3", "75.0 % valid", "3×2"):
        assert part in text
    for part in ("4 Hz, the default", "lab", "median 20, 40 in all", "yes 1", "2 of 2 episodes"):
        assert part in text


def test_spread() -> None:
    assert spread(3, 200) == [0, 1, 2]
    assert spread(100, 3) == [0, 50, 99] or spread(100, 3)[0::2] == [0, 99]
    assert spread(5, 1) == [0]


def near(colour: tuple[int, int, int], pixels: np.ndarray) -> np.ndarray:
    return np.abs(pixels.astype(int) - colour).max(-1) < 40


def test_the_panel_shows_the_signals() -> None:
    panel = Panel(Made().signals(0), 640, 4.0)
    image = panel.at(12)
    assert image.shape == (panel.height, 640, 3)
    plot = image[52 : 52 + 92]  # the first strip
    left, right = 12, 640 - 12 - 128
    at = [round(left + (right - left) * (step + 0.5) / T) for step in range(T)]
    assert (plot[:, at[12]] > 200).all()  # the cursor
    assert not (plot[:, at[13]] > 200).all()
    assert near(UNKNOWN, plot[10:40, at[2]]).all()  # no action is known
    assert not any(near(colour, plot[:, at[2]]).any() for colour in COLOURS)
    rows = [np.flatnonzero(near(COLOURS[0], plot[:, at[step]])).mean() for step in (6, 17)]
    assert rows[0] > 60 > 32 > rows[1]  # dx rises
    assert near(ENDED, plot[:, at[9]]).mean() > 0.8
    between = (at[9] + at[10]) // 2
    assert near(CHANGE, plot[:, between - 1 : between + 2]).any(1).mean() > 0.8
    assert (image[-2:] == BACK).all()


def test_runs_and_texts() -> None:
    valid = np.array([True, True, False, True, False])
    assert runs(valid) == [range(0, 2), range(3, 4)]
    assert runs(np.zeros(3, bool)) == []
    assert fitted("short", 640, 17) == "short"
    assert fitted("long words " * 50, 640, 17).endswith("…")


def test_pictures_fill_the_film() -> None:
    assert picture_sizes([(48, 64)]) == [(256, 341)]
    assert picture_sizes([(480, 640)]) == [(400, 533)]
    assert sum(w for _, w in picture_sizes([(256, 256)] * 8)) <= 1280


def test_the_film(tmp_path: Path) -> None:
    write_film(Made(), 0, ("front", "wrist"), tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert film.streams.video[0].average_rate == 4
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == T
    assert frames[0].shape[1] >= 640
    width = frames[0].shape[1]
    assert near((30, 160, 60), frames[3][100, width // 4])
    assert near((200, 30, 30), frames[3][100, 3 * width // 4])
    assert not np.array_equal(frames[3], frames[12])
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


class Reader(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_by_itself(tmp_path: Path) -> None:
    text = page(Made(), [0, 1], ("wrist",))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    tags = [tag for tag, _ in reader.found]
    assert (tags.count("article"), tags.count("img"), tags.count("script")) == (2, 6, 1)
    links = [about.get("src") or about.get("href") for _, about in reader.found]
    assert all(link.startswith("data:") for link in links if link)
    assert "http" not in text
    assert "&lt;script&gt;alert" in text  # texts of the data are no code
    write_page(text, tmp_path / "new" / "page.html")
    assert (tmp_path / "new/page.html").read_text() == text
    with pytest.raises(UserError, match="cannot be written"):
        write_page(text, tmp_path / "new/page.html/x.html")


@contextmanager
def served(store: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, str(SCRIPT), f"source={store}", "web=true"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield process, next(line.split()[0] for line in lines if line.startswith("http"))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_served_until_ctrl_c(store: Path) -> None:
    with served(store) as (process, url):
        with urllib.request.urlopen(url) as answer:
            assert answer.read().decode().count("<article") == 2
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}etc/passwd")
        port = int(url.split(":")[2].strip("/"))
        with pytest.raises(UserError, match=f"port={port}"):
            serve("", port)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_in_a_browser(store: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium): the page is not tested in one")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    flags += ["--hide-scrollbars", "--window-size=1000,700"]
    with served(store) as (_, url):
        run = [browser, *flags, "--dump-dom", f"{url}#1"]
        dom = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout
        shot = f"--screenshot={tmp_path / 'page.png'}"
        subprocess.run([browser, *flags, shot, url], capture_output=True, timeout=60, check=True)
    assert "1 of 2 shown" in dom  # its script ran, and found the number in the address
    assert dom.count("<article") == 2
    assert dom.count('hidden=""') == 1
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert picture.shape == (700, 1000, 3)
    cards = picture[250:]
    assert len(np.unique(cards.reshape(-1, 3), axis=0)) > 500  # noise: the thumbnails are there


def test_without_rerun(monkeypatch: pytest.MonkeyPatch, store: Path, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(episode_rerun.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'selfflow\[rerun\]'"):
        check(ShowConfig(str(store), viewer="rerun"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    main(ShowConfig(str(store), episode=1, out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["store_1.mp4"]


def test_rerun_takes_the_episode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason="rerun is not installed: its files are not tested")
    episode_rerun.write_rerun(Made(), 0, ("front", "wrist"), tmp_path / "a.rrd")
    data = (tmp_path / "a.rrd").read_bytes()
    assert data[:3] == b"RRF"
    for path in (b"camera/front", b"camera/wrist", b"position/dx", b"gripper/target"):
        assert path in data
    assert [path.name for path in tmp_path.iterdir()] == ["a.rrd"]
    for key in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(key, raising=False)
    assert not episode_rerun.has_screen()


def test_main_shows_what_was_asked_for(store: Path, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"episode": 0, "viewer": "mp4", "episodes": 1}
    wanted["web"] = str(tmp_path / "p.html")
    main(ShowConfig(str(store), **wanted, out=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"store_0.mp4", "p.html"}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"episode": 2}, r"0\.\.1"),
        ({"episode": -1}, r"0\.\.1"),
        ({"cameras": ["left"]}, "overhead_camera"),
    ]
    for change, message in mistakes:
        with pytest.raises(UserError, match=message):
            main(ShowConfig(str(store), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [("viewer=vlc", "mp4, rerun"), ("episodes=0", "at least 1"), ("web=page", r"ends in \.html")],
)
def test_mistakes(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(ShowConfig, "show", ["source=x", change])


def test_real_episodes_have_a_page() -> None:
    sample = Path(__file__).parents[2] / "shared/samples/octo_bridge_debug"
    if not sample.is_dir():
        pytest.skip(f"no real episodes at {sample}: looking at them is not tested")
    source = open_source(str(sample))
    assert page(source, [0, 7], source.cameras).count("<img") == 6
