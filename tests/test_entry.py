"""Entry points by subprocess: a user's mistake is one line, status 2, and no file."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from selfflow.configs import entry
from selfflow.datasets.spec import UserError

ROOT = Path(__file__).parents[1]
ROLLOUT = ROOT / "eval" / "simpler_rollout.py"


def start(folder: Path, *arguments: str, script: Path = ROLLOUT) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SIMPLER_ASSETS": "/nowhere"},
    )


def run(folder: Path, *arguments: str, script: Path = ROLLOUT) -> tuple[int, str, str]:
    process = start(folder, *arguments, script=script)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


MISTAKES = {
    ("episodez=3",): "episodez: no such key; did you mean episodes?",
    ("-m", "seed=200000,5", "policy=hold"): "seed=5",
}
MORE = {
    ("task=nope",): "choose one of open_top_drawer",
    ("episodes=abc",): "episodes: Value 'abc'",
    ("checkpoint=/nowhere",): "/nowhere",
}


@pytest.mark.parametrize("cases", [MISTAKES, pytest.param(MORE, marks=pytest.mark.slow)])
def test_mistakes_are_one_line_with_the_cure_and_nothing_is_written(tmp_path, cases):
    started = {case: start(tmp_path, *case) for case in cases}
    for case, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (case, err)
        assert err.startswith("simpler_rollout.py: "), err
        assert cases[case] in err
        assert err.count("\n") == 1, err
        assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_run_ends_with_the_table_and_leaves_only_its_own_files(tmp_path):
    status, out, err = run(
        tmp_path, "task=close_top_drawer", "backend=fake", "policy=hold", "episodes=1", "videos=0"
    )
    assert (status, err) == (0, "")
    assert "0 / 1" in out
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert [Path(name).name for name in found] == ["config.json", "episodes.jsonl", "summary.json"]
    assert str(Path(found[0]).parent) in out  # says where
    assert Path(found[0]).parts[0] == "outputs"


@pytest.mark.slow
def test_flags(tmp_path):
    jobs = {
        "help": start(tmp_path, "--help"),
        "cfg": start(tmp_path, "task=close_top_drawer", "--cfg", "job"),
        "module": start(tmp_path, "selfflow.eval.simpler_rollout", "task=nope", script=Path("-m")),
        "many": start(
            tmp_path,
            "-m",
            "task=close_top_drawer,open_top_drawer",
            "backend=fake",
            "policy=hold",
            "episodes=1",
            "videos=0",
            "out=many",
        ),
        "late": start(  # a mistake that only main finds
            tmp_path, "-m", "backend=simpler", "policy=hold", "seed=200000,200009", "out=late"
        ),
    }
    done = {name: (*job.communicate(timeout=120), job.returncode) for name, job in jobs.items()}
    assert done["help"][0].startswith("python eval/simpler_rollout.py task=open_drawer_place")
    assert "backend: mujoco #" in done["help"][0]
    assert "task: close_top_drawer" in done["cfg"][0]
    assert done["module"][2] == 2
    assert done["late"][2] == 2
    assert done["late"][1].startswith("simpler_rollout.py: ")
    assert done["late"][1].count("\n") == 1
    assert done["many"][2] == 0, done["many"][1]
    for number, task in enumerate(("close_top_drawer", "open_top_drawer")):
        assert task in (tmp_path / "many" / str(number) / "summary.json").read_text()


# --- in process: nested dataclasses and groups, as the training scripts have them ----------------


@dataclass(frozen=True)
class Model:
    width: int
    name: str = "x"


@dataclass(frozen=True)
class Train:
    model: Model
    data: str
    rate: float
    extra: Model | None
    tags: tuple[str, ...]
    out: str

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate}: must be positive")


@pytest.fixture
def compose(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("width: 8\nname: tiny\n")
    (tmp_path / "model" / "large.yaml").write_text("width: 80\nname: large\n")
    (tmp_path / "base.yaml").write_text((ROOT / "configs" / "base.yaml").read_text())
    (tmp_path / "train.yaml").write_text(
        "defaults: [base, {model: tiny}, _self_]\ndata: ???\nrate: 0.1\nextra: null\ntags: [a, b]\n"
    )
    monkeypatch.setattr(entry, "FOLDER", tmp_path)
    return lambda *overrides: entry.compose(Train, "train", list(overrides))


def test_config_becomes_frozen_dataclasses(compose):
    config = compose("data=d", "model=large", "model.name=mine", "rate=1", "out=here")
    assert config.model == Model(80, "mine")
    assert (config.rate, config.extra, config.out) == (1.0, None, "here")
    assert list(config.tags) == ["a", "b"]
    assert compose("data=d", "extra={width: 3}").extra == Model(3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "data=... is required"),
        (("data=d", "model=huge"), "model=huge: no such model; choose one of large, tiny"),
        (("data=d", "model=larg"), "did you mean large?"),
        (("data=d", "model.widht=3"), "model.widht: no such key; did you mean width?"),
        (("data=d", "nope.width=3"), "nope.width: no such key; choose one of data"),
        (("data=d", "model.width=wide"), "model.width: Value 'wide'"),
        (("data=d", "+model.depth=3"), "model.depth: no such key;"),
        (("data=d", "rate=-1"), "rate=-1.0: must be positive"),
        (("data",), "data: not of the form key=value"),
        (("data=d", "rate=1,2"), "add --multirun"),
    ],
)
def test_mistakes_in_configs(compose, overrides, says):
    with pytest.raises(UserError) as caught:
        compose(*overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_of():
    assert entry.one_of("backend", "a", ["a", "b"]) == "a"
    with pytest.raises(UserError, match=r"backend=alpa: no such backend; did you mean alpha\?"):
        entry.one_of("backend", "alpa", ["beta", "alpha"])


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.yaml")))
def test_every_config_of_an_entry_point_starts_from_base(name):
    cfg = OmegaConf.load(ROOT / "configs" / f"{name}.yaml")
    if name.startswith("bench_"):
        return  # prints a table and writes nothing
    assert name == "base" or {"base", "train"} & set(map(str, cfg.defaults))


@pytest.mark.slow
def test_a_rollout_does_not_wait_for_what_only_many_gpus_need(tmp_path):
    told = "import sys, selfflow.eval.simpler_rollout, selfflow.policies.load; print(*sys.modules)"
    _, out, err = run(tmp_path, told, script=Path("-c"))
    assert not err
    assert "torch.distributed.tensor" not in out.split()  # it brings sympy along
