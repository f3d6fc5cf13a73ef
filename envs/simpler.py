"""SIMPLER's Google-robot drawer tasks in the real scene, on SAPIEN 3: `make_simpler(task)`.

Importing this needs no SAPIEN; frames, sensing and numbers are in docs/simpler.md.
"""

from selfflow.datasets.spec import Task, UserError
from selfflow.envs.base import RobotEnv
from selfflow.envs.gripper import GRIPPERS
from selfflow.envs.sapien_render import require_renderer
from selfflow.envs.simpler_assets import robot_urdf
from selfflow.envs.tasks import RULES

# SAPIEN 3's names for SIMPLER's shadings.
SHADERS = {"ibl": "default"}


def make_simpler(
    task: Task,
    placement: str = "mild",
    *,
    image_size: tuple[int, int] = (512, 640),
    urdf_version: str = "recolor_cabinet_visual_matching_1",
    shader: str = "ibl",
    gripper: str = "opening",
    overlay: bool = True,
) -> RobotEnv:
    """The task in the real scene.

    | option | choices |
    |---|---|
    | placement | mild, grid (envs/tasks.py) |
    | image_size | (height, width); the view is SIMPLER's at any size of ratio 4 : 5 |
    | urdf_version | the robot's colours: envs/simpler_assets.py |
    | shader | ibl (published drawer scores use ray tracing and are not comparable) |
    | gripper | opening, sticky (envs/gripper.py) |
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
    robot_urdf(urdf_version)  # missing files are told before the renderer is opened
    sapien = require_renderer()
    sapien.render.set_camera_shader_dir(SHADERS[shader])
    from selfflow.envs.simpler_simulator import SimplerDrawerScene

    simulator = SimplerDrawerScene(
        apple=task.name == "open_drawer_place",
        image_size=image_size,
        urdf_version=urdf_version,
        gripper=GRIPPERS[gripper](),
        overlay=overlay,
    )
    return RobotEnv(simulator, task, placement)
