"""README and docs against the tree: the map is whole, commands compose, links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from selfflow.configs.entry import _jobs, compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "checkpoints").glob("*.md"))
MENTIONED = {  # somewhere in README or docs
    *("eval/record_demos.py", "eval/simpler_rollout.py", "eval/imagine.py", "eval/world_model.py"),
    *("worldmodel/train.py", "worldmodel/encode.py", "worldmodel/import_checkpoint.py"),
    *("policies/finetune.py", "worldmodel/estimate.py", "eval/sample_images.py"),
}


def entry(script: str) -> tuple[type, str] | None:
    """The config class and yaml that a script launches with, if it takes any key."""
    found = re.search(r"launch\((\w+), \w+, \"(\w+)\"", (ROOT / script).read_text())
    if not found:
        return None
    module = importlib.import_module("selfflow." + script.removesuffix(".py").replace("/", "."))
    return getattr(module, found[1]), found[2]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if words := re.match(r"(?:\S*/)?(?:python|torchrun .*?) (\w+/\S+\.py.*)", line):
                    found.append((page.name, words[1]))
    return found


def test_there_are_commands():
    assert {shlex.split(line)[0] for _, line in commands()} >= MENTIONED


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_composes(page: str, line: str):
    script, *words = shlex.split(line)
    overrides = [word for word in words if word != "-m"]
    found = entry(script)
    assert found or not words, f"{script} takes no keys"
    if found:
        for job in _jobs(overrides) if "-m" in words else [overrides]:
            compose(*found, job)


def test_map_names_every_file_and_no_other():
    text = README[README.index("## Map") :]
    named, folder = set(), ""
    for name in re.findall(r"`([\w/]+\.(?:py|sh))`", text):
        folder = name.rpartition("/")[0] or folder
        named.add(f"{folder}/{name.rpartition('/')[2]}")
    folders = ("worldmodel", "policies", "envs", "datasets", "configs", "eval", "eval/bench")
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
