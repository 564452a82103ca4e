"""How much memory does a model take?"""

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

    - ``parameters``: how many numbers; one that several modules share counts once;
    - ``weights_mib``: parameters and buffers as they are stored;
    - ``peak_mib``: the most that lived at one time during a pass beside the weights and the images, the output
      included. On a GPU it is what the allocator handed out; elsewhere every tensor that an operation returns is
      counted until it is freed, which is the same on every machine but does not see the scratch space of kernels.

    All in MiB (2^20 bytes) but the first, all better when lower.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        batch: images in the pass.
    """

    lower_is_better = frozenset({"parameters", "weights_mib", "peak_mib"})

    def __init__(self, *, size: int | tuple[int, int] = 224, batch: int = 1) -> None:
        if batch < 1:
            raise ConfigError(f"evals.memory: batch is at least 1, got {batch}")
        self.size = size
        self.batch = batch

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        device = device_of(model)
        images = torch.zeros(self.batch, 3, *input_size(model, self.size), device=device)
        own = list(model.parameters()) if isinstance(model, nn.Module) else []
        weights = [*own, *model.buffers()] if isinstance(model, nn.Module) else []
        with frozen(model):
            model(images)  # what is made once and kept (resized tables) is no part of a pass
            peak = _allocated(model, images) if device.type == "cuda" else counted(model, images, weights)
        return {
            "parameters": float(sum(parameter.numel() for parameter in own)),
            "weights_mib": sum(_storages(weights).values()) / _MIB,
            "peak_mib": peak / _MIB,
        }


def counted(model: Backbone, images: Tensor, weights: Iterable[Tensor] = ()) -> int:
    """Peak bytes of all tensors that a pass makes; those whose memory is that of ``weights`` are not its own."""
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
    """Bytes of each piece of memory behind tensors, by its identity."""
    return {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}


class _Living(TorchDispatchMode):
    """Counts the bytes behind tensors that operations return, until they are freed.

    Args:
        known: tensors that were there before.
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
