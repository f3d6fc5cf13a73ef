"""A live picture in the browser: one local page, an MJPEG stream, and the keys pressed there.

Standard library only. It listens on this machine alone; from another one:
`ssh -L 8090:localhost:8090 MACHINE`.
"""

import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from selfflow.datasets.spec import UserError

PAGE = """<!doctype html><title>selfflow</title>
<style>body{background:#181818;color:#ddd;font:15px sans-serif;text-align:center}
img{max-width:95vw;max-height:78vh;margin-top:1em}pre{display:inline-block;text-align:left}</style>
<img src="/stream"><br><pre>HELP</pre>
<script>
const names = {ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right",
               Enter: "enter", Backspace: "backspace", " ": "space"};
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const key = names[e.key] || e.key;
  if (names[e.key]) e.preventDefault();
  fetch("/key", {method: "POST", headers: {"X-Key": encodeURIComponent(key)}});
});
</script>"""
IDLE = 2.0  # s after which a picture is sent again, so that a closed page is noticed
POLL = 0.05  # s in which `close` is noticed
KEYS_HELD = 64  # more are forgotten


class WebView:
    """Serves the latest picture at http://localhost:PORT until `close`; port 0 takes a free one."""

    def __init__(self, port: int, text: str = "") -> None:
        self._jpeg, self._changed, self._closed = b"", threading.Condition(), False
        self._keys: queue.Queue[str] = queue.Queue(KEYS_HELD)
        page = PAGE.replace("HELP", text).encode()
        handler = type("Handler", (_Handler,), {"view": self, "page": page})
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as e:
            raise UserError(f"port={port}: {e.strerror}; choose another, 0 is any free one") from e
        self._server.daemon_threads = True
        self.url = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(POLL,), daemon=True).start()

    def show(self, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Sends the picture to all open pages."""
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90)
        with self._changed:
            self._jpeg = jpeg
            self._changed.notify_all()

    def take_keys(self) -> list[str]:
        """Keys pressed in the pages since the last call, by the names of eval/devices.py."""
        keys = []
        while not self._keys.empty():
            keys.append(self._keys.get_nowait())
        return keys

    def put_key(self, key: str) -> None:
        """Notes a key that a page has sent."""
        if not self._keys.full():
            self._keys.put_nowait(key)

    def next_jpeg(self, last: bytes) -> bytes | None:
        """The next picture after `last`, the same again after IDLE seconds, None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._jpeg is not last, IDLE)
            return None if self._closed else self._jpeg

    def close(self) -> None:
        """Ends the streams and frees the port."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    view: WebView
    page: bytes

    def do_GET(self) -> None:
        if self.path == "/":
            self._reply(200, "text/html; charset=utf-8", self.page)
        elif self.path == "/stream":
            self._stream()
        else:
            self._reply(404, "text/plain", b"no such page")

    def do_POST(self) -> None:
        # A header of our own: a page of another site may not send it.
        if self.path == "/key" and (key := self.headers.get("X-Key")):
            self.view.put_key(unquote(key))
        self._reply(204, "text/plain", b"")

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        jpeg: bytes | None = b""
        try:
            while (jpeg := self.view.next_jpeg(jpeg)) is not None:
                if jpeg:
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}"
                    # Twice: browsers show a part of the stream when the next one begins.
                    self.wfile.write((head.encode() + b"\r\n\r\n" + jpeg + b"\r\n") * 2)
        except (BrokenPipeError, ConnectionResetError):
            return  # the page was closed

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the operator's."""
