"""Memory of weights and of a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agglo.evals.base import Backbone, Eval, EvalContext, device_of, frozen, input_size
from agglo.types import ConfigError

_MIB = 2**20


class Memory(Eval):
    """Memory of the weights and of a forward pass without gradients.

    - ``parameters``: number of parameters; shared ones count once;
    - ``weights_mib``: parameters and buffers as stored;
    - ``peak_mib``: peak of a pass beyond weights and images, output included. On a GPU it is the allocator's peak;
      elsewhere every tensor that an operation returns counts until it is freed, which is the same on every machine but
      excludes the scratch space of kernels.

    All but the first in MiB (2^20 bytes); lower is better for all.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        batch: images per pass.
    """

    lower_is_better = frozenset({"parameters", "weights_mib", "peak_mib"})

    def __init__(self, *, size: int | tuple[int, int] = 224, batch: int = 1) -> None:
        if batch < 1:
            raise ConfigError(f"evals.memory: batch must be at least 1, got {batch}")
        self.size = size
        self.batch = batch

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        device = device_of(model)
        images = torch.zeros(self.batch, 3, *input_size(model, self.size), device=device)
        own = list(model.parameters()) if isinstance(model, nn.Module) else []
        weights = [*own, *model.buffers()] if isinstance(model, nn.Module) else []
        with frozen(model):
            model(images)  # tables that are built once and cached are not part of a pass
            peak = _allocated(model, images) if device.type == "cuda" else counted(model, images, weights)
        return {
            "parameters": float(sum(parameter.numel() for parameter in own)),
            "weights_mib": sum(_storages(weights).values()) / _MIB,
            "peak_mib": peak / _MIB,
        }


def counted(model: Backbone, images: Tensor, weights: Iterable[Tensor] = ()) -> int:
    """Peak bytes of the tensors that a pass creates; views of ``weights`` are excluded."""
    with _Living((images, *weights)) as living:
        out = model(images)
    del out
    return living.peak


def _allocated(model: Backbone, images: Tensor) -> int:
    torch.cuda.synchronize(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    out = model(images)
    torch.cuda.synchronize(images.device)
    del out
    return torch.cuda.max_memory_allocated(images.device) - before


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage behind tensors, by its identity."""
    return {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}


class _Living(TorchDispatchMode):
    """Counts the bytes behind tensors that operations return, until they are freed.

    Args:
        known: tensors that existed before.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = set(_storages(known))
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    # The Python object of a storage lives as long as the storage itself.
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
