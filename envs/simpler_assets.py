"""Where the SIMPLER data files are: `SIMPLER_ASSETS`, else the user's cache folder.

The files come from the public asset repository of SIMPLER (docs/simpler.md); none is in this one.
"""

import os
from pathlib import Path

from selfflow.datasets.spec import UserError

ROBOT_FOLDER = "mani_skill2_real2sim/assets/descriptions/googlerobot_description"
ROBOT_STEM = "google_robot_meta_sim_fix_wheel_fix_fingertip"
URDF_VERSIONS = (
    "none",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)


def default_root() -> Path:
    """The folder that SIMPLER_ASSETS names, else one in the user's cache folder. May not exist."""
    if named := os.environ.get("SIMPLER_ASSETS"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "selfflow" / "simpler_assets"


def asset(*parts: str) -> Path:
    """An existing file below the asset root. Raises UserError with the cure where it is missing."""
    root = default_root()
    if not root.is_dir():
        raise UserError(
            f"no SIMPLER assets at {root}; put them there or set SIMPLER_ASSETS to their folder "
            "(docs/simpler.md says which files)"
        )
    path = root.joinpath(*parts)
    if not path.is_file():
        raise UserError(
            f"SIMPLER asset {path.relative_to(root)} is missing in {root}; complete that folder or "
            "set SIMPLER_ASSETS to another (docs/simpler.md says which files)"
        )
    return path


def robot_urdf(version: str) -> Path:
    """The Google robot's description in one of URDF_VERSIONS (which differ in colour alone)."""
    if version not in URDF_VERSIONS:
        raise UserError(f"urdf_version={version}: choose one of {', '.join(URDF_VERSIONS)}")
    suffix = "" if version == "none" else f"_{version}"
    return asset(ROBOT_FOLDER, f"{ROBOT_STEM}{suffix}.urdf")


def station_urdf(name: str = "mk_station_recolor") -> Path:
    """A three-drawer cabinet."""
    return asset("data", "custom", f"{name}.urdf")


def model_files(name: str) -> tuple[Path, Path]:
    """Visual and collision mesh of an object."""
    folder = ("data", "custom", "models", name)
    return asset(*folder, "textured.glb"), asset(*folder, "collision.obj")


def photo(name: str) -> Path:
    """A photograph that covers the background of a visual-matching scene."""
    return asset("data", "real_inpainting", f"{name}.png")
