"""Whether this machine can draw with SAPIEN. `python -m selfflow.envs.sapien_render` draws a frame.

SAPIEN needs a Vulkan device even for physics alone, as soon as anything in the scene is visible.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from selfflow.datasets.spec import UserError

CURE = "run: make simpler-setup"
PATH_DEPTH = 8  # bounces of a traced ray, as SIMPLER's


# Whose renderer is open, and in which process: a fork of it would wait for ever for the driver's
# threads, which it does not have.
DRAWING: WeakKeyDictionary[object, int] = WeakKeyDictionary()


def require_renderer() -> Any:
    """Imports SAPIEN, makes sure that its renderer opens, and returns the package.

    Raises UserError with the cure where SAPIEN is not installed or finds no Vulkan device, and in a
    process that was forked while an environment of its parent was open.
    """
    if any(process != os.getpid() for process in DRAWING.values()):
        raise UserError(
            "backend=simpler: this process was forked while its parent drew with SAPIEN; start it "
            "with context='spawn', or before the parent's first reset, or after close()"
        )
    if importlib.util.find_spec("sapien") is None:
        raise UserError(f"backend=simpler needs the package sapien, which is not installed; {CURE}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns when it uses its own Vulkan loader: harmless
        sapien = importlib.import_module("sapien")
    try:
        sapien.render.RenderSystem()
    except RuntimeError as e:
        raise UserError(f"backend=simpler found no usable Vulkan device ({e}); {CURE}") from e
    return sapien


def set_shading(samples: int | None) -> None:
    """How cameras made from now on draw: by tracing that many rays a pixel, None for SIMPLER's
    "ibl". SAPIEN keeps this for the whole process, so it is said before every scene."""
    sapien = importlib.import_module("sapien")
    sapien.render.set_camera_shader_dir("default" if samples is None else "rt")
    if samples is not None:
        sapien.render.set_ray_tracing_samples_per_pixel(samples)
        sapien.render.set_ray_tracing_path_depth(PATH_DEPTH)
        sapien.render.set_ray_tracing_denoiser("none")  # the others need a graphics card


def draw_box() -> np.ndarray:
    """A float (48, 64, 4) picture of a box (alpha 1) on nothing (alpha 0): tests the renderer."""
    sapien = require_renderer()
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem()])
    scene.set_ambient_light([1.0, 1.0, 1.0])
    builder = scene.create_actor_builder()
    builder.add_box_visual(half_size=[0.1, 0.1, 0.1])
    builder.set_initial_pose(sapien.Pose([1.0, 0.0, 0.0]))
    builder.build_static(name="box")
    camera = scene.add_camera("camera", 64, 48, fovy=1.0, near=0.01, far=10.0)
    scene.update_render()
    camera.take_picture()
    return camera.get_picture("Color")


def main() -> int:
    """Prints one line: what draws here, or why nothing does. Status 0 or 1."""
    try:
        picture = draw_box()
    except UserError as e:
        print(e, file=sys.stderr)
        return 1
    if picture[24, 32, 3] != 1.0 or picture[2, 2, 3] != 0.0:
        print(
            "SAPIEN drew a wrong picture of a box: is the driver older than Mesa 25?",
            file=sys.stderr,
        )
        return 1
    sapien = sys.modules["sapien"]
    device = sapien.render.get_device_summary().splitlines()[0].removeprefix("GPU: ")
    print(f"SAPIEN {sapien.__version__} renders on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
