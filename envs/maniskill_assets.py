"""python envs/maniskill_assets.py

Where ManiSkill 3 looks for the files of its Bridge tasks, which is fixed when it is imported: the
folder that `MS_ASSET_DIR` names, else `~/.maniskill` if its own downloads are there, else links to
SIMPLER's files (envs/simpler_assets.py) in the user's cache folder, which this command makes.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from selfflow.datasets.spec import UserError
from selfflow.envs.bridge_tasks import PAIRS
from selfflow.envs.simpler_assets import asset, default_root

BRIDGE, WIDOWX = "data/tasks/bridge_v2_real2sim_dataset", "data/robots/widowx"
FOLDERS = {  # ManiSkill's name of a folder -> SIMPLER's
    "custom": "data/custom",
    "real_inpainting": "data/real_inpainting",
    "stages": "data/hab2_bench_assets/stages",
}
ROBOT = "mani_skill2_real2sim/assets/descriptions/widowx_description"
_FETCH = "python -m mani_skill.utils.download_asset"
DOWNLOAD = f"{_FETCH} bridge_v2_real2sim && {_FETCH} widowx250s"
PLACE = "python envs/simpler_assets.py source=..."
URDF, SRDF = "wx250s.urdf", "wx250s.srdf"
# Links whose hulls overlap wherever the joints stand. SIMPLER's clone has no list of them, and with
# their contacts the resting tool wanders off by 22 mm.
OVERLAPPING = (
    *combinations(
        (
            "wrist_link",
            "gripper_link",
            "gripper_prop_link",
            "gripper_bar_link",
            "left_finger_link",
            "right_finger_link",
        ),
        2,
    ),
    ("base_link", "upper_arm_link"),
)


def asset_folder() -> Path:
    """ManiSkill's asset folder (the module's docstring); makes the links where they are needed.
    Raises UserError where SIMPLER's files are missing too."""
    if named := os.environ.get("MS_ASSET_DIR"):
        return Path(named).expanduser()
    own = Path("~/.maniskill").expanduser()
    return own if (own / BRIDGE).is_dir() else lay_out(_linked())


def missing(folder: Path, task: str) -> list[Path]:
    """The files that a task needs and that are not below the asset folder."""
    pair = PAIRS[task]
    sink = not pair.corners
    baked = "_baked_tex" if pair.source.startswith("baked_") else ""
    models = [pair.source, pair.target, *(["sink"] if sink else [])]
    names = [
        f"{BRIDGE}/custom/info_bridge_custom{baked}_v0.json",
        f"{BRIDGE}/real_inpainting/{'bridge_sink' if sink else 'bridge_real_eval_1'}.png",
        f"{BRIDGE}/stages/bridge_table_1_v{2 if sink else 1}.glb",
        *(f"{BRIDGE}/custom/models/{model}/collision.obj" for model in models),
        f"{WIDOWX}/{URDF}",
    ]
    return [folder / name for name in names if not (folder / name).is_file()]


def require(folder: Path, task: str) -> None:
    """Raises UserError where a file of the task is missing: ManiSkill itself would ask on the
    terminal whether to download."""
    lacking = missing(folder, task)
    if lacking:
        raise UserError(
            f"backend=maniskill: {len(lacking)} of ManiSkill's files are missing, first "
            f"{lacking[0]}; run {cure(folder)}"
        )


def cure(folder: Path) -> str:
    """The command that completes this asset folder."""
    return PLACE if folder == _linked() else DOWNLOAD


def lay_out(folder: Path) -> Path:
    """Links SIMPLER's files into `folder` as ManiSkill names them; returns it. Raises UserError
    where those are missing. A repetition changes only what differs."""
    asset(ROBOT, URDF)
    for link, target in _links(folder, default_root().resolve()):
        _link(link, target)
    text = "".join(
        f'  <disable_collisions link1="{a}" link2="{b}" reason="Default"/>\n'
        for a, b in OVERLAPPING
    )
    _write(folder / WIDOWX / SRDF, f'<robot name="wx250s">\n{text}</robot>\n')
    return folder


def _links(folder: Path, root: Path) -> Iterator[tuple[Path, Path]]:
    for name, source in FOLDERS.items():
        yield folder / BRIDGE / name, root / source
    for file in (root / ROBOT).iterdir():  # one by one: a list of overlaps is put beside them
        if file.name != SRDF:
            yield folder / WIDOWX / file.name, file


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=link.parent) as scratch:
        fresh = Path(scratch) / link.name
        fresh.symlink_to(target)
        os.replace(fresh, link)  # several processes may do this at once


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text() == text:
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_text(text)
        os.replace(fresh, path)


def _linked() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "selfflow" / "maniskill"


def main() -> int:
    """Makes the folder and says what each task still lacks in it. Status 0, 1 if anything, 2 where
    it cannot be made."""
    try:
        folder = asset_folder()
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    lacking = {task: missing(folder, task) for task in PAIRS}
    for task, files in lacking.items():
        print(f"{task}: {'lacks ' + ', '.join(map(str, files)) if files else 'complete'}")
    print(f"ManiSkill's files: {folder} (MS_ASSET_DIR={folder} for its own scripts)")
    return 1 if any(lacking.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
