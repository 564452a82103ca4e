"""Several processes that train one model: which of them this is, and what they tell each other.

torchrun describes the processes in the environment; :func:`process_group` joins them. Every
function here also works in a single process, where it costs nothing and changes nothing.

Tensors on the CPU travel by gloo and tensors on a GPU by NCCL, so agreeing on a number that the host knows does not
wait for the device.
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

_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, which may be writing a checkpoint or solving for eigenvectors."""

_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class OtherRankError(AggloError, RuntimeError):
    """Another process of the run cannot go on, and says why; this one stops with it."""


# --- who is who -------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process in the group, from 0."""
    return distributed.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes train together; 1 outside :func:`process_group`."""
    return distributed.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return rank() == 0


def launch_rank() -> tuple[int, int]:
    """``(rank, processes)`` as torchrun says in the environment, before and after there is a group.

    Raises:
        ConfigError: ``WORLD_SIZE`` is set and the rest is not.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 1
    missing = [name for name in _TOLD if not os.environ.get(name)]
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
    """This process's part of what is drawn for all: of ``count * world_size()`` samples, ``count`` in a row."""
    return slice(rank() * count, (rank() + 1) * count)


def uniform(shape: Sequence[int], *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform numbers in [0, 1), the first axis this process's samples: those that one process alone would draw.

    Processes whose generators are in one state draw different numbers, and stay in one state.
    """
    count, *rest = shape
    return torch.rand(world_size() * count, *rest, device=device, dtype=dtype)[local_slice(count)]


@contextlib.contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """While it lasts, each process draws numbers of its own; afterwards all draw what they would have drawn without it.

    For what draws by itself and cannot ask :func:`uniform`, such as another library's stochastic depth.

    Args:
        device: where it draws, beside the CPU.
    """
    if world_size() == 1:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(1 << 62, ())) + rank())
        yield


def local_device(device: str | None) -> str | None:
    """The device of this process: ``cuda`` is the GPU of its local rank.

    Args:
        device: what was asked for; None for GPUs where there are any. In one process it comes back as it is.

    Raises:
        ConfigError: a device that several processes cannot have, or more processes than GPUs.
    """
    if launch_rank()[1] == 1:
        return device
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind in ("cpu", f"cuda:{os.environ['LOCAL_RANK']}"):
        return kind
    if kind != "cuda":
        raise ConfigError(
            f"--device {kind}: each process of several has a GPU of its own, or all use the CPU: --device cuda or cpu"
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"process {local} of this machine has no GPU: there are {gpus}; torchrun --nproc_per_node {max(gpus, 1)}, "
            "or --device cpu"
        )
    return f"cuda:{local}"


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[str | None]:
    """While it lasts, this process belongs to the group that torchrun started, if it started several.

    Args:
        device: as for :func:`local_device`, which is what comes back.

    Raises:
        ConfigError: the group cannot be made.
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
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"process {number} of {size} cannot join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).strip().splitlines()[0]}): see that all were started and that "
            "the machines reach each other"
        ) from None
    try:
        yield mine
    except Exception as error:
        # What one process alone met leaves the others waiting; taking leave would wait for them. torchrun ends them.
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


# --- what they tell each other ----------------------------------------------------------------------------------------


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes: without gradient where there are several, the tensor itself where there is one."""
    if world_size() == 1:
        return tensor
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed


def average(tensor: Tensor) -> Tensor:
    """The mean over all processes: without gradient where there are several, the tensor itself where there is one."""
    return tensor if world_size() == 1 else total(tensor).div_(world_size())


def any_rank(flag: bool) -> bool:
    """Whether it is so in any process; all get the same answer at the same place."""
    return flag if world_size() == 1 else bool(total(torch.tensor(int(flag))))


def all_ranks(flag: Tensor) -> Tensor:
    """Whether it is so in all processes: a bool scalar on the flag's device, which nobody waits for."""
    return flag if world_size() == 1 else total((~flag).int()) == 0


def gather_rows(tensor: Tensor) -> Tensor:
    """``(B, ...)`` of every process, in their order, as ``(world_size() * B, ...)``."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    distributed.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def gather(thing: T) -> list[T]:
    """What each process has, in their order: small things that can be pickled."""
    if world_size() == 1:
        return [thing]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, thing)
    return found


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, in place."""
    if world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.broadcast(sent, 0)
        tensor.copy_(sent)


def run_on_all(work: Callable[[], T]) -> T:
    """Every process does it, and none goes on before all have.

    Raises:
        OtherRankError: another process failed. Where several did, the first raises what went wrong and the others this.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as caught:  # noqa: BLE001 - whatever it is, the others wait to hear of it
        error = caught
    said = gather(None if error is None else f"{type(error).__name__}: {error}")
    failed = [number for number, why in enumerate(said) if why is not None]
    if error is not None and failed[0] == rank():
        raise error
    if failed:
        raise OtherRankError(f"process {failed[0]} stopped: {said[failed[0]]}") from error
    return result  # type: ignore[return-value]


def run_on_main(work: Callable[[], T]) -> T:
    """The main process does it, the others wait; all get what came of it.

    Raises:
        OtherRankError: in the others, where it failed.
    """
    if world_size() == 1:
        return work()
    return gather(run_on_all(work if is_main() else lambda: None))[0]  # type: ignore[return-value]
