"""An episode in the browser by viser: MuJoCo's scene in 3-D, or a recording's pictures.

Every moment is shown as it comes; with play off the slider goes back to what has been.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from selfflow.datasets.spec import UserError
from selfflow.eval.geom_meshes import shapes

TICK = 0.02  # s between looks at the page's controls
AHEAD = 0.9  # m from the camera, about which the page's view turns
CURE = "web=true: pip install 'selfflow[web]'"


@dataclass(frozen=True)
class Moment:
    """What is shown of one observation."""

    image: UInt8[np.ndarray, "h w 3"]
    instruction: str
    step: int
    success: bool
    poses: Float[np.ndarray, "geoms 7"] | None = None  # world frame, xyz + wxyz


def check_viser() -> None:
    """Raises UserError where viser is not installed."""
    if find_spec("viser") is None:
        raise UserError(CURE)


class WebScene:
    """A page with the scene, the camera's picture, and play, step and slider.

    `scene` is MuJoCo's (model, data), and None shows pictures only. `add` returns when the next
    moment is wanted, so that the episode goes on only while it is played.
    """

    def __init__(self, scene: tuple[Any, Any] | None, camera: str, port: int, hz: float) -> None:
        import viser  # pyright: ignore[reportMissingImports]

        self._server = viser.ViserServer(host="127.0.0.1", port=port, label="selfflow",
                                         verbose=False)  # fmt: skip
        self.url = f"http://localhost:{self._server.get_port()}"
        self._period, self._due = 1 / hz, 0.0
        self._moments: list[Moment] = []
        self._at = -1
        self._handles: dict[int, Any] = {}
        if scene is not None:
            self._build(*scene, camera)
        gui = self._server.gui
        self._picture = gui.add_image(np.zeros((2, 2, 3), np.uint8), label=camera)
        self._text = gui.add_markdown("")
        self._play = gui.add_checkbox("play", True)
        self._step = gui.add_button("step")
        self._slider = gui.add_slider("moment", min=0, max=1, step=1, initial_value=0)

    def add(self, moment: Moment) -> None:
        """Shows a new moment; returns when it is time for the one after it."""
        self._moments.append(moment)
        self._slider.max = max(1, len(self._moments) - 1)
        self._show(len(self._moments) - 1)
        while not self._past_end():
            time.sleep(TICK)

    def again(self) -> None:
        """Keeps the page up, and plays from the start where play is pressed, until interrupted."""
        self._play.value = False
        while True:
            if self._past_end():
                self._show(0)
            time.sleep(TICK)

    def close(self) -> None:
        """Ends the server."""
        self._server.stop()

    def _past_end(self) -> bool:
        """Follows the page's controls; whether the moment after the newest one is wanted."""
        if self._slider.value != self._at:
            self._show(min(int(self._slider.value), len(self._moments) - 1))
        stepped, self._step.value = self._step.value, False
        if not stepped and not (self._play.value and time.monotonic() >= self._due):
            return False
        if self._at == len(self._moments) - 1:
            return True
        self._show(self._at + 1)
        return False

    def _show(self, number: int) -> None:
        moment, before = self._moments[number], self._at
        self._at, self._due = number, time.monotonic() + self._period
        was = self._moments[before].poses if before >= 0 else None
        with self._server.atomic():
            self._slider.value = number
            self._picture.image = moment.image
            self._text.content = (
                f"**{moment.instruction}**, step {moment.step}{', success' * moment.success}"
            )
            if moment.poses is None:
                return
            for geom, handle in self._handles.items():
                pose = moment.poses[geom]
                if was is None or not np.array_equal(pose, was[geom]):
                    handle.position, handle.wxyz = pose[:3], pose[3:]

    def _build(self, model: Any, data: Any, camera: str) -> None:
        found, unknown = shapes(model)
        if unknown:
            print(f"not shown in the browser: {unknown} geoms that are neither primitive nor mesh")
        for shape in found:
            self._handles[shape.geom] = self._server.scene.add_mesh_simple(
                f"/scene/{shape.name}",
                shape.vertices,
                shape.faces,
                color=shape.rgba[:3],
                opacity=None if shape.rgba[3] == 1 else shape.rgba[3],
                flat_shading=shape.flat,
            )
        number = model.camera(camera).id
        position, ahead = data.cam_xpos[number], -data.cam_xmat[number].reshape(3, 3)[:, 2]
        view = self._server.initial_camera
        view.position, view.look_at = position.copy(), position + AHEAD * ahead
        view.up, view.fov = (0.0, 0.0, 1.0), float(np.radians(model.cam_fovy[number]))


@contextmanager
def web_scene(
    scene: tuple[Any, Any] | None, camera: str, port: int, hz: float
) -> Iterator[WebScene]:
    """The page, which stays up after the episode until Ctrl-C."""
    page = WebScene(scene, camera, port, hz)
    try:
        print(f"in the browser: {page.url}   (Ctrl-C ends)", flush=True)
        yield page
        print("the episode is over; the page stays until Ctrl-C", flush=True)
        page.again()
    finally:
        page.close()
