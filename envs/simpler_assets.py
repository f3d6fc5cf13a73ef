"""python envs/simpler_assets.py source=/path/to/ManiSkill2_real2sim

Places SIMPLER's data files where the scenes look for them: in the folder that `SIMPLER_ASSETS`
names, else in the user's cache folder. `source` is a clone of the public asset repository
simpler-env/ManiSkill2_real2sim, a folder laid out like it, or a git address, of which the pinned
commit is fetched. Every file is checked by its SHA-256 sum (envs/simpler_manifest.json). Of the six
meshes that clones tend to lack, stand-ins are built (envs/simpler_standins.py). Files that are
right already stay; the same command again completes what was interrupted.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfflow.datasets.spec import UserError
from selfflow.envs.simpler_standins import build, is_standin

ROBOT_FOLDER = "mani_skill2_real2sim/assets/descriptions/googlerobot_description"
ROBOT_STEM = "google_robot_meta_sim_fix_wheel_fix_fingertip"
URDF_VERSIONS = (
    "none",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)


class AssetMissing(UserError):
    """A data file that is not there; others may be."""


def default_root() -> Path:
    """The folder that SIMPLER_ASSETS names, else one in the user's cache folder. May not exist."""
    if named := os.environ.get("SIMPLER_ASSETS"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "selfflow" / "simpler_assets"


def asset(*parts: str) -> Path:
    """An existing file below the asset root. Raises AssetMissing with the cure where it is not
    there, UserError where there is no such folder."""
    root = default_root()
    if not root.is_dir():
        raise UserError(
            f"no SIMPLER assets at {root}; run python envs/simpler_assets.py source=... or set "
            "SIMPLER_ASSETS to their folder (docs/simpler.md says which files)"
        )
    path = root.joinpath(*parts)
    if not path.is_file():
        raise AssetMissing(
            f"SIMPLER asset {path.relative_to(root)} is missing in {root}; run "
            "python envs/simpler_assets.py source=... or set SIMPLER_ASSETS to another folder"
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
    loose = default_root().joinpath(*folder, "textured.dae").is_file()
    visual = asset(*folder, "textured.dae" if loose else "textured.glb")
    return visual, asset(*folder, "collision.obj")


def stage(name: str) -> Path:
    """The mesh of a room; y is up."""
    return asset("data", "hab2_bench_assets", "stages", f"{name}.glb")


def photo(name: str) -> Path:
    """A photograph that covers the background of a visual-matching scene."""
    return asset("data", "real_inpainting", f"{name}.png")


# --- the manifest ---------------------------------------------------------------------------------

MANIFEST = Path(__file__).with_name("simpler_manifest.json")
ORIGINALS = "data/custom/info_original"  # the object tables as they are upstream


@dataclass(frozen=True)
class State:
    """The files of the manifest in a folder, by path below it."""

    right: tuple[str, ...]
    standins: tuple[str, ...]  # of ours, in the place of a mesh that could not be had
    missing: tuple[str, ...]
    wrong: tuple[str, ...]  # of another sum than the manifest's

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or wrong."""
        return not self.missing and not self.wrong

    def __str__(self) -> str:
        names = [f"{name} (missing)" for name in self.missing]
        names += [f"{name} (changed)" for name in self.wrong]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        have = f"{len(self.right)} files right, {len(self.standins)} stand-ins"
        return f"{have}, {len(names)} missing or changed" + (
            f": {', '.join(names[:3])}{more}" if names else ""
        )


def manifest() -> dict[str, Any]:
    """repository, commit; "files": SHA-256 by path; "tables": which entries of the original object
    tables the tables hold; "standins": paths of those, with the sums of known ones."""
    return json.loads(MANIFEST.read_text())


def verify(root: Path) -> State:
    """Compares a folder with the manifest."""
    known = manifest()
    right, standins, missing, wrong = [], [], [], []
    for name, total in known["files"].items():
        path = root / name
        (missing if not path.is_file() else right if _sum(path) == total else wrong).append(name)
    for name, total in known["standins"].items():
        path = root / name
        if not path.is_file():
            missing.append(name)
        else:
            (standins if is_standin(path) or _sum(path) == total else right).append(name)
    return State(tuple(right), tuple(standins), tuple(missing), tuple(wrong))


def present(pattern: str) -> bool:
    """Whether a file below the asset root has that path, in which * may stand for anything."""
    return any(path.is_file() for path in default_root().glob(pattern))


def genuine(pattern: str) -> bool:
    """Whether a file of that path (see `present`) is there that is not a stand-in."""
    root, known = default_root(), manifest()["standins"]
    files = [path for path in root.glob(pattern) if path.is_file()]
    sums = {path: known.get(path.relative_to(root).as_posix()) for path in files}
    return any(not is_standin(p) and (not sums[p] or _sum(p) != sums[p]) for p in files)


# --- placing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AssetsConfig:
    """Every key of configs/simpler_assets.yaml, which explains them."""

    source: str
    out: str | None

    @property
    def root(self) -> Path:
        """Where the files go."""
        return Path(self.out).expanduser() if self.out else default_root()

    @property
    def address(self) -> bool:
        """Whether the source is a git address and not a folder."""
        return not Path(self.source).expanduser().is_dir() and (
            "://" in self.source or self.source.startswith("git@")
        )


def check(config: AssetsConfig) -> None:
    """What can be wrong before anything is written."""
    source = Path(config.source).expanduser()
    if not config.address and not (source / "data").is_dir():
        raise UserError(
            f"source={config.source}: no folder with data/ in it; give a clone of "
            f"{manifest()['repository']} or its git address"
        )
    if config.root.exists() and not config.root.is_dir():
        raise UserError(f"{config.root}: is a file; set SIMPLER_ASSETS to a folder")


def main(config: AssetsConfig) -> State:
    """Places what is not right yet and prints what there is. Raises UserError if files are missing
    in the source too, once all others are in place."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    with _opened(config) as source:
        known = manifest()
        names = [*known["files"], *known["standins"]]
        for name in track(names, "placing", console=console, disable=not console.is_terminal):
            place(name, source, config.root, known)
    state = verify(config.root)
    console.print(f"{config.root}: {state}", soft_wrap=True, highlight=False)
    for name in state.standins:
        console.print(f"  stand-in: {name}", soft_wrap=True, highlight=False)
    if not state.complete:
        raise UserError(
            f"source={config.source}: not all files of commit {known['commit'][:7]} are in it; "
            f"{config.root} has {state}"
        )
    return state


def place(name: str, source: Path, root: Path, known: dict[str, Any]) -> None:
    """Puts one file of the manifest below `root`, whole or not at all; leaves it be where it is
    right already, and where the source has nothing that is right. A stand-in gives way to what the
    source has, not the other way round."""
    target, total = root / name, known["files"].get(name)
    held = target.read_bytes() if target.is_file() else None
    for content in [*([held] if total and held else []), *_contents(name, source, known)]:
        if total is None or hashlib.sha256(content).hexdigest() == total:
            if content == held:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            part.write_bytes(content)
            os.replace(part, target)
            return


def _contents(name: str, source: Path, known: dict[str, Any]) -> Iterator[bytes]:
    """What the file may be made of, the best first."""
    paths = [source / name]
    if name.startswith(ORIGINALS):
        paths.append(source / "data/custom" / Path(name).name)
    yield from (path.read_bytes() for path in paths if path.is_file())
    if name in known["standins"]:
        content = build(name, source)
        yield from [] if content is None else [content]
    if name in known["tables"]:  # the originals name models that are not in the set
        kept = known["tables"][name]
        for folder in (source / ORIGINALS, source / "data/custom"):
            if (path := folder / Path(name).name).is_file():
                table = json.loads(path.read_bytes())
                kept_entries = {key: table[key] for key in kept if key in table}
                yield json.dumps(kept_entries, indent=4).encode()


@contextmanager
def _opened(config: AssetsConfig) -> Iterator[Path]:
    """The source as a folder; a git address is fetched at the manifest's commit and thrown away."""
    if not config.address:
        yield Path(config.source).expanduser()
        return
    commit = manifest()["commit"]
    with tempfile.TemporaryDirectory(prefix="selfflow_assets_") as name:
        print(f"fetching {config.source} at {commit[:7]} (some hundred MB)", flush=True)
        for words in (
            ["init", "-q"],
            ["fetch", "-q", "--depth", "1", "--", config.source, commit],
            ["checkout", "-q", "FETCH_HEAD"],
        ):
            _git(name, words)
        yield Path(name)


def _git(folder: str, words: list[str]) -> None:
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}  # fail, do not ask for a password
    try:
        done = subprocess.run(
            ["git", "-C", folder, *words], env=environment, capture_output=True, text=True
        )
    except FileNotFoundError as e:
        raise UserError("git is not installed; install it, or give source=a folder") from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"git {words[0]} failed ({last}); give source=another address or a folder")


def _sum(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    from selfflow.configs.entry import launch

    launch(AssetsConfig, main, "simpler_assets", check)
