"""`dry_run=true`: everything of a run but the run, on any machine, in seconds.

Real episodes go through the real readers (synthetic ones in RT-1's schema where `data` is empty),
the codec is replaced by one of the same geometry without weights, the model and one training step
are built on torch's meta device, which computes shapes and no numbers, and the cost is estimated.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from selfflow.datasets.normalize import Statistics, fit
from selfflow.datasets.source import open_sources
from selfflow.datasets.synthetic import write_fractal
from selfflow.datasets.windows import Mixture, WindowSpec
from selfflow.worldmodel.batches import Reader
from selfflow.worldmodel.codec import geometry
from selfflow.worldmodel.cost import length
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.loop import generator
from selfflow.worldmodel.objective import Student, losses
from selfflow.worldmodel.plan import Cluster, report
from selfflow.worldmodel.train_config import TrainConfig
from selfflow.worldmodel.video_codec import latent_frames

SAMPLES = 2
EPISODES, STEPS, SHARDS = 6, 60, 3  # of the synthetic data
GPUS = (8, 64)


@dataclass(frozen=True)
class ShapeCodec:
    """Latents of a codec's geometry, all zeros: what shapes need of it."""

    layout: Layout

    @property
    def name(self) -> str:
        """Of the codec that it stands for."""
        return self.layout.codec.kind

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.layout.channels

    @property
    def temporal(self) -> int:
        """Frames a latent frame."""
        return geometry(self.layout.codec)[1]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        return (*self.layout.grid(1)[1:], self.channels)

    def latent_frames(self, frames: int) -> int:
        """As the codec's."""
        return latent_frames(frames, self.temporal)

    def encode(self, frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B L C"]:
        """Zeros."""
        rows, columns, channels = self.latent_shape
        size = self.latent_frames(frames.shape[1]) * rows * columns
        return torch.zeros(len(frames), size, channels)

    def decode(self, latents: Float[Tensor, "B L C"]) -> UInt8[Tensor, "B T H W 3"]:
        """Never asked for in training."""
        raise NotImplementedError("a codec without weights decodes nothing")


Reading = Callable[[list[Any], dict[str, Statistics], ShapeCodec], Reader]


def rehearse(config: TrainConfig, spec: WindowSpec, reading: Reading) -> None:
    """Prints the data's shapes, one step's, and the plan. `reading` makes the run's reader."""
    with tempfile.TemporaryDirectory() as folder:
        data = config.sources
        if not data:
            data = [str(write_fractal(Path(folder), EPISODES, STEPS, SHARDS, config.seed))]
            print(f"data: none given, so {EPISODES} synthetic episodes in RT-1's schema")
        sources, weights = open_sources(data)
        for s in sources:
            print(f"data: {s.name}, {s.embodiment.name}, {len(s)} episodes, {s.skipped} skipped")
        batch = Mixture(sources, weights, spec, config.seed).batch(0, SAMPLES)
        reader = reading(sources, fit(sources), ShapeCodec(config.layout))
        inputs = reader.tokens(batch)
    model = config.transformer
    print(f"window: frames at t + {_range(spec.frames)}, {batch.frames.shape[2:4]} pixels")
    for m in model.modalities:
        got = tuple(inputs.tokens[m.name].shape)
        if got != (SAMPLES, m.length, m.channels):
            raise AssertionError(f"{m.name}: tokens are {got}, the model expects {m}")
        print(f"  {m.role:9} {m.name:8} {m.length:5} tokens of {m.channels:4} channels, {m.grid}")
    print(f"tokens per sample: {length(model)}, of which targets {model.target_length}")
    _one_step(config, inputs.to(torch.device("meta")))
    for gpus in GPUS:
        batch_size = config.batch if config.batch % gpus == 0 else gpus
        report(replace(config, batch=batch_size), Cluster(gpus=gpus, mfu=config.mfu))


def _one_step(config: TrainConfig, inputs: Any) -> None:
    """Forward, loss and backward on the meta device."""
    with torch.device("meta"):
        student = Student(config.transformer, layers=config.projector_layers)
        average = Student(config.transformer, layers=config.projector_layers)
    plain = replace(config, precision="fp32", **_own(config))
    values = losses(student, average, inputs, plain, generator(config.seed, 0))
    values["loss"].backward()
    parameters = list(student.parameters())
    reached = sum(p.grad is not None for p in parameters)
    if reached != len(parameters):
        names = [n for n, p in student.named_parameters() if p.grad is None]
        print(f"no gradient reaches {len(names)} tensors: {', '.join(names[:5])}")
    count = sum(p.numel() for p in student.backbone.parameters())
    print(
        f"one step on the meta device: {count / 1e6:.1f} M parameters, "
        f"losses {', '.join(values)}, gradients for {reached} of {len(parameters)} tensors"
    )


def _own(config: TrainConfig) -> dict[str, Any]:
    # an external teacher has weights of its own, which a dry run does not load
    outside = config.noise.alignment == "external"
    return {"alignment": "none", "objective": "vanilla", "teacher": None} if outside else {}


def _range(offsets: tuple[int, ...]) -> str:
    return str(list(offsets)) if len(offsets) < 4 else f"[{offsets[0]} .. {offsets[-1]}]"
