"""Decoding against closed forms: ensembling, real-time chunking, guidance."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from selfflow.datasets.normalize import Statistics, denormalize_action
from selfflow.datasets.rotations import compose, from_axis_angle, inverse, to_axis_angle
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.text import HashEncoder
from selfflow.policies.acting import ChunkPolicy, Pin
from selfflow.policies.decoding import Decoding, Planned, ensembled, pinned, soft_mask, strength
from selfflow.policies.flow_policy import FlowPolicy, load_policy
from selfflow.policies.observing import Parts
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.sampler import Velocity, euler, times
from selfflow.worldmodel.transformer import Tokens
from selfflow.worldmodel.video_codec import PatchCodec

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
ROBOTS = Robots(("google_robot", "widowx"), (3.0, 5.0))


def observation(seed: int = 0, instruction: str = "open top drawer") -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {"overhead_camera": rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)},
        "proprio": np.array([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5], np.float32),
        "instruction": instruction,
    }


# --- ensembling -----------------------------------------------------------------------------------


def planned(at: int, *values: float) -> Planned:
    return at, np.repeat(np.array(values, np.float32)[:, None], 8, 1)


def test_an_ensembled_action_is_the_weighted_mean_of_the_chunks_that_cover_its_step():
    chunks = [planned(0, 9, 9, 1.0), planned(1, 9, 2.0, 9), planned(2, 4.0, 9, 9)]
    weight = np.exp([0.0, -0.5, -1.0])  # the oldest first
    expected = (weight @ [1.0, 2.0, 4.0]) / weight.sum()
    np.testing.assert_allclose(ensembled(chunks, 2, 0.5)[:7], expected, rtol=1e-6)
    np.testing.assert_allclose(ensembled(chunks, 2, 0.0)[:7], 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(ensembled(chunks, 2, 50.0)[:7], 1.0)
    np.testing.assert_allclose(ensembled(chunks, 2, -50.0)[:7], 4.0)
    np.testing.assert_allclose(ensembled(chunks, 4, 0.5)[:7], 9.0)  # the last one's alone


def test_terminate_is_a_vote_by_weight_not_by_loudness():
    loud = [planned(0, -0.1), planned(0, -0.1), planned(0, 50.0)]
    assert ensembled(loud, 0, 0.0)[7] < 0
    assert ensembled(loud, 0, -2.0)[7] > 0  # the newest alone has more than half of the weight
    assert ensembled([planned(0, 1.0), planned(0, -1.0)], 0, 0.0)[7] == 0  # a tie goes on


def test_the_linear_mean_of_rotations_is_wrong_in_third_order_only():
    rng = np.random.default_rng(0)
    vectors, weight = rng.normal(size=(5, 3)), rng.dirichlet(np.ones(5))
    apart = []
    for size in (0.4, 0.2):
        small = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * size
        mean = weight @ small
        q = from_axis_angle(mean)
        for _ in range(50):  # the mean rotation: the one from which the others' logarithms cancel
            step = weight @ to_axis_angle(compose(inverse(q), from_axis_angle(small)))
            q = compose(q, from_axis_angle(step))
        apart.append(np.linalg.norm(to_axis_angle(q) - mean))
    assert apart[0] < 0.002  # rad, of 0.4
    assert apart[0] / apart[1] == pytest.approx(8, rel=0.1)


# --- real-time chunking ---------------------------------------------------------------------------


def test_the_soft_mask_is_the_papers():
    horizon, d, s = 8, 2, 3  # chunk, delay, executed: 5 of the last chunk are left
    for i, value in enumerate(soft_mask(horizon, d, horizon - s).tolist()):
        c = (horizon - s - i) / (horizon - s - d + 1)
        inside = c * (math.exp(c) - 1) / (math.e - 1)
        assert value == pytest.approx(1 if i < d else inside if i < horizon - s else 0, abs=1e-6)
    assert soft_mask(4, 1, 1).tolist() == [1, 0, 0, 0]


def test_the_strength_is_clipped_at_both_ends():
    assert strength(0.5) == 2
    assert strength(0.2) == pytest.approx((0.04 + 0.64) / 0.16)
    assert [strength(t) for t in (0.0, 1e-3, 0.999, 1.0)] == [5.0] * 4


def gaussian(mean: Tensor, covariance: Tensor) -> Velocity:
    """The exact E[x1 - x0 | x_t] of data from N(mean, covariance)."""
    spread, axes = torch.linalg.eigh(covariance)

    def velocity(x: Tensor, t: float) -> Tensor:
        z = (x - (1 - t) * mean) @ axes / ((1 - t) ** 2 * spread + t * t)
        return (t * z - (1 - t) * spread * z) @ axes.T - mean

    return velocity


def test_independent_data_are_inpainted_exactly():
    mean, known = torch.tensor([0.5, -0.5, 2.0, 0.0]).double(), torch.tensor([1.0, 1, 0, 0])
    aim = torch.tensor([3.0, -2.0, 77.0, 77.0]).double()  # the last two are to be ignored
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    velocity = gaussian(mean, torch.eye(4).double())
    found = euler(pinned(velocity, aim, known.double(), 1e9), noise, 40)
    plain = euler(velocity, noise, 40)
    torch.testing.assert_close(found[:, :2], aim[:2].expand(50, 2))
    torch.testing.assert_close(found[:, 2:], plain[:, 2:])


def test_guidance_is_the_vector_jacobian_product_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator).double()
    mean, t = torch.randn(5, generator=generator).double(), 0.4
    velocity = gaussian(mean, root @ root.T + 0.1 * torch.eye(5))
    x, aim = torch.randn(2, 5, generator=generator).double()
    weight = torch.rand(5, generator=generator).double()
    data = x - t * velocity(x, t)
    one = torch.eye(5).double()
    # the field is linear in x, so its Jacobian's columns are differences
    jacobian = torch.stack([e - t * (velocity(x + e, t) - velocity(x, t)) for e in one], 1)
    pull = (t * t + (1 - t) ** 2) / (t * (1 - t)) * (weight * (aim - data)) @ jacobian
    led = pinned(velocity, aim, weight)(x, t)
    torch.testing.assert_close(led, velocity(x, t) - pull)
    assert not led.requires_grad


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_correlated_data_come_near_to_their_exact_conditional(rho: float):
    """The guidance takes the data's covariance for the identity, so near is what it can do."""
    k = torch.arange(6).double()
    covariance, mean = rho ** (k[:, None] - k).abs(), torch.linspace(-0.5, 0.5, 6).double()
    known = (k < 2).double()
    aim = (mean + 1.5) * known
    noise = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1)).double()
    x = euler(pinned(gaussian(mean, covariance), aim, known), noise, 50)
    gain = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    exact = gain @ (aim - mean)[:2]
    spread = (covariance[2:, 2:] - gain @ covariance[:2, 2:]).diagonal().sqrt()
    assert (x[:, :2] - aim[:2]).abs().mean() < 0.1
    assert ((x[:, 2:].mean(0) - mean[2:]) / exact)[:2] == pytest.approx(1, abs=0.2)
    assert x[:, 2:].std(0) / spread == pytest.approx(1, abs=0.1)


