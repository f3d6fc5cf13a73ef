"""python envs/doctor.py

Says what works on this machine, what does not, and the command that cures it: the MuJoCo twin and
its drawing, the Vulkan device and its driver, SAPIEN, SIMPLER's data files, and ManiSkill. Exit
status 0 if a rollout in the twin works, 1 if not; what the other backends lack is in the text.
"""

import ctypes.util
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfflow.datasets.spec import TASKS, UserError
from selfflow.envs import maniskill_assets, sapien_render, simpler_assets, vulkan
from selfflow.envs.bridge_tasks import PAIRS

OPENGL = "apt-get install --no-install-recommends libegl1 libgl1"
SETUP, PLACE = "make simpler-setup", "python envs/simpler_assets.py source=..."
MANISKILL = "python -m pip install 'selfflow[maniskill]'"
RENDER_SECONDS = 180  # a cold shader cache takes 16


@dataclass(frozen=True)
class Finding:
    """What a check came to; `cure` is the command to type where it does not work."""

    what: str
    works: bool
    says: str
    cure: str = ""


def twin() -> Finding:
    """An episode's first steps in the twin, which need MuJoCo and one way of drawing."""
    from selfflow.envs.twin import make_mujoco

    env = make_mujoco(TASKS["open_drawer_place"], image_size=(64, 80))
    try:
        env.reset(seed=0)
        observation, *_ = env.step(np.zeros(7, np.float32))
    finally:
        env.close()
    drawn = observation["images"]["overhead_camera"]
    version = importlib.metadata.version("mujoco")
    if np.ptp(drawn) == 0:
        return Finding("twin", False, f"MuJoCo {version} draws an empty picture", OPENGL)
    return Finding("twin", True, f"MuJoCo {version} steps and draws")


def opengl() -> Finding:
    """How the twin is drawn: EGL, OSMesa, or rays on the CPU, which are slower and flat."""
    from selfflow.envs.twin_render import make_renderer
    from selfflow.envs.twin_scene import build

    said = StringIO()
    with redirect_stderr(said):  # the ray renderer announces itself
        renderer = make_renderer(build(64, 80), 64, 80)
        renderer.close()
    egl = "libEGL found" if ctypes.util.find_library("EGL") else "no libEGL"
    if renderer.kind == "ray":
        why = said.getvalue().strip() or "SELFFLOW_RENDERER=ray"
        return Finding("OpenGL", False, f"{egl}; the twin is drawn with CPU rays: {why}", OPENGL)
    return Finding("OpenGL", True, f"{egl}; the twin is drawn with {renderer.kind}")


def vulkan_device() -> Finding:
    """The first Vulkan device, which SAPIEN takes."""
    try:
        device = vulkan.devices()[0]
    except RuntimeError as e:
        return Finding("Vulkan", False, str(e), SETUP)
    if device.old_mesa:
        return Finding("Vulkan", False, f"{device}: SAPIEN needs Mesa 25 or later", SETUP)
    return Finding("Vulkan", True, str(device))


def sapien() -> Finding:
    """A test picture drawn by SAPIEN, in a process of its own: old drivers crash it."""
    try:
        version = importlib.metadata.version("sapien")
    except importlib.metadata.PackageNotFoundError:
        return Finding("SAPIEN", False, "the package sapien is not installed", SETUP)
    command = [sys.executable, "-W", "ignore", "-m", sapien_render.__name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RENDER_SECONDS)
    except subprocess.TimeoutExpired:
        says = f"SAPIEN {version} drew nothing within {RENDER_SECONDS} s"
        return Finding("SAPIEN", False, says, SETUP)
    if done.returncode < 0:
        says = f"SAPIEN {version} crashed with signal {-done.returncode} while it drew"
        return Finding("SAPIEN", False, says, SETUP)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    says = lines[-1] if lines else f"SAPIEN {version} said nothing"
    return Finding("SAPIEN", done.returncode == 0, says, "" if done.returncode == 0 else SETUP)


