"""Imagining and measuring, from a checkpoint on disk to the files that are written."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from selfflow.configs.entry import compose
from selfflow.datasets.normalize import fit, to_json
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreHeader, StoreWriter
from selfflow.eval import imagine as imagining
from selfflow.eval import world_model as measuring
from selfflow.eval.imagine import ImagineConfig
from selfflow.eval.world import Windows, World, imagine, load_world
from selfflow.eval.world_model import WorldModelConfig
from selfflow.worldmodel.checkpoint import FORMAT
from selfflow.worldmodel.dream import Sampling
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.transformer import (
    ModelConfig,
    Prefix,
    Tokens,
    Valid,
    VideoActionTransformer,
)

LAYOUT = Layout(32, 40, patch=8, stride=2, chunk=3)
STEPS = 14


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Three episodes with random signals; a frame's brightness says its step."""
    folder = tmp_path_factory.mktemp("data") / "store"
    rng = np.random.default_rng(0)
    header = StoreHeader("google_robot", "open_drawer_place", ("overhead_camera",), "fake")
    with StoreWriter(folder, "000", header) as writer:
        for seed in range(3):
            n = STEPS
            images = [np.full((32, 40, 3), 100 + 8 * t, np.uint8) for t in range(n)]
            proprio = np.tile(np.float32([0.5, 0, 0.8, 1, 0, 0, 0, 1]), (n, 1))
            actions = rng.uniform(-0.1, 0.1, (n - 1, 7)).astype(np.float32)
            pose = rng.uniform(0, 0.3, (n, 3)).astype(np.float32)
            turn = np.tile(np.float32([1, 0, 0, 0]), (n, 1))
            writer.append(
                EpisodeRecord(
                    images={"overhead_camera": images},
                    proprio=proprio + rng.uniform(0, 0.1, (n, 1)).astype(np.float32),
                    actions=actions,
                    executed=actions,
                    terminate=np.arange(n) == n - 1,
                    instruction=["open top drawer"] * 7 + ["place apple into top drawer"] * 7,
                    seed=seed,
                    success=True,
                    privileged={
                        "drawers": pose,
                        "apple": np.concatenate([pose, turn], 1),
                        "base": np.concatenate([0 * pose, turn], 1),
                    },
                )
            )
    return EpisodeStore(folder)


def write_checkpoint(folder: Path, store: EpisodeStore, seed: int = 0) -> Path:
    """A random model, as training leaves it."""
    torch.manual_seed(seed)
    config = ModelConfig(24, 2, 2, 2.0, "prefix", LAYOUT.modalities())
    model = VideoActionTransformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    place = folder / "checkpoints" / "step-000001"
    place.mkdir(parents=True)
    save_file(
        {f"backbone.{k}": v for k, v in model.state_dict().items()}, place / "model.safetensors"
    )
    meta = {
        "format": FORMAT,
        "kind": "worldmodel",
        "model": config.to_dict(),
        "layout": asdict(LAYOUT),
        "embodiments": {"names": ["google_robot"], "rates": [3.0]},
        "text_encoder": "hash384",
        "action": {},
        "provenance": {"data": [f"{store.folder}@0.5"]},
    }
    (place / "config.json").write_text(json.dumps(meta))
    (place / "stats.json").write_text(json.dumps(to_json(fit([store]))))
    return folder


@pytest.fixture(scope="module")
def runs(store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_checkpoint(folder / name, store, i) for i, name in enumerate(("one", "two"))]


class Oracle(VideoActionTransformer):
    """Knows the next clean tokens: a frame 10 levels brighter than the one shown; actions -0.5."""

    def prefix(self, tokens: Tokens, tau: Tensor, valid: Valid = None) -> Prefix:
        self.shown, self.seen_valid = tokens["context"], valid or {}
        assert bool((tau == 0).all())
        return Prefix((), ())

    def decode(
        self, tokens: Tokens, tau: Tensor, group: Tensor, prefix: Prefix, valid: Valid = None
    ) -> Tokens:
        aims = {"video": self.shown + 10 / 127.5, "action": torch.full_like(tokens["action"], -0.5)}
        self.action_times = tau[:, group[0, -1]]
        return {name: (tokens[name] - aim) / tau[:, 1:, None] for name, aim in aims.items()}


