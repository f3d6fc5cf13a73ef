"""Episodes as one HTML page that needs nothing but itself: thumbnails, texts and small curves."""

import base64
import html
import os
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.progress import track

from selfflow.datasets.amounts import in_time
from selfflow.datasets.curves import Strip, changes, runs, strips
from selfflow.datasets.episode_film import fps_of
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.page_style import SCRIPT, STYLE
from selfflow.datasets.spec import UserError

THUMBNAIL, QUALITY = 176, 80  # px wide, JPEG
THUMBNAILS = 3  # first, middle, last
WIDE, HIGH, MARGIN = 300, 34, 2  # of a sparkline, in units of its own
CLASSES = (("x", "y", "z"), ("x", "y", "z"), ("target", "sensed"))  # colours, by curve
LEGEND = (
    '<p class="legend"><span class="x">dx rx</span><span class="y">dy ry</span>'
    '<span class="z">dz rz</span><span class="target">gripper target</span>'
    '<span class="sensed">sensed</span><span class="end">terminate</span>'
    '<span class="told">new instruction</span></p>'
)
BARS, CHIPS = 24, 12  # of the histogram of lengths; instructions to choose from


def page(source: EpisodeSource, episodes: Sequence[int], cameras: Sequence[str]) -> str:
    """The page, of these episodes as the first of the cameras saw them."""
    texts: Counter[str] = Counter()
    console, cards = Console(stderr=True), []
    hidden = not console.is_terminal
    for i in track(episodes, "page", console=console, transient=True, disable=hidden):
        cards.append(_card(source, i, cameras[0], texts))
    title = html.escape(source.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>"
        f"{_head(source, episodes, texts)}"
        f'<main id="cards">{"".join(cards)}</main>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def write_page(text: str, path: Path) -> None:
    """Writes the page. Raises UserError if that cannot be."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"web={path}: cannot be written ({e.strerror})") from e


def serve(text: str, port: int) -> None:
    """Offers the page to this machine's browsers until Ctrl-C; port 0 is any that is free.

    Raises UserError if the port is taken.
    """
    data = text.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data) if found else 0))
            self.end_headers()
            if found:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as e:
        raise UserError(f"port={port}: {e.strerror}; give another, or 0 for any") from e
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


def _head(source: EpisodeSource, episodes: Sequence[int], texts: Counter[str]) -> str:
    lengths = np.array([source.length(i) for i in range(len(source))])
    rate = fps_of(source, 0)
    part = "" if len(episodes) == len(source) else f", {len(episodes)} of them here"
    facts = [
        f"{source.embodiment.name} at {source.embodiment.control_hz:g} Hz",
        f"{len(source)} episodes{part}",
        f"{lengths.sum()} steps, {in_time(lengths.sum() / rate)}",
        f"cameras {', '.join(source.cameras)}",
        f"{source.skipped} records skipped",
    ]
    chips = "".join(
        f'<button class="chip" data-text="{html.escape(text)}">{html.escape(text) or "(none)"}'
        f"<b>{count}</b></button>"
        for text, count in texts.most_common(CHIPS)
    )
    return (
        f"<header><div><h1>{html.escape(source.name)}</h1>"
        f"<p>{' · '.join(html.escape(fact) for fact in facts)}</p>"
        '<input id="search" type="search" placeholder="instruction or number" '
        'aria-label="search"><span id="count"></span>'
        f'<div class="chips">{chips}</div></div>'
        f'<div class="side">{_histogram(lengths)}{LEGEND}</div></header>'
    )


def _histogram(lengths: np.ndarray) -> str:
    """Lengths of all episodes as bars."""
    counts, edges = np.histogram(lengths, BARS)
    bars = "".join(
        f'<rect x="{10 * n}" y="{60 - 60 * count / counts.max():.1f}" width="9" '
        f'height="{60 * count / counts.max():.1f}"/>'
        for n, count in enumerate(counts)
    )
    return (
        f'<figure><svg class="bars" viewBox="0 0 {10 * BARS} 60">{bars}</svg><figcaption>'
        f"<span>{edges[0]:.0f}</span><span>steps an episode</span><span>{edges[-1]:.0f}</span>"
        "</figcaption></figure>"
    )


def _card(source: EpisodeSource, i: int, camera: str, texts: Counter[str]) -> str:
    """One episode; counts its instructions."""
    signals, about, steps = source.signals(i), source.metadata(i), source.length(i)
    told = list(dict.fromkeys(signals.instruction))
    texts.update(told)
    chosen = np.linspace(0, steps - 1, THUMBNAILS).round().astype(int).tolist()
    images = "".join(_picture(image) for image in source.frames(i, chosen, camera))
    success = about.get("success")
    known = "" if success is None else ("success" if success else "failure")
    badge = f'<span class="{known}">{known}</span>' if known else ""
    said = "".join(f"<p>{html.escape(text) or '<i>no instruction</i>'}</p>" for text in told)
    plots = "".join(
        _sparkline(*pair, signals.terminate, changes(signals.instruction))
        for pair in zip(strips(signals), CLASSES, strict=True)
    )
    search = html.escape(f"{i} {' '.join(told)}".lower())
    return (
        f'<article data-search="{search}"><div class="film">{images}</div>'
        f'<div class="about"><b>{i}</b><span>{steps} steps</span>'
        f"<span>{steps / fps_of(source, i):.1f} s</span>{badge}</div>{said}{plots}</article>"
    )


def _picture(image: UInt8[np.ndarray, "_ _ 3"]) -> str:
    height = max(1, round(image.shape[0] * THUMBNAIL / image.shape[1]))
    small = Image.fromarray(image).resize((THUMBNAIL, height), Image.Resampling.LANCZOS)
    data = base64.b64encode(simplejpeg.encode_jpeg(np.asarray(small), quality=QUALITY)).decode()
    return f'<img alt="" width="{THUMBNAIL}" height="{height}" src="data:image/jpeg;base64,{data}">'


def _sparkline(
    strip: Strip, classes: Sequence[str], terminate: np.ndarray, told: Sequence[int]
) -> str:
    """Curves of a strip, and where the subtask ends or the instruction changes."""
    steps = len(terminate)
    marks = [("told", step - 0.5) for step in told]
    marks += [("end", step) for step in np.flatnonzero(terminate).tolist()]
    parts = [f'<path class="{name}" d="M{_x(at, steps)} 0V{HIGH}"/>' for name, at in marks]
    if strip.low < 0 < strip.high:
        parts.append(f'<path class="zero" d="M0 {HIGH / 2}H{WIDE}"/>')
    for k in reversed(range(len(strip.names))):
        for run in runs(strip.valid[:, k]):
            points = " ".join(
                f"{_x(t, steps)},{_y((strip.values[t, k] - strip.low) / (strip.high - strip.low))}"
                for t in run
            )
            parts.append(f'<polyline class="{classes[k]}" points="{points}"/>')
    title = (
        f"{html.escape(strip.title)}: {', '.join(strip.names)}; {strip.low:.2g}..{strip.high:.2g}"
    )
    return (
        f'<svg class="spark" viewBox="0 0 {WIDE} {HIGH}" preserveAspectRatio="none">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def _x(step: int | float, steps: int) -> str:
    return f"{WIDE * (step + 0.5) / steps:.1f}"


def _y(share: float) -> str:
    return f"{HIGH - MARGIN - (HIGH - 2 * MARGIN) * share:.1f}"