class Scripted(ChunkPolicy):
    """Chunk number n says n at every step; it terminates at `end`. Notes how it was pinned."""

    def __init__(self, decoding: Decoding, end: int = 10**9) -> None:
        codec, layout = PatchCodec(32, 32, 16), Layout(32, 32, 16, future=0, chunk=6)
        self.end, self.pins = end, []
        parts = Parts(None, layout, codec, HashEncoder(), ROBOTS, STATISTICS, {})
        super().__init__(parts, ROBOT, decoding.settled(1, 2, 6))

    def _sample(self, tokens: Tokens, valid: Tokens, pin: Pin | None) -> np.ndarray:
        self.pins.append(pin)
        chunk = np.full((6, 8), len(self.pins) / 100, np.float32)
        chunk[:, 7] = [1.0 if self._step + k >= self.end else -1.0 for k in range(6)]
        return chunk


def said(policy: ChunkPolicy, instruction: str = "open") -> list[int]:
    return [round(100 * x) for x in policy.act(observation(instruction=instruction)).actions[:, 0]]


def test_with_a_delay_the_last_chunk_goes_on_while_the_next_is_computed():
    policy = Scripted(Decoding(execute=3, delay=2))
    assert [said(policy) for _ in range(3)] == [[1, 1, 1], [1, 1, 2], [2, 2, 3]]
    first, second, _ = policy.pins
    assert first is None
    aim, weight = second
    assert [round(100 * x) for x in aim[:, 0].tolist()] == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(weight[:, 0], soft_mask(6, 2, 3))


def test_a_plan_is_forgotten_with_its_subtask():
    policy = Scripted(Decoding(execute=3, delay=2))
    assert said(policy) == [1, 1, 1]
    assert said(policy, "place") == [2, 2, 2]  # the environment went on to the next
    policy.reset()
    assert said(policy, "place") == [3, 3, 3]
    assert policy.pins == [None] * 3

    policy = Scripted(Decoding(execute=3, delay=2), end=4)
    said(policy)
    ends = policy.act(observation(instruction="open")).terminate  # steps 3, 4, 5
    assert ends is not None
    assert ends.tolist() == [False, True, True]
    assert policy._step == 4
    said(policy)
    assert [pin is None for pin in policy.pins] == [True, False, True]


