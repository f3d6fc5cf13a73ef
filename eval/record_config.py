"""What is recorded and where to: every key of configs/record.yaml, and what is refused."""

from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from selfflow.configs.entry import one_of
from selfflow.datasets.spec import EMBODIMENTS, UserError, check_seeds, task_named
from selfflow.datasets.store import StoreHeader, read_header
from selfflow.envs.placements import KEEP_AWAY
from selfflow.envs.tasks import config_with, photographs
from selfflow.envs.twin_look import MOST_SIDE, USUAL, Look
from selfflow.eval.handover import check_handover
from selfflow.eval.parts import check_twin, tasks_of, twin_options
from selfflow.eval.results import check_writable
from selfflow.policies.base import Policy

PLACEMENTS = {"mujoco": "mild", "simpler": "train", "fake": "mild"}  # by backend
TWIN_SIZE = (128, 160)  # height, width; a store's header notes others
SIMPLER_SIZES = {"google_robot": (256, 320), "widowx": (240, 320)}  # height, width; their ratio


@dataclass(frozen=True)
class RecordConfig:
    """Every key of configs/record.yaml, which explains them."""

    task: str
    backend: str
    placement: str | None
    image_size: list[int] | None
    episodes: int
    seed: int
    workers: int
    noise: float
    noise_turn: float
    noisy_episodes: float
    noisy_steps: float
    linger: int
    keep_failures: bool
    out: str
    randomise: str = "none"
    handles: str = "visual"
    robot: str = "primitives"
    photo: bool = False
    look: Look = USUAL
    task_config: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    handover: list[int] = field(default_factory=lambda: [10, 100])


def check(config: RecordConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    task = task_named(config.task)
    one_of("backend", config.backend, PLACEMENTS)
    have = tasks_of(config.backend)
    if task.name not in have:
        raise UserError(
            f"task={task.name}: not built yet with backend={config.backend}; "
            f"choose one of {', '.join(have)}, or backend=simpler"
        )
    check_twin(config.backend, task, **twin_options(config))
    check_placement(config)
    check_image_size(config)
    away = getattr(config_with(task, config.task_config), "keep_away", KEEP_AWAY)
    if away < KEEP_AWAY:
        raise UserError(f"task_config.keep_away={away}: must be {KEEP_AWAY} m or more")
    for key, least, most in (
        ("episodes", 1, inf),
        ("workers", 1, inf),
        ("linger", 1, inf),
        ("noise", 0, 1),
        ("noise_turn", 0, 1),
        ("noisy_episodes", 0, 1),
        ("noisy_steps", 0, 1),
    ):
        value = getattr(config, key)
        if not least <= value <= most:  # nor is nan
            allowed = f"{least} or more" if most == inf else f"between {least} and {most}"
            raise UserError(f"{key}={value}: must be {allowed}")
    check_seeds(config.seed, config.episodes, "train")
    check_store(config)
    if config.checkpoint:
        check_handover(task, config.handover)
        make_driver(config)


def check_placement(config: RecordConfig) -> None:
    """Raises UserError for placements that are not to be trained on."""
    allowed = PLACEMENTS[config.backend]
    if config.placement == "grid":
        raise UserError(
            f"placement=grid: SIMPLER's evaluation cells, not to be trained on; choose {allowed}"
        )
    if config.placement not in (None, allowed):
        raise UserError(
            f"placement={config.placement} with backend={config.backend}: choose {allowed}"
        )


def check_image_size(config: RecordConfig) -> None:
    """Raises UserError for a size that the simulator does not draw."""
    size = config.image_size
    if size is None:
        return
    if len(size) != 2 or not 1 <= min(size) <= max(size) <= MOST_SIDE:
        raise UserError(f"image_size={size}: must be [height, width], each 1 to {MOST_SIDE}")
    if config.backend == "mujoco":
        return
    if config.backend != "simpler":
        raise UserError(f"image_size={size}: only with backend=mujoco or simpler; leave it out")
    height, width = usual = SIMPLER_SIZES[task_named(config.task).embodiment]
    if size[0] * width != size[1] * height:
        raise UserError(f"image_size={size}: must be [height, width] in the ratio of {list(usual)}")


def check_store(config: RecordConfig) -> None:
    """Raises UserError unless `out` is new, empty, or a store of the same kind."""
    out = Path(config.out)
    check_writable(out)
    if (out / "store.json").exists():
        held, ours = asdict(read_header(out)), asdict(header_of(config))
        other = ", ".join(f"{k}={v}" for k, v in held.items() if v != ours[k])
        if other:
            raise UserError(f"out={out}: holds episodes of {other}; choose another folder")
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"out={out}: holds something else than episodes; choose another folder")


def header_of(config: RecordConfig) -> StoreHeader:
    """What the store's episodes have in common."""
    task = task_named(config.task)
    cameras = EMBODIMENTS[task.embodiment].cameras
    header = StoreHeader(task.embodiment, task.name, cameras, config.backend)
    if config.backend != "simpler":
        size = tuple(config.image_size or TWIN_SIZE)
        return header if size == TWIN_SIZE else replace(header, image_size=size)
    height, width = config.image_size or SIMPLER_SIZES[task.embodiment]
    return replace(
        header,
        placement=PLACEMENTS["simpler"],
        image_size=(height, width),
        photographs=photographs(task, config_with(task, config.task_config)),
    )


def make_driver(config: RecordConfig) -> Policy | None:
    """The policy that acts before the expert. Raises UserError."""
    if not config.checkpoint:
        return None
    if not Path(config.checkpoint).is_dir():
        raise UserError(f"checkpoint={config.checkpoint}: no such folder; give a policy's run")
    from selfflow.policies.flow_policy import load_policy  # torch takes seconds to load

    return load_policy(config.checkpoint, task_named(config.task).embodiment)
