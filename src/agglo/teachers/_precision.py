"""Half precision for teachers: the products in half, everything that adds up in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

Precision = Literal["float32", "bfloat16", "float16"]


def halve(net: nn.Module, dtype: Precision) -> None:
    """Store the weights of linear layers in half precision, in place.

    Norms, position tables, class tokens, layer scales, rotary phases and the first convolution stay float32, and so
    does the residual stream: run the network under :func:`products`. It then computes what autocast computes from
    float32 weights, bit for bit, without casting them anew in every call and in half the memory. (Casting a whole
    teacher has collapsed its targets: METHOD 1.5.)
    """
    if dtype == "float32":
        return
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.to(getattr(torch, dtype))


def products(dtype: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network of that precision runs."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype), cache_enabled=False)