def test_without_a_delay_nothing_is_pinned():
    policy = Scripted(Decoding(execute=3))
    assert [said(policy) for _ in range(2)] == [[1, 1, 1], [2, 2, 2]]
    assert policy.pins == [None, None]


def test_ensembling_in_the_loop():
    policy = Scripted(Decoding(execute=2, ensemble=0.0))
    actions = [policy.act(observation()).actions[:, 0] for _ in range(4)]
    # chunks of 6 begin at steps 0, 2, 4, 6; at steps 6 and 7 the first one is over
    for found, mean in zip(actions, (1.0, 1.5, 2.0, 3.0), strict=True):
        np.testing.assert_allclose(100 * found, mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"decode": "both"}, "decode=both: .*head, joint"),
        ({"ensemble": 0.1, "delay": 1}, "choose one"),
        ({"ensemble": math.nan}, "ensemble=nan"),
        ({"delay": -1}, "delay=-1"),
        ({"delay": 2}, r"choose execute=2\.\.2 \(here 1\)"),
        ({"delay": 1, "execute": 4}, r"choose execute=1\.\.3 \(here 4\)"),
        ({"execute": 5}, r"choose execute=1\.\.4"),
        ({"solver": "rk4"}, "solver=rk4: choose one of euler, heun"),
        ({"steps": 0}, "steps=0"),
        ({"guidance": -1.0}, "guidance=-1"),
    ],
)
def test_what_cannot_be_is_one_line(given: dict, says: str):
    with pytest.raises(UserError, match=says):
        Decoding(**given).settled(8, 1, 4)


# --- the bundled policy ---------------------------------------------------------------------------


def bundled(**decoding) -> FlowPolicy:
    policy = load_policy(BUNDLED, **decoding)
    assert isinstance(policy, FlowPolicy)
    return policy


@torch.inference_mode()
def by_hand(policy: FlowPolicy, seen: dict, random: torch.Generator) -> np.ndarray:
    """A decision as it was before there was any other decoding: one chunk by Euler, its start."""
    p, head = policy.parts, policy.parts.model.head
    memory = head.read(p.model.memory(*policy._observer.tokens(seen, 0)))
    noise = torch.randn(1, p.layout.chunk, head.config.channels, generator=random)
    clocks = {t: head.modulations(torch.tensor([t])) for t in times(policy.steps).tolist()}
    x = euler(lambda x, t: head(x, clocks[t], memory), noise, policy.steps)
    actions = denormalize_action(x[0, : policy.execute, :7].numpy(), p.statistics)
    actions[:, 6] = np.clip(actions[:, 6], 0, 1)
    return actions


def test_the_bundled_policy_acts_as_before_to_the_bit():
    policy = bundled()
    policy.reset(5)
    random = torch.Generator().manual_seed(5)
    for seed in range(4):
        seen = observation(seed, ("open top drawer", "place apple into top drawer")[seed // 2])
        expected = by_hand(policy, seen, random)
        np.testing.assert_array_equal(policy.act(seen).actions, expected)


@pytest.mark.slow
def test_pinning_joins_the_chunks_at_the_seam():
    d, s, apart = 2, 4, {}
    for delay in (0, d):
        policy = bundled(execute=s, delay=delay, steps=8)
        gaps = []
        for seed in range(8):  # what it sees jumps, so that the chunks disagree
            policy.reset(seed)
            policy.act(observation(seed))
            left = policy._chunks[-1][1][s:]
            policy.act(observation(seed + 9))
            gaps.append(np.abs(policy._chunks[-1][1][:d] - left[:d]).mean())
        apart[delay] = np.mean(gaps)
    assert apart[d] < 0.85 * apart[0]  # a policy that is sure of itself gives way a little


def test_heun_and_more_steps_come_to_the_same():
    many, few = bundled(steps=64), bundled(steps=16, solver="heun")
    np.testing.assert_allclose(
        many.act(observation()).actions, few.act(observation()).actions, atol=0.008
    )


def test_guidance_needs_dropout_in_training():
    plain = bundled()
    decoding = replace(plain.decoding, guidance=2.0)
    with pytest.raises(UserError, match="trained without text dropout"):
        FlowPolicy(replace(plain.parts, text_dropout=0.0), ROBOT, decoding)
    parts = plain.parts
    found = {}
    for scale, words in itertools.product((0.0, 2.0), ("open top drawer", "close it")):
        policy = FlowPolicy(parts, ROBOT, replace(plain.decoding, guidance=scale))
        found[scale, words] = policy.act(observation(instruction=words)).actions
    told, same = found[0.0, "open top drawer"], found[0.0, "close it"]
    np.testing.assert_array_equal(told, same)  # all of it away from the words
    assert not np.allclose(found[2.0, "open top drawer"], found[2.0, "close it"], atol=1e-4)
