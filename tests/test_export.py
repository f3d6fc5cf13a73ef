"""A robot bundle: the same actions in another process, and what it says of itself."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfflow.configs.entry import compose
from selfflow.datasets.normalize import Statistics, to_json
from selfflow.datasets.spec import ACTION_DIM, EMBODIMENTS, PROPRIO_DIM, Observation, UserError
from selfflow.datasets.text import HashEncoder
from selfflow.policies import export
from selfflow.policies.export import ExportConfig
from selfflow.policies.finetune import policy_config
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.policies.head import PolicyModel
from selfflow.policies.load import load
from selfflow.worldmodel import checkpoint
from selfflow.worldmodel.batches import Reader
from selfflow.worldmodel.checkpoint import Training
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.train_config import ModelSize
from selfflow.worldmodel.video_codec import PatchCodec

ROBOT = EMBODIMENTS["google_robot"]
MINE = replace(ROBOT, name="my_arm", control_hz=12.5, cameras=("wrist", "side"))
CONFIG = FinetuneConfig(
    model=ModelSize(32, 4, 2, 2.0),
    layout=Layout(32, 32, 16, context=2, chunk=4),
    keep_backbone=True,
    execute=2,
    sampling_steps=3,
)


def statistics(robot: Any) -> Statistics:
    return Statistics(
        **{k: getattr(robot, k) for k in ("control_hz", "frame", "rotation", "gripper", "limits")},
        action_q01=(-0.1,) * 6 + (0.0,),
        action_q99=(0.1,) * 6 + (1.0,),
        action_mean=(0.0,) * 7,
        action_std=(1.0,) * 7,
        action_min=(-1.0,) * 7,
        action_max=(1.0,) * 7,
        proprio_q01=(0.0,) * 8,
        proprio_q99=(1.0,) * 8,
        n=321,
        sources=("some drawers",),
    )


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A checkpoint of random weights that knows two robots, one of them its own."""
    torch.manual_seed(0)
    model = PolicyModel(CONFIG.backbone, CONFIG.head, CONFIG.read_block)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    robots, codec = Robots(("google_robot", "my_arm"), (3.0, 12.5)), PatchCodec(32, 32, 16)
    meta = policy_config(CONFIG, Reader(CONFIG.layout, robots, {}, codec, HashEncoder()))
    meta |= {"robots": {"my_arm": asdict(MINE)}}
    stats = to_json({r.name: statistics(r) for r in (ROBOT, MINE)})
    weights = model.state_dict()
    return checkpoint.save(tmp_path, weights, meta, stats, Training(weights, {}, {}, {"step": 1}))


# Prints the actions of two decisions of one episode.
ACT = """
import json, sys
import numpy as np
from selfflow.policies.load import load

policy = load(sys.argv[1], "my_arm")
policy.reset(7)
rng = np.random.default_rng(0)
chunks = []
for _ in range(2):
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    proprio = np.array([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5], np.float32)
    seen = {"images": {"wrist": image}, "proprio": proprio, "instruction": "open top drawer"}
    chunks.append(policy.act(seen).actions.tolist())
assert "peft" not in sys.modules
print(json.dumps(chunks))
"""


def acted(path: Path) -> np.ndarray:
    command = [sys.executable, "-c", ACT, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    return np.array(json.loads(done.stdout))


@pytest.mark.slow
def test_a_bundle_acts_as_its_checkpoint_does(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export.main(ExportConfig(str(policy), str(out)))
    assert not list(tmp_path.glob(".draft-*"))
    elsewhere = tmp_path / "elsewhere"
    out.rename(elsewhere)
    in_bundle = acted(elsewhere)
    mine = load(policy, "my_arm")
    mine.reset(7)
    rng = np.random.default_rng(0)
    for chunk in in_bundle:
        image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        proprio = np.array([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5], np.float32)
        seen = Observation(images={"wrist": image}, proprio=proprio, instruction="open top drawer")
        np.testing.assert_allclose(mine.act(seen).actions, chunk, atol=1e-6)
    load(elsewhere, "my_arm", decode="joint")  # all of the backbone is in it


def test_the_spec_is_that_of_the_contract(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export.main(ExportConfig(str(policy), str(out)))
    spec = json.loads((out / "spec.json").read_text())["embodiments"]
    assert list(spec) == ["google_robot", "my_arm"]
    seen, action = spec["my_arm"]["observation"], spec["my_arm"]["action"]
    assert spec["my_arm"]["control_hz"] == 12.5
    assert list(seen["images"]) == ["wrist"]
    assert seen["images"]["wrist"]["resized_to"] == [32, 32]
    assert len(seen["proprio"]["names"]) == len(seen["proprio"]["units"]) == PROPRIO_DIM
    for key in ("names", "units", "low", "high"):
        assert len(action[key]) == ACTION_DIM
    assert (action["low"][0], action["low"][6]) == (-1.0, 0.0)
    assert (action["shape"], action["predicted"], action["executed"]) == ([2, 7], 4, 2)


def rollout(folder: Path, digest: str) -> str:
    folder.mkdir()
    summary = {"task": "open_top_drawer", "backend": "mujoco", "placement": "mild"}
    summary |= {"successes": 17, "episodes": 20, "wilson_95": [0.64, 0.948], "split": "select"}
    summary |= {"seed": 100000, "checkpoint": f"step-000001 sha256 {digest}", "execute": 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_the_card_has_the_evaluation_of_these_weights(policy: Path, tmp_path: Path) -> None:
    weights = (policy / "model.safetensors").read_bytes()
    own = rollout(tmp_path / "own", hashlib.sha256(weights).hexdigest()[:16])
    other = rollout(tmp_path / "other", "0123456789abcdef")
    config = ExportConfig(str(policy), str(tmp_path / "bundle"), "Drawers", [own])
    export.check(config)
    export.main(config)
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    for part in ("# Drawers", "17 of 20", "64.0 % to 94.8 %", "execute=3", "some drawers", "321"):
        assert part in card
    assert "their score is too high" in card
    with pytest.raises(UserError, match="0123456789abcdef, not of"):
        export.check(ExportConfig(str(policy), str(tmp_path / "x"), None, [other]))
    assert not (tmp_path / "x").exists()


def test_mistakes_are_one_line(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        export.check(ExportConfig(str(policy), str(policy)))
    with pytest.raises(UserError, match="no such folder"):
        export.check(ExportConfig(str(tmp_path / "none"), "x"))
    with pytest.raises(UserError, match=r"summary\.json"):
        export.check(ExportConfig(str(policy), "x", None, [str(tmp_path)]))
    with pytest.raises(UserError, match="one of google_robot, my_arm"):
        load(policy)
    with pytest.raises(UserError, match=r"checkpoint=\.\.\. is required"):
        compose(ExportConfig, "export", [])
