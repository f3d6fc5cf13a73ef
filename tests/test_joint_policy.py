"""Video and actions decoded together, from a checkpoint that holds the whole backbone."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from selfflow.datasets.normalize import Statistics, denormalize_action, to_json
from selfflow.datasets.spec import ACTION_NAMES, EMBODIMENTS, UserError
from selfflow.datasets.text import HashEncoder
from selfflow.policies.acting import text_dropout_of
from selfflow.policies.base import Imagines, Policy
from selfflow.policies.flow_policy import load_policy
from selfflow.policies.joint_policy import JointPolicy
from selfflow.worldmodel.checkpoint import FORMAT, Training, load, save
from selfflow.worldmodel.dream import Sampling, dream
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.transformer import VideoActionTransformer

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "twin"
ROBOT = EMBODIMENTS["google_robot"]
CONVENTIONS = ("control_hz", "frame", "rotation", "gripper", "limits")
ACTION = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
STATISTICS = Statistics(
    **{k: getattr(ROBOT, k) for k in CONVENTIONS},
    **{f"action_{k}": (v,) * 7 for k, v in ACTION.items()},
    proprio_q01=(0.0,) * 8,
    proprio_q99=(1.0,) * 8,
    n=1,
    sources=("made up",),
)
LAYOUT = Layout(32, 32, 16, context=1, future=2, stride=2, chunk=4)
ROBOTS = Robots(("google_robot", "widowx"), (3.0, 5.0))


def observation(seed: int = 0, instruction: str = "open top drawer") -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {"overhead_camera": rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)},
        "proprio": np.array([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5], np.float32),
        "instruction": instruction,
    }


def save_world(run: Path, attention: str = "prefix", **more) -> Path:
    modalities = LAYOUT.modalities()
    config = ModelConfig(32, 3, 2, 2.0, attention, modalities)
    torch.manual_seed(0)
    model = VideoActionTransformer(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    last = model.outputs["action"]
    last.weight[7], last.bias[7] = 0, 10  # never terminates: velocity is noise - data
    weights = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    action = {"names": list(ACTION_NAMES), "dim": 7, "frame": ROBOT.frame}
    meta = {
        "format": FORMAT,
        "kind": "worldmodel",
        "model": config.to_dict(),
        "layout": asdict(LAYOUT),
        "embodiments": asdict(ROBOTS),
        "text_encoder": HashEncoder().name,
        "action": action | {"rotation": ROBOT.rotation, "gripper": ROBOT.gripper},
    }
    training = Training(weights, weights, {}, {"step": 1})
    return save(run, weights, meta | more, to_json({"google_robot": STATISTICS}), training)


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_joint_decoding_acts_with_what_it_dreams(tmp_path: Path, attention: str):
    path = save_world(tmp_path, attention)
    policy = load_policy(path, decode="joint", steps=3, seed=7)
    assert isinstance(policy, JointPolicy)
    assert isinstance(policy, Policy)
    assert isinstance(policy, Imagines)
    assert policy.execute == 4  # all of them
    policy.imagine = True
    chunk = policy.act(observation())
    tokens, valid = policy._observer.tokens(observation(), 0)
    random = torch.Generator().manual_seed(7)
    found = dream(policy.parts.model, tokens, valid, Sampling(steps=3), random)
    expected = denormalize_action(found["action"][0, :, :7].numpy(), STATISTICS)
    np.testing.assert_array_equal(chunk.actions[:, :6], expected[:, :6])
    assert policy.imagined is not None
    frames, stride = policy.imagined
    np.testing.assert_array_equal(frames, policy.parts.codec.decode(found["video"])[0].numpy())
    assert (frames.shape, frames.dtype, stride) == ((2, 32, 32, 3), np.uint8, 2)
    policy.reset()
    assert policy.imagined is None
    policy.imagine = False
    policy.act(observation())
    assert policy.imagined is None


def test_joint_chunks_are_joined_too(tmp_path: Path):
    path, gaps = save_world(tmp_path), {}
    for delay in (0, 1):
        policy = load_policy(path, decode="joint", steps=8, execute=2, delay=delay)
        policy.act(observation())
        left = policy._chunks[-1][1][2:]
        policy.act(observation(1))
        gaps[delay] = np.abs(policy._chunks[-1][1][0, :7] - left[0, :7]).mean()
    assert gaps[1] < 0.5 * gaps[0]


def test_only_a_whole_backbone_decodes_jointly(tmp_path: Path):
    with pytest.raises(UserError, match=r"first 4 blocks.*worldmodel/train\.py"):
        load_policy(BUNDLED, decode="joint")
    path = save_world(tmp_path)
    with pytest.raises(UserError, match="is a world model, not a policy"):
        load_policy(path)
    with pytest.raises(UserError, match="text dropout"):
        load_policy(path, decode="joint", guidance=3.0)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"layout": 3}))
    with pytest.raises(UserError, match="damaged or foreign"):
        load_policy(path, decode="joint")


def test_text_dropout_is_the_checkpoints_or_its_runs(tmp_path: Path):
    path = save_world(tmp_path)
    assert text_dropout_of(load(path)) == 0
    (tmp_path / "config.json").write_text('{"text_dropout": 0.2}')
    assert text_dropout_of(load(path)) == 0.2
    assert load_policy(path, decode="joint", guidance=3.0, steps=2).act(observation())
    path = save_world(tmp_path, text_dropout=0.1)
    assert text_dropout_of(load(path)) == 0.1
