"""A policy checkpoint in use: same actions after loading, history, and the contract's checks."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfflow.datasets.normalize import Statistics, to_json
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.text import HashEncoder
from selfflow.policies.base import Policy
from selfflow.policies.decoding import Decoding
from selfflow.policies.finetune import FinetuneConfig, origins, policy_config
from selfflow.policies.flow_policy import FlowPolicy, load_policy
from selfflow.policies.head import PolicyModel
from selfflow.policies.observing import Parts
from selfflow.policies.scripted import HoldStill, RandomWalk
from selfflow.worldmodel import checkpoint
from selfflow.worldmodel.batches import Reader
from selfflow.worldmodel.checkpoint import Training
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.train_config import ModelSize
from selfflow.worldmodel.video_codec import PatchCodec

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "twin"
ROBOT = EMBODIMENTS["google_robot"]
STATISTICS = Statistics(
    **{k: getattr(ROBOT, k) for k in ("control_hz", "frame", "rotation", "gripper", "limits")},
    action_q01=(-0.1,) * 6 + (0.0,),
    action_q99=(0.1,) * 6 + (1.0,),
    action_mean=(0.0,) * 7,
    action_std=(1.0,) * 7,
    action_min=(-1.0,) * 7,
    action_max=(1.0,) * 7,
    proprio_q01=(0.0,) * 8,
    proprio_q99=(1.0,) * 8,
    n=1,
    sources=("made up",),
)
CONFIG = FinetuneConfig(
    model=ModelSize(32, 4, 2, 2.0),
    layout=Layout(32, 32, 16, context=2, future=0, stride=3, chunk=4),
    execute=2,
    sampling_steps=3,
)
ROBOTS = Robots(("google_robot", "widowx"), (3.0, 5.0))
CODEC = PatchCodec(32, 32, 16)


def random_model() -> PolicyModel:
    torch.manual_seed(0)
    model = PolicyModel(CONFIG.encoder, CONFIG.head).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    return model


def in_memory(steps: int = 3, execute: int = 2) -> FlowPolicy:
    parts = Parts(random_model(), CONFIG.layout, CODEC, HashEncoder(), ROBOTS, STATISTICS, {})
    return FlowPolicy(parts, ROBOT, Decoding(steps=steps, execute=execute))


def save(run: Path) -> Path:
    weights = random_model().state_dict()
    meta = policy_config(CONFIG, Reader(CONFIG.layout, ROBOTS, {}, CODEC, HashEncoder()))
    training = Training(weights, weights, {}, {"step": 1})
    return checkpoint.save(run, weights, meta, to_json({"google_robot": STATISTICS}), training)


def observation(seed: int = 0, instruction: str = "open top drawer") -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {"overhead_camera": rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)},
        "proprio": np.array([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5], np.float32),
        "instruction": instruction,
    }


def test_loading_gives_the_same_actions(tmp_path: Path) -> None:
    save(tmp_path)
    loaded = load_policy(tmp_path, "google_robot")
    assert isinstance(loaded, Policy)
    assert (loaded.steps, loaded.execute) == (3, 2)  # the checkpoint's own
    own = in_memory()
    for seed in range(3):
        a, b = loaded.act(observation(seed)), own.act(observation(seed))
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-6)
        np.testing.assert_array_equal(a.terminate, b.terminate)


def test_actions_are_physical_and_within_the_gripper_range() -> None:
    policy = in_memory(execute=4)
    chunk = policy.act(observation())
    assert chunk.actions.shape == (4, 7)
    assert chunk.terminate is not None
    assert chunk.terminate.shape == (4,)
    assert ((chunk.actions[:, 6] >= 0) & (chunk.actions[:, 6] <= 1)).all()
    # sampled values of order 1 are scaled by the quantiles' 0.1
    assert 0 < np.abs(chunk.actions[:, :6]).max() < 1


def test_an_episodes_seed_fixes_its_noise() -> None:
    policy = in_memory()
    first = policy.act(observation()).actions
    second = policy.act(observation()).actions
    assert not np.allclose(first, second)
    policy.reset()
    np.testing.assert_array_equal(policy.act(observation()).actions, first)
    policy.reset(7)
    other = policy.act(observation()).actions
    assert not np.allclose(first, other)


@pytest.mark.parametrize("part", ["images", "proprio", "instruction"])
def test_every_part_of_the_observation_matters(part: str) -> None:
    changed = observation()
    if part == "images":
        changed["images"] = observation(seed=1)["images"]
    elif part == "proprio":
        changed["proprio"] = changed["proprio"] + np.float32(0.3)
    else:
        changed["instruction"] = "close top drawer"
    a, b = in_memory().act(observation()).actions, in_memory().act(changed).actions
    assert not np.allclose(a, b, atol=1e-6)


def test_history_is_the_frame_of_stride_steps_ago() -> None:
    observer = in_memory()._observer  # decisions at steps 0, 2, 4, 6; frames at -3 and 0
    images = [np.full((32, 32, 3), i, np.uint8) for i in range(4)]
    seen = []
    for i, image in enumerate(images):
        frames, valid = observer.history(image, 2 * i)
        seen.append(([int(f[0, 0, 0]) for f in frames], valid.tolist()))
    # at step 2 the frame of step -1 does not exist; at 4 that of step 0 stands for step 1
    assert seen == [
        ([0, 0], [False, True]),
        ([0, 1], [False, True]),
        ([0, 2], [True, True]),
        ([1, 3], [True, True]),
    ]


def test_steps_are_counted_up_to_the_first_terminate() -> None:
    policy = in_memory(execute=4)
    output = policy.parts.model.head.output
    output.weight.zero_()
    output.bias.zero_()
    output.bias[7] = 10.0  # velocity = noise - data: every terminate channel ends below 0
    assert not policy.act(observation()).terminate.any()
    assert policy._step == 4
    # without a velocity the chunk is its noise
    output.bias[7] = 0.0
    counted = 4
    for _ in range(8):
        ends = policy.act(observation()).terminate
        counted += list(ends).index(True) if ends.any() else 4
        assert policy._step == counted
    assert counted < 4 + 8 * 4


def test_threads_do_not_change_actions() -> None:
    before = torch.get_num_threads()
    chunks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        policy = load_policy(BUNDLED, "google_robot", steps=2)
        chunks.append(policy.act(observation()).actions)
    torch.set_num_threads(before)
    np.testing.assert_array_equal(chunks[0], chunks[1])


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"hidden": 32}},
        {"head": {"width": 3}},
        {"layout": {"height": "tall"}},
        {"layout": {"chunk": 5}},
        {"decision": {"steps": 3}},
        {"embodiments": 3},
        {"action": []},
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, change: dict) -> None:
    path = save(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"damaged or foreign") as caught:
        load_policy(path, "google_robot")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ones_own_robot_comes_from_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path)
    mine = replace(ROBOT, name="my_arm", control_hz=12.5, cameras=("wrist",))
    config = json.loads((path / "config.json").read_text())
    robots = origins([SimpleNamespace(embodiment=e) for e in (mine, ROBOT)])["robots"]
    assert list(robots) == ["my_arm"]  # the project knows the other
    names = {"names": ["google_robot", "my_arm"], "rates": [3.0, 12.5]}
    changed = config | {"robots": robots, "embodiments": names}
    (path / "config.json").write_text(json.dumps(changed))
    own = replace(STATISTICS, control_hz=12.5)
    (path / "stats.json").write_text(json.dumps(to_json({"my_arm": own})))
    policy = load_policy(path, "my_arm")
    assert policy.robot == mine
    seen = observation()
    seen["images"] = {"wrist": seen["images"]["overhead_camera"]}
    assert policy.act(seen).actions.shape == (2, 7)


def test_what_a_checkpoint_must_hold(tmp_path: Path) -> None:
    path = save(tmp_path)
    with pytest.raises(UserError, match="widowx"):
        load_policy(path, "widowx")
    with pytest.raises(UserError, match="google_robot, widowx"):
        load_policy(path, "nobody")
    with pytest.raises(UserError, match=r"execute=1\.\.4"):
        load_policy(path, "google_robot", execute=5)
    config = json.loads((path / "config.json").read_text())
    other = config | {"action": config["action"] | {"gripper": "closedness"}}
    (path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="gripper is closedness, not opening"):
        load_policy(path, "google_robot")
    (path / "config.json").write_text(json.dumps(config))
    statistics = to_json({"google_robot": replace(STATISTICS, control_hz=10.0)})
    (path / "stats.json").write_text(json.dumps(statistics))
    with pytest.raises(UserError, match="control_hz"):
        load_policy(path, "google_robot")
    (path / "stats.json").unlink()
    with pytest.raises(UserError, match=r"stats\.json is missing"):
        load_policy(path, "google_robot")
    with pytest.raises(UserError, match="no such folder"):
        load_policy(tmp_path / "nowhere", "google_robot")


def test_a_missing_camera_is_named() -> None:
    wrong = observation() | {"images": {"wrist": np.zeros((8, 8, 3), np.uint8)}}
    with pytest.raises(ValueError, match="overhead_camera; the observation has wrist"):
        in_memory().act(wrong)


def test_baselines() -> None:
    still = HoldStill().act(observation()).actions
    assert (still[:, :6] == 0).all()
    assert (still[:, 6] == 0.5).all()
    walk = RandomWalk(seed=1)
    walk.reset(3)
    a = walk.act(observation()).actions
    walk.reset(3)
    np.testing.assert_array_equal(a, walk.act(observation()).actions)
    assert ((a[:, 6] >= 0) & (a[:, 6] <= 1)).all()
