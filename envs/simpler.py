"""SIMPLER's tasks in their real scenes, on SAPIEN 3: `make_simpler(task)`.

Importing this needs no SAPIEN; frames, sensing and numbers are in docs/simpler.md.
"""

from typing import Any

from selfflow.datasets.spec import Task, UserError
from selfflow.envs.base import RobotEnv, Simulator
from selfflow.envs.bridge_tasks import BRIDGE_RULES
from selfflow.envs.gripper import GRIPPERS
from selfflow.envs.sapien_render import require_renderer
from selfflow.envs.simpler_assets import robot_urdf
from selfflow.envs.table_tasks import TABLE_RULES
from selfflow.envs.tasks import RULES

# SAPIEN 3's names for SIMPLER's shadings.
SHADERS = {"ibl": "default"}


def make_simpler(
    task: Task,
    placement: str = "mild",
    *,
    image_size: tuple[int, int] | None = None,
    urdf_version: str = "recolor_cabinet_visual_matching_1",
    shader: str = "ibl",
    gripper: str = "opening",
    overlay: bool = True,
) -> RobotEnv:
    """The task in the real scene.

    | option | choices |
    |---|---|
    | placement | mild, grid (envs/tasks.py) |
    | image_size | (height, width), in SIMPLER's ratio; (512, 640), WidowX (480, 640) |
    | urdf_version | the Google robot's colours: envs/simpler_assets.py |
    | shader | ibl (published drawer scores use ray tracing and are not comparable) |
    | gripper | opening, sticky (envs/gripper.py; not with the WidowX, whose own is absolute) |
    | overlay | whether the photograph covers the background |

    Raises UserError for a task or option that is not there, and where SAPIEN, a Vulkan device or
    the assets are missing.
    """
    for name, value, choices in (
        ("task", task.name, RULES),
        ("shader", shader, SHADERS),
        ("gripper", gripper, GRIPPERS),
    ):
        if value not in choices:
            raise UserError(
                f"{name}={value} with backend=simpler: choose one of {', '.join(choices)}"
            )
    if task.name in BRIDGE_RULES and gripper != "opening":
        raise UserError(f"gripper={gripper}: only for the Google robot; choose gripper=opening")
    robot_urdf(urdf_version)  # missing files are told before the renderer is opened
    sapien = require_renderer()
    sapien.render.set_camera_shader_dir(SHADERS[shader])
    simulator = _widowx if task.name in BRIDGE_RULES else _google_robot
    return RobotEnv(simulator(task, image_size, overlay, urdf_version, gripper), task, placement)


def _google_robot(
    task: Task, size: tuple[int, int] | None, overlay: bool, urdf_version: str, gripper: str
) -> Simulator:
    from selfflow.envs.simpler_simulator import SimplerDrawerScene
    from selfflow.envs.simpler_table import SimplerTableScene

    options: dict[str, Any] = {
        "image_size": size or (512, 640),
        "urdf_version": urdf_version,
        "gripper": GRIPPERS[gripper](),
        "overlay": overlay,
    }
    if task.name in TABLE_RULES:
        return SimplerTableScene(task=task, **options)
    return SimplerDrawerScene(apple=task.name == "open_drawer_place", **options)


def _widowx(
    task: Task, size: tuple[int, int] | None, overlay: bool, urdf_version: str, gripper: str
) -> Simulator:
    del urdf_version, gripper  # the Google robot's
    from selfflow.envs.simpler_bridge import IMAGE, SimplerBridgeScene

    return SimplerBridgeScene(task, size or IMAGE, overlay)
