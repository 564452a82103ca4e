"""Spectral reparametrisation of official checkpoints, converted to plain weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.weights.tensors import LazyTensors, Renamed

MARK = ".parametrizations.weight."
FLOOR = 0.05
"""Added to ``softplus(scale)``, so that a layer's gain cannot vanish."""


def materialized(tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> LazyTensors:
    """The checkpoint with every ``X.parametrizations.weight.*`` replaced by the plain ``X.weight``.

    Each matrix (third of a fused qkv, half of a SwiGLU's input) is ``W g / sigma``, ``sigma = u^T W v + eps``.
    As in the reference, which removes the parametrisation in training mode, one more power iteration runs first:
    ``u <- normalize(W v)``, ``v <- normalize(W^T u)``. ``g = softplus(scale) + 0.05`` in version 2, ``g = scale`` in
    version 1. DAMP's wrapper is the identity.

    Args:
        tensors: official keys.
        args: ``spectral_reparam``: True or a mapping with ``n_power_iterations`` and ``eps``.
    """
    modules = sorted({key.partition(MARK)[0] for key in tensors if MARK in key})
    options = args.get("spectral_reparam")
    eps = float(options.get("eps", 1e-12)) if isinstance(options, Mapping) else 1e-6
    steps = int(options.get("n_power_iterations", 1)) if isinstance(options, Mapping) else 1
    derived: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
        f"{module}.weight": partial(_effective, module=module, keys=_parts(tensors, module), eps=eps, steps=steps)
        for module in modules
    }
    return Renamed(tensors, lambda key: None if MARK in key else key, derived=derived)


def _parts(tensors: Mapping[str, Tensor], module: str) -> list[str]:
    """Prefixes of a module's spectral states, in the order of its rows; none if it only has DAMP's wrapper."""
    states = [key.removesuffix("scale") for key in tensors if key.startswith(module + MARK) and key.endswith(".scale")]
    return sorted(states, key=lambda prefix: [int(p) for p in prefix.split(".") if p.isdigit()])


def _effective(source: Mapping[str, Tensor], *, module: str, keys: list[str], eps: float, steps: int) -> Tensor:
    weight = source[f"{module}{MARK}original"]
    if not keys:
        return weight
    rows = weight.chunk(len(keys))
    parts = [_rescaled(part, source, key, eps, steps) for part, key in zip(rows, keys, strict=True)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _rescaled(weight: Tensor, source: Mapping[str, Tensor], prefix: str, eps: float, steps: int) -> Tensor:
    dtype, weight = weight.dtype, weight.float()
    u, v, scale = (source[prefix + name].float() for name in ("_u", "_v", "scale"))
    for _ in range(steps):
        u = F.normalize(weight @ v, dim=0, eps=eps)
        v = F.normalize(weight.T @ u, dim=0, eps=eps)
    sigma = u @ (weight @ v) + eps
    gain = F.softplus(scale) + FLOOR if f"{prefix}_sn_version" in source else scale
    return (weight * (gain / sigma)).to(dtype)
