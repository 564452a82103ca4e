"""What a transformer spends its time on, made fast for inference on a CPU: linear layers, attention, GELU.

On x86, PyTorch gives float32 products to MKL, which uses AVX2 on processors that are not Intel's, whatever they have.
With oneDNN, which PyTorch carries too, the same products take half the time on AMD's AVX-512 processors, in the same
precision (IEEE float32; sums in another order). ``torch.backends.mkldnn.set_flags(False)`` switches that off.
Everything here is PyTorch's own operator wherever gradients, autocast, tracing or compilation are about.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

MULTIPLICATIONS = 1 << 22
"""A smaller product is not worth oneDNN's set-up."""

SCORES = 1 << 17
"""Attention scores a thread must have to compute in one product for a product per head to be worth its set-up."""

TILE = 1 << 20
"""Attention scores of one product for each thread: 4 MB."""

REUSED = 1 << 25
"""Bytes up to which memory is used again. The C library takes larger tensors from the operating system each time."""

THREADS = 16
"""With more threads, PyTorch's own attention, which gives every thread heads of its own, is left alone."""


class Linear(nn.Linear):
    """``nn.Linear``, on either library."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C')``."""
        if _applies(input, self.weight) and input.numel() * self.out_features >= MULTIPLICATIONS:
            return _product(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` for every head: ``(B, heads, N, d)`` each, to ``(B, heads, N, d)``."""
    # A trace must not depend on sizes: this comes first.
    if not _applies(q, k):
        return F.scaled_dot_product_attention(q, k, v)
    batch, heads, length, width = q.shape
    threads = torch.get_num_threads()
    if length * length < SCORES * threads or threads > THREADS:
        return F.scaled_dot_product_attention(q, k, v)
    # oneDNN is slow on strided operands.
    q, k, v = (q * width**-0.5).contiguous(), k.contiguous(), v.contiguous()
    found = q.new_empty(batch, length, heads, width)
    rows = max(1, TILE * threads // length)
    for sample in range(batch):
        for head in range(heads):
            keys, values = k[sample, head], v[sample, head].t()
            for start in range(0, length, rows):
                tile = slice(start, start + rows)
                scores = _product(q[sample, head, tile], keys)
                found[sample, tile, head] = _product(torch.softmax(scores, -1, out=scores), values)
    return found.transpose(1, 2)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU; in the memory of ``x`` where no gradient is wanted, so ``x`` is no longer to be used.

    A tensor of this size is fresh memory from the operating system every time, which costs more than the function.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _traced():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)


def tokens_per_pass(x: Tensor, widest: int) -> int | None:
    """Into passes of how many tokens inference is best cut on a CPU; None where it is best left whole.

    Memory that is fresh for every layer costs more than larger products gain.

    Args:
        x: what goes in; for its device and dtype.
        widest: channels of the widest layer.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _traced() or x.device.type != "cpu":
        return None
    return max(1, REUSED // (widest * x.element_size()))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _applies(x: Tensor, weight: Tensor) -> bool:
    """Whether a product may go to oneDNN: float32 on the CPU, with nobody watching, and faster there."""
    return (
        not torch.compiler.is_compiling()
        and not _traced()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and _held_back()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        # Counters, fake tensors and the like know PyTorch's own operators.
        and _get_current_dispatch_mode() is None
    )


def _traced() -> bool:
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (it is in the documentation)


@cache
def _held_back() -> bool:
    """Whether MKL leaves half of this processor idle."""
    packet: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    libraries = packet is not None and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "Intel" not in _vendor()


def _vendor() -> str:
    """Such as ``AuthenticAMD`` or ``GenuineIntel``; empty where the system does not say."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")
