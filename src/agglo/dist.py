"""Ranks, devices and collectives of distributed training.

torchrun sets the environment; :func:`process_group` initialises the group. In a single process every function is a
no-op or the identity. CPU tensors are reduced by gloo and GPU tensors by NCCL, so a collective on a host value does not
synchronise the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from agglo.types import AggloError, ConfigError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
"""Of a collective: another process may be writing a checkpoint or solving for eigenvectors."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class OtherRankError(AggloError, RuntimeError):
    """Another process of the run failed, so that this one stops too."""


def rank() -> int:
    """Rank of this process; 0 outside :func:`process_group`."""
    return distributed.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes; 1 outside :func:`process_group`."""
    return distributed.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def launch_rank() -> tuple[int, int]:
    """``(rank, world size)`` from torchrun's environment variables; usable before :func:`process_group`.

    Raises:
        ConfigError: ``WORLD_SIZE`` is set and other variables are not.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 1
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start "
            "with torchrun --nproc_per_node N -m agglo train ..., or unset WORLD_SIZE for a single process"
        )
    try:
        return int(os.environ["RANK"]), int(size)
    except ValueError:
        raise ConfigError(f"RANK={os.environ['RANK']} and WORLD_SIZE={size} must be whole numbers") from None


def local_slice(count: int) -> slice:
    """Slice of this rank's ``count`` samples among the ``count * world_size()`` of all ranks."""
    return slice(rank() * count, (rank() + 1) * count)


def uniform(shape: Sequence[int], *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform numbers in [0, 1); the first axis is this rank's part of the samples that one process would draw.

    Every rank draws the numbers of all ranks, so that equal generator states stay equal.
    """
    count, *rest = shape
    return torch.rand(world_size() * count, *rest, device=device, dtype=dtype)[local_slice(count)]


@contextlib.contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Give each rank a different random state inside the context; the state outside is not affected.

    For random operations that cannot use :func:`uniform`, such as another library's stochastic depth.

    Args:
        device: whose generator is forked, in addition to the CPU's.
    """
    if world_size() == 1:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(1 << 62, ())) + rank())
        yield


def local_device(device: str | None) -> str | None:
    """The device of this process; ``cuda`` becomes the GPU of its local rank.

    Args:
        device: the requested device; None for GPUs if available. Returned unchanged in a single process.

    Raises:
        ConfigError: a device that several processes cannot share, or more processes than GPUs.
    """
    if launch_rank()[1] == 1:
        return device
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind in ("cpu", f"cuda:{os.environ['LOCAL_RANK']}"):
        return kind
    if kind != "cuda":
        raise ConfigError(
            f"--device {kind}: several processes need one GPU each or the CPU; use --device cuda or --device cpu"
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"process {local} of this machine has no GPU: there are {gpus}; use torchrun --nproc_per_node "
            f"{max(gpus, 1)}, or --device cpu"
        )
    return f"cuda:{local}"


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[str | None]:
    """Initialise torchrun's process group inside the context; yield this process's device.

    Args:
        device: as for :func:`local_device`.

    Raises:
        ConfigError: the group cannot be initialised.
    """
    number, size = launch_rank()
    if size == 1 or _grouped():
        yield local_device(device)
        return
    mine = local_device(device)
    if not distributed.is_available():
        raise ConfigError(f"WORLD_SIZE is {size}, but this torch was built without torch.distributed: use one process")
    backend = "gloo"
    if mine is not None and mine.startswith("cuda"):
        torch.cuda.set_device(mine)
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"process {number} of {size} cannot join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).strip().splitlines()[0]}): check that all were started and that "
            "the machines reach each other"
        ) from None
    try:
        yield mine
    except Exception as error:
        # An error of this rank only leaves the others in a collective, and destroying the group would wait for them:
        # torchrun ends them instead.
        if isinstance(error, AggloError):
            distributed.destroy_process_group()
        raise
    except BaseException:
        distributed.destroy_process_group()
        raise
    else:
        distributed.destroy_process_group()


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def total(tensor: Tensor) -> Tensor:
    """Sum over all ranks, without gradient; the tensor itself in a single process."""
    if world_size() == 1:
        return tensor
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed


def average(tensor: Tensor) -> Tensor:
    """Mean over all ranks, without gradient; the tensor itself in a single process."""
    return tensor if world_size() == 1 else total(tensor).div_(world_size())


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is True on any rank."""
    return flag if world_size() == 1 else bool(total(torch.tensor(int(flag))))


def all_ranks(flag: Tensor) -> Tensor:
    """Whether ``flag`` is True on all ranks: a bool scalar on its device, without synchronisation."""
    return flag if world_size() == 1 else total((~flag).int()) == 0


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate ``(B, ...)`` of all ranks to ``(world_size() * B, ...)``."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def gather(value: T) -> list[T]:
    """The small picklable value of every rank, in order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks, in place."""
    if world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.broadcast(sent, 0)
        tensor.copy_(sent)


def run_on_all(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, and wait for all of them.

    Raises:
        OtherRankError: another rank failed. If several did, the first raises its own error and the others this one.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as caught:  # noqa: BLE001 - any error must be reported to the waiting ranks
        error = caught
    messages = gather(None if error is None else f"{type(error).__name__}: {error}")
    failed = [number for number, message in enumerate(messages) if message is not None]
    if error is not None and failed[0] == rank():
        raise error
    if failed:
        raise OtherRankError(f"process {failed[0]} stopped: {messages[failed[0]]}") from error
    return result  # type: ignore[return-value]


def run_on_main(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank.

    Raises:
        OtherRankError: on the other ranks, if it failed.
    """
    if world_size() == 1:
        return work()
    return gather(run_on_all(work if is_main() else lambda: None))[0]  # type: ignore[return-value]
