"""The training state of FSDP in a checkpoint: each process writes and reads its own shards.

torch.distributed.checkpoint with its safetensors storage: every file holds pieces of tensors, and
where they lie in the whole in its header (DCP_SHARDING_INFO). Nothing on disk is pickled, and any
number of processes can read what another number has written. Names start with average., student.
or optimizer., the latter `optimizer.<parameter>:exp_avg`. Imported by those who need it alone: what
it imports takes a second.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from selfflow.worldmodel.errors import CheckpointError
from selfflow.worldmodel.parallel import Weights, World


def save(
    folder: Path, average: Weights, student: Weights, optimizer: Weights, world: World
) -> None:
    """This process's parts; all processes must call it."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    tensors = _named(average, student, optimizer)
    with _alone_is_fine():
        save_shards(
            tensors, storage_writer=writer, process_group=world.files, no_dist=world.size == 1
        )


def load(folder: Path, average: nn.Module, student: nn.Module, optimizer: Optimizer) -> None:
    """Fills modules and optimiser, sharded or not. Raises CheckpointError if a part is missing,
    damaged or of another model."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        have: Any = reader.read_metadata().state_dict_metadata
        states = _empty_states(optimizer, student, have.items())
        wanted = _named(average.state_dict(), student.state_dict(), states)
        if odd := sorted(have.keys() ^ wanted.keys()):
            raise CheckpointError(f"{folder} does not fit this model: {', '.join(odd[:4])}")
        if torn := sorted(name for name, saved in have.items() if not _complete(saved)):
            raise ValueError(f"parts of {torn[0]} are missing")  # which torch would not tell
        with _alone_is_fine():  # each process reads what it needs; nothing is exchanged
            load_shards(wanted, storage_reader=reader, no_dist=True)
    except (OSError, SafetensorError, KeyError, ValueError, CheckpointException) as e:
        # torch wraps what went wrong together with its traceback
        cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        what = " ".join(str(cause).split())[:300]
        raise CheckpointError(f"{folder}: cannot be read ({what})") from e


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without torch's warning that no other process takes part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _empty_states(
    optimizer: Optimizer, module: nn.Module, have: Iterable[tuple[str, TensorStorageMetadata]]
) -> Weights:
    """The optimiser's state for every saved one, to be filled in place."""
    parameters, states = dict(module.named_parameters()), {}
    for key, saved in have:
        if not key.startswith("optimizer."):
            continue
        name, field = key.removeprefix("optimizer.").rsplit(":", 1)
        parameter = parameters[name]
        value = torch.zeros_like(parameter)
        if saved.size != parameter.shape:  # Adam's step counter
            value = torch.zeros(saved.size, dtype=saved.properties.dtype, device=parameter.device)
        optimizer.state[parameter][field] = states[f"{name}:{field}"] = value
    return states


def _complete(saved: TensorStorageMetadata) -> bool:
    return sum(math.prod(chunk.sizes) for chunk in saved.chunks) == math.prod(saved.size)


def _named(average: Weights, student: Weights, optimizer: Weights) -> Weights:
    groups = {"average": average, "student": student, "optimizer": optimizer}
    return {f"{group}.{name}": v for group, values in groups.items() for name, v in values.items()}
