"""The shape of the repository: names, sizes, layers, and what a wheel holds."""

import ast
import difflib
import importlib.metadata
import itertools
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("worldmodel", "policies", "envs", "datasets", "configs", "eval")
MODULES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))
FILES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), ROOT / "setup.py"]
SHIPPED = (".py", ".yaml", ".json", ".xml", ".safetensors")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_SHARED = 400, 60, 10, 0.60

by_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def tensors(call: ast.Call) -> bool:
    """torch.load that unpickles tensors only."""
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def test_there_is_something_to_check():
    assert len(MODULES) > 20


def test_no_init_files_so_that_datasets_never_shadows_another_package():
    assert not [p for f in (*FOLDERS, "tests") for p in (ROOT / f).rglob("__init__.py")]
    assert not (ROOT / "selfflow").exists()


def test_no_module_is_named_like_another_package():
    installed = set(importlib.metadata.packages_distributions())
    taken = (sys.stdlib_module_names | installed) - {"selfflow"}
    assert not {p.stem for p in MODULES} & taken


@by_file
def test_sizes(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{function.name} has {length} lines"
        a = function.args
        count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
        count -= bool(a.args and a.args[0].arg in ("self", "cls"))
        assert count <= MAX_PARAMETERS, f"{function.name} has {count} parameters"


@by_file
def test_no_swallowed_errors_no_path_edits_no_pickle(path):
    tree = ast.parse(path.read_text())
    test = path.parent.name == "tests"  # where pickles are made to see them refused
    safe = {call.func for call in ast.walk(tree) if isinstance(call, ast.Call) and tensors(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else set()
            )
            assert names, f"line {node.lineno}: bare except"
            assert not names & {"Exception", "BaseException"}, f"line {node.lineno}: broad except"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            wrong = {"sys.path"} if test else {"sys.path", "torch.load", "torch.save"}
            assert node in safe or name not in wrong, f"line {node.lineno}: {name}"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not test:
            parts = {a.name for a in node.names} | {getattr(node, "module", None)}
            if parts == {"pickle", "UnpicklingError"}:
                continue  # what torch.load raises for a file that is more than tensors
            assert not parts & {"pickle", "dill", "joblib", "cloudpickle"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"


def test_entry_points_begin_with_the_command_to_type():
    scripts = [p for p in MODULES if 'if __name__ == "__main__":' in p.read_text()]
    commanded = [p for p in scripts if "launch(" in p.read_text()]
    assert {"simpler_rollout.py"} <= {p.name for p in commanded}
    for path in commanded:
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        assert first.startswith(f"python {path.relative_to(ROOT)}"), f"{path}: {first}"


def test_no_two_files_are_mostly_the_same():
    lines = {p: [s for x in p.read_text().splitlines() if (s := x.strip())] for p in FILES}
    for a, b in itertools.combinations(FILES, 2):
        short = min(len(lines[a]), len(lines[b]))
        shared = len(set(lines[a]) & set(lines[b]))  # an upper bound that costs nothing
        if short < 20 or shared <= MAX_SHARED * short:
            continue
        matcher = difflib.SequenceMatcher(None, lines[a], lines[b], autojunk=False)
        same = sum(block.size for block in matcher.get_matching_blocks())
        assert same <= MAX_SHARED * short, f"{a.name} and {b.name} share {same} of {short} lines"


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(
        itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    )
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    names = {requirement.split(">")[0].split("[")[0].strip().lower() for requirement in wanted}
    assert names <= pinned
    assert "mujoco-core" not in names | pinned


@pytest.mark.slow
def test_wheel_holds_exactly_the_folders_and_imports_elsewhere(tmp_path):
    source = tmp_path / "source"
    skip = ignore_patterns("__pycache__")
    for folder in FOLDERS:
        copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("selfflow-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"selfflow/{p.relative_to(ROOT)}"
        for f in FOLDERS
        for p in (ROOT / f).rglob("*")
        if p.suffix in SHIPPED and "__pycache__" not in p.parts
    }
    assert held == expected
    target = tmp_path / "target"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = (
        "import selfflow.datasets.spec as s, selfflow.eval.parts as p;"
        "from selfflow.configs.entry import compose;"
        "c = compose(p.RolloutConfig, 'rollout', []); print(s.__file__, c.task)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [str(target / "selfflow/datasets/spec.py"), "open_drawer_place"]
