"""README and docs against the tree: the map is whole, commands compose, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from selfflow.configs.entry import compose
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.record_demos import RecordConfig
from selfflow.policies.finetune import FinetuneConfig
from selfflow.worldmodel.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "checkpoints").glob("*.md"))
SCRIPTS = {
    "eval/record_demos.py": (RecordConfig, "record"),
    "eval/simpler_rollout.py": (RolloutConfig, "rollout"),
    "worldmodel/train.py": (TrainConfig, "train"),
    "policies/finetune.py": (FinetuneConfig, "finetune"),
}


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if re.match(r"(\S*/)?python \S+\.py", line):
                    found.append((page.name, line))
    return found


def test_there_are_commands():
    assert {shlex.split(line)[1] for _, line in commands()} == set(SCRIPTS)


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_composes(page: str, line: str):
    _, script, *overrides = shlex.split(line)
    config, name = SCRIPTS[script]
    compose(config, name, overrides)


def test_map_names_every_file_and_no_other():
    text = README[README.index("## Map") :]
    named, folder = set(), ""
    for name in re.findall(r"`([\w/]+\.(?:py|sh))`", text):
        folder = name.rpartition("/")[0] or folder
        named.add(f"{folder}/{name.rpartition('/')[2]}")
    folders = ("worldmodel", "policies", "envs", "datasets", "configs", "eval")
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".sh")
    }
    assert named == files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