@pytest.fixture(scope="module")
def imagine_config(runs: list[Path], store: EpisodeStore) -> ImagineConfig:
    out = runs[0].parent / "imagined"
    overrides = [f"checkpoint={runs[0]}", f"episode={store.folder}:1", f"out={out}", "steps=2"]
    return compose(ImagineConfig, "imagine", [*overrides, "threads=1"])


@pytest.fixture(scope="module")
def world_config(runs: list[Path], store: EpisodeStore) -> WorldModelConfig:
    small = ["starts=2", "horizon=2", "steps=2", "frames=3", "folds=3", "bootstrap=30"]
    small += ["threads=1", "taus=[0.1]"]
    overrides = [f"checkpoint=[{runs[0]},{runs[1]}]", f"data=[{store.folder}]"]
    return compose(WorldModelConfig, "world_model", [*overrides, *small])


@pytest.fixture
def oracle(runs: list[Path]) -> World:
    world = load_world(runs[0])
    return replace(world, model=Oracle(world.model.config))


def test_a_checkpoint_becomes_a_world(runs: list[Path], store: EpisodeStore) -> None:
    world = load_world(runs[0])
    assert world.name == "one"
    assert world.layout == LAYOUT
    assert world.saw(str(store.folder))
    assert not world.saw(str(store.folder.parent))
    assert not any(p.requires_grad for p in world.model.parameters())
    with pytest.raises(UserError, match="no such folder"):
        load_world(runs[0] / "nowhere")


def test_every_window_sees_what_was_imagined_before(oracle: World, store: EpisodeStore) -> None:
    windows = Windows(store, LAYOUT)
    seen = imagine(oracle, windows, [(0, 0), (2, 3)], 3, Sampling("euler", 3), 0)
    first = np.array([100, 124])
    assert np.abs(seen.shown[:, 0, 0, 0] - first).max() <= 1  # JPEG
    shown = seen.shown.astype(int)
    for k in range(3):
        assert np.abs(seen.frames[:, k] - (shown + 10 * (k + 1))).max() <= 1
    assert np.abs(seen.real[:, :, 0, 0, 0] - (first[:, None] + [16, 32, 48])).max() <= 1
    assert seen.real_valid.all()
    assert np.array_equal(seen.actions, seen.real_actions)
    model = oracle.model
    assert isinstance(model, Oracle)
    assert not model.seen_valid["proprio"].any(), "proprioception is known at the start only"
    assert (model.action_times == 0).all(), "given actions are clean"


def test_predicted_actions_come_in_the_robots_units(oracle: World, store: EpisodeStore) -> None:
    seen = imagine(
        oracle, Windows(store, LAYOUT), [(1, 0)], 2, Sampling("euler", 3), 0, "predicted"
    )
    statistics = oracle.reader.statistics["google_robot"]
    low, high = np.array(statistics.action_q01), np.array(statistics.action_q99)
    expected = low + 0.25 * (high - low)
    assert seen.actions.shape == (1, 2, 3, 7)
    assert np.allclose(seen.actions[..., :6], expected[:6], atol=1e-5)
    assert np.allclose(seen.actions[..., 6], -0.5, atol=1e-5), "the gripper is not scaled"


def test_the_future_outlasts_the_episode(oracle: World, store: EpisodeStore) -> None:
    seen = imagine(oracle, Windows(store, LAYOUT), [(0, STEPS - 4)], 4, Sampling("euler", 2), 0)
    assert seen.real_valid.tolist() == [[True, False, False, False]]
    assert seen.frames.shape[1] == 4


