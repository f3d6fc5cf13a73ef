"""Where a person watches the robot: MuJoCo's own window, or pictures larger than a policy's."""

import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from selfflow.datasets.spec import Observation, UserError
from selfflow.envs.base import RobotEnv
from selfflow.envs.twin_look import MOST_SIDE

AHEAD = 0.7  # m before the head camera
LEAST_SIDE, PORTS = 16, 65535
Frame = UInt8[np.ndarray, "h w 3"]


def has_display() -> bool:
    """Whether a window could be opened here."""
    found = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(found) or sys.platform in ("darwin", "win32")


def check_live(port: int, size: list[int] | None) -> None:
    """Raises UserError for a page's port and a live picture's size that cannot be."""
    if not 0 <= port <= PORTS:
        raise UserError(f"port={port}: must be between 0 and {PORTS}")
    if size is None:
        return
    if len(size) != 2 or not LEAST_SIDE <= min(size) <= max(size) <= MOST_SIDE:
        raise UserError(
            f"size={size}: must be [height, width], each {LEAST_SIDE} to {MOST_SIDE}, or null"
        )


def model_of(env: RobotEnv) -> tuple[Any, Any] | None:
    """MuJoCo's model and data, None where another simulator runs."""
    simulator: Any = env.simulator
    return (simulator.model, simulator.data) if simulator.backend == "mujoco" else None


class Camera:
    """The first camera's picture: in MuJoCo drawn at `size` (height, width), else the observation's
    own. Draws with a renderer of its own, so that observations stay as they are."""

    def __init__(self, env: RobotEnv, size: tuple[int, int] | None) -> None:
        self._env, self._size, self._renderer, self._photo = env, size, None, None
        self.name = env.embodiment.cameras[0]

    def picture(self, observation: Observation) -> Frame:
        """What the camera sees now, which is when `observation` was taken."""
        found = model_of(self._env)
        if found is None or self._size is None:
            return observation["images"][self.name]
        if self._renderer is None:
            from selfflow.envs.twin_render import make_renderer

            self._renderer = make_renderer(found[0], *self._size)
            self._photo = self._larger_photo()
        simulator: Any = self._env.simulator
        if simulator.fingers is not None:
            simulator.fingers.turn(found[1])
        picture = self._renderer.render(found[1], self.name)
        if self._photo is None:
            return picture
        return self._photo.behind(picture, self._renderer, found[1], self.name)

    def _larger_photo(self) -> Any:
        """The simulator's photograph for this size, None where it shows none."""
        from selfflow.envs.twin_mesh import Photo

        simulator: Any = self._env.simulator
        if simulator.photo is None or self._size is None:
            return None
        return Photo(simulator.model, self._env.task, self._size)

    def close(self) -> None:
        """Frees the renderer."""
        if self._renderer is not None:
            self._renderer.close()


class Window:
    """MuJoCo's viewer on a running simulator, which it follows by `show`."""

    def __init__(self, env: RobotEnv) -> None:
        found = model_of(env)
        if found is None:
            raise UserError("a window shows MuJoCo only; choose view=web or backend=mujoco")
        if not has_display():
            raise UserError("a window needs a display, and there is none; choose view=web")
        model, data = found
        self._handle = _viewer().launch_passive(
            model, data, show_left_ui=False, show_right_ui=False
        )
        head = model.camera(env.embodiment.cameras[0]).id
        with self._handle.lock():  # over the robot's shoulder, at what its head looks at
            view, ahead = self._handle.cam, -data.cam_xmat[head].reshape(3, 3)[:, 2]
            view.lookat[:] = data.cam_xpos[head] + AHEAD * ahead
            view.distance, view.azimuth, view.elevation = 2.3, 220, -25

    @property
    def closed(self) -> bool:
        """Whether the user has closed it."""
        return not self._handle.is_running()

    def show(self) -> None:
        """Draws the simulator's state."""
        self._handle.sync()

    def close(self) -> None:
        """Takes the window off the screen."""
        self._handle.close()


def _viewer() -> ModuleType:
    import mujoco.viewer

    return mujoco.viewer
