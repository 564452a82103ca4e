"""Data parallelism: each process computes an equal part of a batch, and gradients are averaged (docs/method.md, 3.5).

Every process has the whole model and loads its own part of each batch. Gradients are averaged after the backward pass,
so all processes make the same update. The model is not wrapped.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from agglo import dist
from agglo.recipe import Recipe
from agglo.types import ConfigError

_BUCKET = 1 << 26
"""Number of values averaged at once; bounds the memory of the flat copy."""


def check_batches(recipe: Recipe, processes: int) -> None:
    """Check that every batch can be divided equally among the processes.

    Raises:
        ConfigError: names the nearest batch sizes that can.
    """
    for index, partition in enumerate(recipe.partitions):
        if partition.batch % processes == 0:
            continue
        below = partition.batch - partition.batch % processes
        legal = [str(batch) for batch in (below, below + processes) if batch]
        raise ConfigError(
            f"partitions.{index}.batch: {partition.batch} is not divisible by {processes} processes; use "
            f"{' or '.join(legal)}"
        )


@contextlib.contextmanager
def warnings_on_main() -> Iterator[None]:
    """Suppress warnings in all processes but the main one, which issues the same ones."""
    if dist.is_main():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gather_names(names: Sequence[str]) -> list[str]:
    """The names of the whole batch, from each process's part; a collective call."""
    return [name for part in dist.gather(list(names)) for name in part]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, in place; all must have gradients of the same parameters."""
    if dist.world_size() > 1:
        _average([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def average_statistics(buffers: Iterable[Tensor]) -> None:
    """Average BatchNorm's running statistics over all processes, in place.

    The mean is exact; the variance omits the variance between the processes' means.
    """
    if dist.world_size() > 1:
        _average([buffer for buffer in buffers if buffer.is_floating_point()])


def _average(tensors: list[Tensor]) -> None:
    """Average tensors over all processes, in place, one bucket at a time."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])  # in logical order, whatever the memory layout
        summed = dist.average(flat)
        for tensor, part in zip(bucket, summed.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of tensors of one dtype, of about :data:`_BUCKET` values each."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        count = 0
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if bucket and count + tensor.numel() > _BUCKET:
                yield bucket
                bucket, count = [], 0
            bucket.append(tensor)
            count += tensor.numel()
        if bucket:
            yield bucket
