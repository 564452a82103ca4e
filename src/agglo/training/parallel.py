"""What makes several processes one training run: equal parts of a batch, and one gradient for all (METHOD 3.5).

Every process has the whole model and renders its own part of each batch. After backward the gradients are averaged,
so all make the same update and hold the same weights. Nothing is wrapped: model code does not know of it.
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
"""Numbers that are summed at once: bounds the copy that summing needs."""


def check_batches(recipe: Recipe, processes: int) -> None:
    """Every batch must be as many equal parts as there are processes.

    Raises:
        ConfigError: names the nearest batches that are.
    """
    for index, partition in enumerate(recipe.partitions):
        if partition.batch % processes == 0:
            continue
        below = partition.batch - partition.batch % processes
        legal = [str(batch) for batch in (below, below + processes) if batch]
        raise ConfigError(
            f"partitions.{index}.batch: {partition.batch} images are no equal parts for {processes} processes; the "
            f"nearest that are: {' and '.join(legal)}"
        )


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """While it lasts, the main process alone gives warnings: the others meet the same ones."""
    if dist.is_main():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def everyones(names: Sequence[str]) -> list[str]:
    """The names of the whole batch, of which each process has a part; all must ask."""
    return [name for part in dist.gather(list(names)) for name in part]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes, in place; all must have the same ones."""
    if dist.world_size() > 1:
        _average([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def average_statistics(buffers: Iterable[Tensor]) -> None:
    """Replace BatchNorm's running statistics by their means over all processes, in place.

    The mean is exact. The variance lacks what lies between the processes' means, as that of a smaller batch does.
    """
    if dist.world_size() > 1:
        _average([buffer for buffer in buffers if buffer.is_floating_point()])


def _average(tensors: list[Tensor]) -> None:
    """The mean over all processes of each, in place, by one sum a bucket."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])  # in logical order, whatever the memory's is
        summed = dist.average(flat)
        for tensor, part in zip(bucket, summed.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, those of one dtype together, about :data:`_BUCKET` numbers at a time."""
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
