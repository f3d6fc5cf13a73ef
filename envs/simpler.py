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
from selfflow.envs.simpler_variants import check_variant
from selfflow.envs.tasks import RULES, TABLE_TASKS

SHADERS = ("ibl", "rt")
SAMPLES = 4  # rays a pixel with rt, unless given
SIZES = {"google_robot": (512, 640), "widowx": (480, 640)}  # (height, width) of SIMPLER's pictures


def make_simpler(
    task: Task,
    placement: str = "mild",
    *,
    image_size: tuple[int, int] | None = None,
    urdf_version: str = "recolor_cabinet_visual_matching_1",
    shader: str = "ibl",
    gripper: str = "opening",
    overlay: bool = True,
    variant: str = "visual_matching",
    pictures: bool = True,
    samples: int | None = None,
) -> RobotEnv:
    """The task in the real scene.

    | option | choices |
    |---|---|
    | placement | mild, grid, variants, train (envs/tasks.py), which draws the colours too |
    | image_size | (height, width), in SIMPLER's ratio; (512, 640), WidowX (480, 640) |
    | urdf_version | the Google robot's colours: envs/simpler_assets.py |
    | shader | ibl; rt traces rays, as published drawer scores do: seconds a picture |
    | samples | rays a pixel with rt; None is 4 |
    | gripper | opening, relative, sticky (envs/gripper.py; the WidowX has its own) |
    | overlay | whether the photograph covers the background |
    | variant | of the Google robot's scenes: envs/simpler_variants.py |
    | pictures | False leaves `images` empty and draws nothing but what `render()` asks for |

    Another config of the task: `make_simpler(task).with_config(config)`.
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
    check_variant(task.name, variant)
    if task.name in BRIDGE_RULES and gripper != "opening":
        raise UserError(f"gripper={gripper}: only for the Google robot; choose gripper=opening")
    samples, size = samples_of(shader, samples), _size_of(task, image_size)
    if task.name not in BRIDGE_RULES:
        robot_urdf(urdf_version)  # missing files are told before the renderer is opened
    require_renderer()
    if task.name in BRIDGE_RULES:
        simulator = _widowx(task, samples, size, overlay)
    else:
        simulator = _google_robot(
            task,
            samples,
            image_size=size,
            urdf_version=urdf_version,
            gripper=GRIPPERS[gripper](),
            overlay=overlay,
            variant=variant,
        )
    return RobotEnv(simulator, task, placement, pictures)


def samples_of(shader: str, samples: int | None) -> int | None:
    """Rays a pixel: None with ibl, which has none. Raises UserError."""
    if shader != "rt" and samples is not None:
        raise UserError(f"samples={samples}: rays a pixel, only with shader=rt; leave it out")
    if samples is not None and samples < 1:
        raise UserError(f"samples={samples}: must be 1 or more")
    return (samples or SAMPLES) if shader == "rt" else None


def _size_of(task: Task, size: tuple[int, int] | None) -> tuple[int, int]:
    usual = SIZES[task.embodiment]
    height, width = size or usual
    if height < 1 or height * usual[1] != width * usual[0]:
        raise UserError(f"image_size={size}: must be (height, width) in the ratio of {usual}")
    return height, width


def _google_robot(task: Task, samples: int | None, **options: Any) -> Simulator:
    from selfflow.envs.simpler_simulator import SimplerDrawerScene
    from selfflow.envs.simpler_table import SimplerTableScene

    if task.name in TABLE_TASKS:
        simulator = SimplerTableScene(task=task, **options)
    else:
        simulator = SimplerDrawerScene(apple=task.name == "open_drawer_place", **options)
    simulator.samples = samples
    return simulator


def _widowx(task: Task, samples: int | None, size: tuple[int, int], overlay: bool) -> Simulator:
    from selfflow.envs.simpler_bridge import SimplerBridgeScene

    simulator = SimplerBridgeScene(task, size, overlay)
    simulator.samples = samples
    return simulator
