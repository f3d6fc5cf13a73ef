"""What several test files start from."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeRecord, StoreHeader, StoreWriter
from selfflow.envs import simpler_assets
from selfflow.envs.sapien_render import require_renderer

# What a script's shell starts with & ignores Ctrl-C, and so would processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SIMPLER = Path(__file__).parents[2] / "shared" / "simpler_assets"


@pytest.fixture(scope="module")
def _sim() -> Iterator[object]:
    """Skips where SIMPLER's scenes cannot run, and points SIMPLER_ASSETS at the shared files."""
    with pytest.MonkeyPatch.context() as patch:
        if "SIMPLER_ASSETS" not in os.environ and SIMPLER.is_dir():
            patch.setenv("SIMPLER_ASSETS", str(SIMPLER))
        try:
            simpler_assets.station_urdf()
            simpler_assets.stage("google_pick_coke_can_1_v4")
            simpler_assets.photo("bridge_sink")
            sapien = require_renderer()
        except UserError as e:
            pytest.skip(f"no SIMPLER scene here: {e}")
        yield sapien.render.RenderSystem()  # keeps compiled shaders from test to test


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 12 steps with random signals."""
    folder = tmp_path_factory.mktemp("data") / "store"
    rng = np.random.default_rng(0)
    n = 12
    with StoreWriter(
        folder, "000", StoreHeader("google_robot", "open_top_drawer", ("overhead_camera",), "fake")
    ) as writer:
        for seed in range(2):
            images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            actions = rng.uniform(0, 0.1, (n, 7)).astype(np.float32)
            proprio = rng.uniform(0, 1, (n, 8)).astype(np.float32)
            proprio[:, 3:7] /= np.linalg.norm(proprio[:, 3:7], axis=1, keepdims=True)
            writer.append(
                EpisodeRecord(
                    images={"overhead_camera": list(images)},
                    proprio=proprio,
                    actions=actions,
                    executed=actions,
                    terminate=np.arange(n) == n - 1,
                    instruction=["open top drawer"] * n,
                    seed=seed,
                    success=True,
                    privileged={"drawers": np.zeros((n, 3))},
                    draws={},
                    meta={},
                )
            )
    return folder