def assets() -> Finding:
    """SIMPLER's data files against the manifest."""
    root = simpler_assets.default_root()
    named = "SIMPLER_ASSETS" if os.environ.get("SIMPLER_ASSETS") else "the user's cache folder"
    if not root.is_dir():
        return Finding("assets", False, f"no folder {root} ({named})", PLACE)
    state = simpler_assets.verify(root)
    return Finding("assets", state.complete, f"{root}: {state}", "" if state.complete else PLACE)


def maniskill() -> Finding:
    """ManiSkill and the files of its WidowX tasks, which are linked from SIMPLER's if need be."""
    try:
        version = importlib.metadata.version("mani-skill")
    except importlib.metadata.PackageNotFoundError:
        return Finding("mani-skill", False, "the package mani-skill is not installed", MANISKILL)
    try:
        folder = maniskill_assets.asset_folder()
    except UserError as e:
        return Finding("mani-skill", False, f"mani-skill {version}; {e}", PLACE)
    lacking = {task: maniskill_assets.missing(folder, task) for task in PAIRS}
    first = next((str(file) for files in lacking.values() for file in files), "")
    says = f"mani-skill {version}, files in {folder}" + (f"; missing: {first}" if first else "")
    return Finding("mani-skill", not first, says, maniskill_assets.cure(folder) if first else "")


Check = Callable[[], Finding]
# With the cure for what a check itself may raise.
FOR_THE_TWIN: tuple[tuple[Check, str], ...] = (
    (twin, "python -m pip install -e ."),
    (opengl, OPENGL),
)
FOR_SIMPLER: tuple[tuple[Check, str], ...] = (
    (vulkan_device, SETUP),
    (sapien, SETUP),
    (assets, PLACE),
)
FOR_MANISKILL: tuple[tuple[Check, str], ...] = ((maniskill, MANISKILL),)


def examine(check: Check, cure: str) -> Finding:
    """The check's finding; what it raises about the machine is a finding too."""
    try:
        return check()
    except (UserError, ImportError, OSError, RuntimeError, AttributeError) as e:
        return Finding(check.__name__.replace("_", " "), False, f"{type(e).__name__}: {e}", cure)


def report(findings: list[Finding], console: Console) -> None:
    """Prints a line a check, then a line a backend."""
    table = Table("", "", "says", "cure", box=None, pad_edge=False)
    for f in findings:
        mark = "[green]works[/]" if f.works else "[red]fails[/]"
        table.add_row(escape(f.what), mark, escape(f.says), escape(f.cure))
    console.print(table)
    first, last = len(FOR_THE_TWIN), len(FOR_THE_TWIN) + len(FOR_SIMPLER)
    drawn = [f for f in findings[first:last] if f.what != "assets"]  # ManiSkill may have its own
    twin = "works" if findings[0].works else f"fails: {findings[0].says}"
    for backend, says in (
        ("mujoco", twin),
        ("simpler", _verdict(findings[first:last])),
        ("maniskill", _verdict([*drawn, *findings[last:]])),
    ):
        console.print(f"backend={backend} {says}", soft_wrap=True, markup=False)


def _verdict(needed: list[Finding]) -> str:
    lacks = [f for f in needed if not f.works]
    cures = "; ".join(dict.fromkeys(f.cure for f in lacks))
    missing = ", ".join(f.what for f in lacks)
    return f"lacks {missing}; type: {cures}" if lacks else "works"


def main(console: Console | None = None) -> int:
    """Runs every check and prints what it found. 0 if a rollout in the twin works, else 1."""
    checks = (*FOR_THE_TWIN, *FOR_SIMPLER, *FOR_MANISKILL)
    findings = [examine(check, cure) for check, cure in checks]
    report(findings, console or Console())
    return 0 if findings[0].works else 1


if __name__ == "__main__":
    sys.exit(main())
