"""Several processes that train one model: who is who, and what they agree on.

`torchrun --nproc-per-node 8 worldmodel/train.py ...`, or SLURM by configs/hydra/launcher. Without
either a World is one process and every method here costs nothing. Rank 0 alone writes and prints.
FSDP2 and its DTensor are imported where they are used: it takes 0.7 s, and a rollout needs neither.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selfflow.worldmodel.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Weights = dict[str, Tensor]
TIMEOUT = timedelta(minutes=10)  # for a process that does not come, e.g. since another one died
MODES = ("auto", "none", "ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1
    mode: str = "none"  # or ddp, fsdp
    files: dist.ProcessGroup | None = None  # what a thread that saves talks over

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> int:
        """One process's part of `count` samples. Raises RunError if they do not divide."""
        if count % self.size:
            raise RunError(f"batch={count} does not divide by {self.size} processes")
        return count // self.size

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Every value averaged over the processes; one that is not finite anywhere stays so."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: whether it is set on any process."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return tuple(bool(v) for v in votes.tolist())

    def first(self, value: int) -> int:
        """Rank 0's value. Nobody goes on before rank 0 has come here."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared)

    def meet(self) -> None:
        """Nobody goes on before all have come here; for the thread that saves."""
        if self.size > 1:
            dist.barrier(self.files)


ALONE = World()


def place(mode: str, device: str) -> World:
    """This process by its environment: torchrun's variables, submitit's, or those of srun.

    Raises RunError if `mode` does not suit the number of processes, or the device is not there.
    """
    size, rank, local = _environment()
    if mode == "none" and size > 1:
        raise RunError(f"parallel=none: {size} processes were started; choose ddp or fsdp")
    if mode == "auto":
        mode = "ddp" if size > 1 else "none"
    return World(_device(device, size, local), rank, size, mode)


def _device(device: str, size: int, local: int) -> torch.device:
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not have):
        return torch.device("cpu")
    if size > 1 and ":" in device:
        raise RunError(f"device={device}: several processes take a device each; give device=cuda")
    # a SLURM task may see its own GPU alone
    index = local if size > 1 and have > 1 else int(device.partition(":")[2] or 0)
    if index >= have:
        raise RunError(f"device={device}: torch finds {have} CUDA devices; device=cpu works")
    return torch.device("cuda", index) if size > 1 or ":" in device else torch.device("cuda")


def _environment() -> tuple[int, int, int]:
    """(number of processes, rank, rank on this machine), after setting what torch reads."""
    env = os.environ
    if "RANK" not in env and "SUBMITIT_EXECUTOR" in env:
        from submitit.helpers import TorchDistributedEnvironment

        found = TorchDistributedEnvironment()
        if found.world_size > 1:
            found.export(set_cuda_visible_devices=False)
    elif "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        env["WORLD_SIZE"], env["RANK"] = env["SLURM_STEP_NUM_TASKS"], env["SLURM_PROCID"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 40_000))
    return tuple(int(env.get(key, default)) for key, default in _VARIABLES)  # type: ignore[return-value]


_VARIABLES = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))


def first_host(nodes: str) -> str:
    """The first of SLURM's node list: gpu[003-005,9] is gpu003."""
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if found is None:
        raise RunError(f"SLURM_STEP_NODELIST={nodes}: no host in it")
    return found[1] + (found[2] or "")


@contextmanager
def join(world: World) -> Iterator[World]:
    """Around everything the processes do together; ranks above 0 print nothing inside.

    Raises RunError if nobody has started the processes.
    """
    if world.mode == "none":
        yield world
        return
    if "MASTER_ADDR" not in os.environ:
        raise RunError(
            f"parallel={world.mode}: start it with torchrun --standalone --nproc-per-node N, or "
            "under SLURM with hydra/launcher=slurm; one process takes parallel=none"
        )
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        with ExitStack() as stack:
            if not world.main:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(silence))
            files = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(files, dist.ProcessGroup)
            yield replace(world, files=files)
    finally:
        dist.destroy_process_group()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The backbone's blocks: what is sharded, gathered and compiled one at a time.

    What is not in them, the policy's head included, goes with the root.
    """
    children = getattr(model, "backbone", model).children()
    return [block for m in children if isinstance(m, nn.ModuleList) for block in m]


def shard(model: nn.Module, world: World, dtype: torch.dtype) -> None:
    """FSDP2: every parameter becomes a DTensor of which each process keeps a part.

    Blocks are gathered as `dtype`, one at a time; their gradients are averaged in float32.
    Parameters outside of them (projections, projector) stay float32.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    # nobody writes in place into what a block returns
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(world.device.type, (world.size,))
    # inputs are not cast: the residual stream stays as autocast leaves it
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    # True also for the root: the teacher has no backward pass after which it would be resharded
    fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=True)


def wrap(model: nn.Module, world: World) -> nn.Module:
    """What the loop calls: DDP around the student, or the (sharded) student itself."""
    if world.mode != "ddp":
        return model
    ids = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(
        model,
        device_ids=ids,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,  # vanilla uses no projector, a policy not every embedding
    )
    wrapped.broadcast_buffers = False  # positions, which never change
    return wrapped


def exchange_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients over the processes."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif exchange := getattr(model, "set_requires_gradient_sync", None):  # an FSDPModule
        exchange(now)


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether other processes hold other parts of it."""
    return hasattr(tensor, "device_mesh")


def has_shards(weights: Weights) -> bool:
    """Whether some of them are spread over processes."""
    return any(is_shard(value) for value in weights.values())


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process, which must all ask; any other as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def alike(value: Tensor, example: Tensor) -> Tensor:
    """The whole `value` sharded as the example of the same shape is; else as it is."""
    if not is_shard(example) or value.shape != example.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(example.device)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def gather(weights: Weights, keep: bool) -> Weights:
    """The whole tensors on the CPU where `keep`, else nothing. All processes must call it."""
    kept = {}
    for name, value in weights.items():
        full = whole(value.detach())
        if keep:
            kept[name] = full.cpu()
    return kept


def snapshot(weights: Weights) -> Weights:
    """Copies on the CPU, of sharded tensors this process's parts, to be written by a thread."""
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