def test_the_instruction_can_be_another(
    oracle: World, store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    embed: Callable[[list[str]], np.ndarray] = type(oracle.reader.text).embed

    def noting(self: object, texts: list[str]) -> np.ndarray:
        told.extend(texts)
        return embed(self, texts)  # type: ignore[call-arg]

    monkeypatch.setattr(type(oracle.reader.text), "embed", noting)
    windows = Windows(store, LAYOUT)
    imagine(oracle, windows, [(0, 4)], 2, Sampling("euler", 1), 0)
    assert told == ["open top drawer", "open top drawer"]
    imagine(oracle, windows, [(0, 4)], 3, Sampling("euler", 1), 0, instruction="close it")
    assert told[2:] == ["close it"] * 3


@pytest.mark.parametrize("actions", ["given", "predicted"])
def test_imagine_writes_film_sheet_and_numbers(
    imagine_config: ImagineConfig, tmp_path: Path, actions: str
) -> None:
    out = tmp_path / "out"
    config = replace(imagine_config, out=str(out), actions=actions)
    imagining.check(config)
    assert not out.exists()
    result = imagining.main(config)
    files = {path.name for path in out.iterdir()}
    plots = {"actions.png"} if actions == "predicted" else set()
    assert files == {"imagined.mp4", "imagined.png", "imagined.json"} | plots
    assert json.loads((out / "imagined.json").read_text()) == result
    assert len(result["psnr"]) == (STEPS - 1) // 2
    told = ["open top drawer"] * 4 + [
        "place apple into top drawer"
    ] * 2  # a window began at 0, 2, ..
    assert result["instruction"] == told
    with av.open(str(out / "imagined.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 1 + (STEPS - 1) // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episode": "x:9"}, "no such path"),
        ({"episode": "store"}, "give a path and a number"),
        ({"episode": "STORE:3"}, "has episodes 0..2"),
        ({"actions": "none"}, "choose one of given, predicted"),
        ({"checkpoint": "nowhere"}, "no such folder"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"sampler": "dpm"}, "choose one of euler"),
        ({"horizon": 0}, "horizon=0 must be 1 or more"),
        ({"start": -1}, "start=-1: must be 0 or more"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    imagine_config: ImagineConfig, store: EpisodeStore, change: dict[str, Any], message: str
) -> None:
    given = {
        k: str(v).replace("STORE", str(store.folder)) if k == "episode" else v
        for k, v in change.items()
    }
    with pytest.raises((UserError, ValueError), match=message):
        imagining.check(replace(imagine_config, **given))
    assert not Path(imagine_config.out).exists()


def test_two_checkpoints_are_measured_side_by_side(
    world_config: WorldModelConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = replace(world_config, out=str(out), data=world_config.paths[0])  # one: a string
    measuring.check(config)
    assert not out.exists()
    result = measuring.main(config)
    files = {"results.json", "results.md", "video.png", "probe.png"}
    assert {path.name for path in out.iterdir()} == files
    kept = json.loads((out / "results.json").read_text())
    assert kept["video"] == result["video"]
    rows = {cell["row"] for cell in result["video"]}
    assert rows == {"one", "two", "frame kept", "two − one"}
    assert any("not held out" in note for note in result["notes"])
    columns = {cell["column"] for cell in result["video"]}
    assert {"psnr, first frame", "lpips_random, all frames", "fvd_random"} <= columns
    assert {cell["row"] for cell in result["actions"]} >= {
        "one, first action",
        "no motion, chunk mean",
    }
    summary = {cell["row"] for cell in result["probe_summary"]}
    assert summary == {"one", "two", "random weights (prefix)", "two − one"}


def test_a_checkpoint_beside_itself_differs_by_nothing(
    world_config: WorldModelConfig, tmp_path: Path
) -> None:
    path = world_config.checkpoints[0]
    config = replace(
        world_config,
        checkpoint=[path, path],
        names=["a", "b"],
        parts=["video", "actions"],
        out=str(tmp_path),
    )
    result = measuring.main(config)
    cells = [c for part in ("video", "actions") for c in result[part] if "−" in c["row"]]
    assert cells
    assert all(c["value"] == c["low"] == c["high"] == 0 for c in cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.1}, "a single episode gives no interval"),
        ({"parts": ["vide"]}, "did you mean video"),
        ({"names": ["a"]}, "give one, each another"),
        ({"starts": 0}, "starts=0: must be 1 or more"),
        ({"holdout": 0.0}, "holdout=0.0"),
        ({"fvd": "nowhere"}, "no config.json"),
        ({"lpips": "nowhere"}, "no such file"),
        ({"lpips": __file__}, "no file of weights that loads safely"),
        ({"folds": 4}, "folds=4: data have 3 episodes"),
        ({"data": []}, "no data"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    world_config: WorldModelConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        measuring.check(replace(world_config, **change))
