"""Linear layers, attention and GELU, optimised for inference on a CPU.

On x86, PyTorch computes float32 products with MKL, which uses AVX2 only on processors of other vendors than Intel.
oneDNN, also part of PyTorch, takes half the time on AMD's AVX-512 processors, in the same precision (IEEE float32; sums
in another order). ``torch.backends.mkldnn.set_flags(False)`` switches it off. With gradients, autocast, tracing or
compilation everything here is PyTorch's own operator.
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
"""Smallest product for which oneDNN's set-up pays off."""

SCORES = 1 << 17
"""Smallest number of attention scores per thread for which a product per head pays off."""

TILE = 1 << 20
"""Attention scores per thread and product: 4 MB."""

REUSED = 1 << 25
"""Bytes up to which memory is reused. The C library allocates larger tensors from the operating system each time."""

THREADS = 16
"""With more threads, PyTorch's own attention, which is parallel over heads, is used."""


class Linear(nn.Linear):
    """``nn.Linear``, computed by oneDNN where it is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C')``."""
        if _applies(input, self.weight) and input.numel() * self.out_features >= MULTIPLICATIONS:
            return _product(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` per head: ``(B, heads, N, d)`` each, to ``(B, heads, N, d)``."""
    # Before any look at sizes, on which a trace must not depend.
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
    """Exact GELU, in place without gradients: ``x`` must not be used afterwards.

    A new tensor of this size costs more to allocate than to compute.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _traced():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)


def tokens_per_pass(x: Tensor, widest: int) -> int | None:
    """Number of tokens per pass that is fastest for inference on a CPU; None for a single pass.

    Passes are small enough that layers reuse memory, see :data:`REUSED`.

    Args:
        x: the input, for its device and dtype.
        widest: channels of the widest layer.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _traced() or x.device.type != "cpu":
        return None
    return max(1, REUSED // (widest * x.element_size()))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _applies(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is computed by oneDNN: float32 inference on a CPU where it is faster."""
    return (
        not torch.compiler.is_compiling()
        and not _traced()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and _onednn_is_faster()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        # Dispatch modes (FLOP counters, fake tensors) support PyTorch's own operators only.
        and _get_current_dispatch_mode() is None
    )


def _traced() -> bool:
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (it is in the documentation)


@cache
def _onednn_is_faster() -> bool:
    """Whether MKL does not use this processor's AVX-512."""
    packet: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    libraries = packet is not None and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "Intel" not in _vendor()


def _vendor() -> str:
    """The processor's vendor, e.g. ``AuthenticAMD``; empty if unknown."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")
