"""Frames of long mp4 files: exactly those asked for, whatever the keyframes, also after a fork."""

import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from selfflow.datasets.spec import UserError
from selfflow.datasets.video_file import VideoFile, open_video

FPS, SLACK = 3, 0.15


def numbered(number: int) -> np.ndarray:
    """A frame whose eight stripes show its number."""
    bits = ((number >> np.arange(8)) & 1).astype(np.uint8)
    return np.broadcast_to(np.repeat(20 + 215 * bits, 8)[:, None, None], (64, 48, 3))


def number_of(frame: np.ndarray) -> int:
    return int(((frame[4::8, 24].mean(axis=1) > 128) << np.arange(8)).sum())


def write(path: Path, numbers: list[int], **options: str) -> VideoFile:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 48, "yuv420p"
        for number in numbers:
            frame = av.VideoFrame.from_ndarray(numbered(number).copy(), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return VideoFile(path)


def shown(video: VideoFile, steps: list[int]) -> list[int]:
    return [number_of(frame) for frame in video.at([step / FPS for step in steps], SLACK)]


@pytest.mark.parametrize(
    "options",
    [
        {"g": "2", "bf": "0"},
        {"g": "40", "bf": "3"},
        {"g": "12", "bf": "3", "x264-params": "open-gop=1"},
    ],
)
def test_frames_are_exactly_those_asked_for(tmp_path: Path, options: dict[str, str]) -> None:
    video, rng = write(tmp_path / "a.mp4", list(range(90)), **options), np.random.default_rng(0)
    for turn in range(20):
        first = int(rng.integers(75))
        steps = rng.integers(0, 90, 9).tolist() if turn % 2 else [first + 3 * k for k in range(5)]
        assert shown(video, steps) == steps
    with pytest.raises(UserError, match=r"a\.mp4: no frame at 30\.000 s"):
        shown(video, [90])
    assert shown(video, [5, 89, 5]) == [5, 89, 5]  # it goes on after an error


def test_a_frame_that_is_missing_is_not_replaced_by_the_next(tmp_path: Path) -> None:
    video = write(tmp_path / "gap.mp4", [n for n in range(12) if n not in (4, 5)], g="2")
    assert shown(video, [3, 6, 7]) == [3, 6, 7]
    for step in (4, 5):
        with pytest.raises(UserError, match=r"gap\.mp4: no frame at"):
            shown(video, [step])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12 warns of any fork
def test_files_stay_open_in_a_thread_and_a_forked_process_opens_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, list(range(9)), g="2")
    video = open_video(path)
    assert open_video(path) is video
    assert shown(video, [3]) == [3]
    child = os.fork()
    if child == 0:
        mine = open_video(path)
        os._exit(0 if mine is not video and shown(mine, [7]) == [7] else 1)
    for _ in range(200):
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 0)
    assert shown(video, [4]) == [4]
    for name in "bcde":
        other = tmp_path / f"{name}.mp4"
        write(other, [0, 1], g="2")
        open_video(other)
    assert open_video(path) is not video  # four others were used since
