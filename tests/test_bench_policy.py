"""eval/bench/policy.py: its arithmetic against a counter, and its rows."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval.bench import policy as bench
from selfflow.eval.bench.policy import BenchConfig, Row, Work
from selfflow.policies.head import ActionHead, HeadConfig
from selfflow.worldmodel.train_config import TrainConfig


def test_the_heads_flops_are_those_counted():
    config = HeadConfig(24, 2, 3, 4.0, 5, 8, 16)
    head = ActionHead(config).requires_grad_(False)
    # on a CPU only the plain attention of bf16 is made of products that the counter knows
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        kept = head.modulations(torch.tensor([0.5]))
        with FlopCounterMode(display=False) as reading:
            memory = head.read(torch.randn(1, 7, 16))
        with FlopCounterMode(display=False) as stepping:
            head(torch.randn(1, 5, 8), kept, memory)
    counted = reading.get_total_flops(), stepping.get_total_flops()
    assert counted == bench.head_flops(config, 7)


def test_a_card_is_as_slow_as_its_arithmetic_or_its_memory():
    work = Work("made up", once=4 * 10**12, step=4 * 10**12, bytes_once=10**9, bytes_step=10**12)
    # at 40 % of 100 TFLOP/s 0.1 s each; reading 1 GB takes 1 ms, 1 TB takes 1 s
    assert work.seconds(3, 100e12, 1e12) == pytest.approx(0.1 + 3 * 1)


def test_the_missions_size_is_675_m_and_the_head_the_cheapest():
    head, prefix, full = bench.work_of(compose(TrainConfig, "train", bench.CUT))
    assert prefix.bytes_step / 2 == pytest.approx(675e6, rel=0.01)
    assert full.step > prefix.step > 20 * head.once
    assert head.once > 20 * head.step


def test_the_median_processor_time_is_held_against_the_bar():
    assert Row("x", [99.0], [14.0, 14.9, 99.0], bar=15.0).verdict == "met"
    assert Row("x", [1.0], [15.1], bar=15.0).verdict == "MISSED"
    assert Row("x", [1.0], [99.0]).verdict == ""


@pytest.mark.parametrize("override", ["repeats=0", "threads=0", "checkpoint=nowhere"])
def test_mistakes_are_one_line(override: str):
    with pytest.raises(UserError, match=override.split("=")[0]):
        bench.check(compose(BenchConfig, "bench_policy", [override]))


@pytest.mark.slow
def test_every_way_is_timed(capsys, monkeypatch):
    rng = np.random.default_rng(0)
    seen = {
        "images": {"overhead_camera": rng.integers(0, 256, (128, 160, 3), dtype=np.uint8)},
        "proprio": np.array([0.5, 0, 1, 1, 0, 0, 0, 1], np.float32),
        "instruction": "open top drawer",
    }
    monkeypatch.setattr(bench, "observations", lambda policy, count: [seen] * count)
    rows = bench.main(compose(BenchConfig, "bench_policy", ["repeats=1"]))
    assert all(value > 0 for row in rows for value in row.clock + row.processor)
    few = [row for row in rows if row.apart is not None]
    for heun in (False, True):
        apart = [row.apart for row in few if ("heun" in row.what) == heun]
        assert apart == sorted(apart, reverse=True)  # more steps come nearer
    printed = capsys.readouterr().out
    assert "ESTIMATE" in printed
    assert "joint, 8 steps, attention=full" in printed
    assert "best of 4" in printed
