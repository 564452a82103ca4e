"""Spectral reparametrisation for training: the largest singular value of every linear layer is a parameter.

::

    W_eff = W (softplus(s) + 0.05) / sigma(W),    sigma(W) = u^T W v + eps

with ``u``, ``v`` from power iteration (AM-RADIO, arXiv:2312.06709; docs/method.md, 2.9). Direction and gain of a matrix
are learned separately, which prevents outliers in activations; weight decay applies to ``s`` because it is a 1 x 1
matrix. The keys are those of RADIO's training checkpoints (docs/checkpoints.md, 7).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

FLOOR = 0.05
"""Added to ``softplus(scale)``: the smallest gain of a layer."""

VERSION = 2
"""Version of the parametrisation in checkpoints; in version 1 the gain was the scale itself."""

INITIAL_STEPS = 20
"""Power iterations when a layer is wrapped."""

FUSED = {"qkv": 3, "w12": 2}
"""Layers of several stacked matrices, each with its own gain."""


class Spectral(nn.Module):
    """The parametrisation of one matrix ``(R, C)``: parameter ``scale (1, 1)``, buffers ``_u (R,)`` and ``_v (C,)``.

    Args:
        weight: the matrix; the gain starts at its largest singular value, so that the output does not change.
        eps: added to that value.
        steps: power iterations per training forward.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, eps: float, steps: int) -> None:
        super().__init__()
        self.eps, self.steps = eps, steps
        rows, columns = weight.shape
        draw = torch.Generator().manual_seed(rows * 1_000_003 + columns)  # the global generator is not used
        device, gain = weight.device, torch.ones((), device=weight.device)
        self.register_buffer("_u", F.normalize(torch.randn(rows, generator=draw), dim=0).to(device))
        self.register_buffer("_v", F.normalize(torch.randn(columns, generator=draw), dim=0).to(device))
        self.register_buffer("_sn_version", torch.tensor(VERSION, device=device))
        if not weight.is_meta:
            self.iterate(weight, INITIAL_STEPS)
            gain = self.norm(weight.detach())
        # The inverse of softplus, log(exp(x) - 1), stable for small and large numbers.
        x = gain.double() - FLOOR
        self.scale = nn.Parameter((x + torch.log(-torch.expm1(-x))).float().reshape(1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix scaled to the learned singular value; computed in float32, returned in the matrix's dtype."""
        with _full_precision(weight):
            gain = (F.softplus(self.scale.float()) + FLOOR) / self.norm(weight)
            return (weight.float() * gain).to(weight.dtype)

    def norm(self, weight: Tensor) -> Tensor:
        """``u^T W v + eps``, a scalar, differentiable in ``weight`` only."""
        # Copies: the next forward may change them before this one's backward.
        u, v = self._u.float().clone(), self._v.float().clone()
        return torch.dot(u, weight.float() @ v) + self.eps

    @torch.no_grad()
    def iterate(self, weight: Tensor, steps: int | None = None) -> None:
        """Power iteration of ``u`` and ``v``, by default the steps of one training forward."""
        matrix = weight.detach().float()
        with _full_precision(weight):
            for _ in range(self.steps if steps is None else steps):
                u = F.normalize(matrix @ self._v.float(), dim=0, eps=self.eps)
                self._u.copy_(u)
                self._v.copy_(F.normalize(matrix.T @ u, dim=0, eps=self.eps))


class FusedSpectral(nn.Module):
    """The parametrisation of several stacked matrices: one :class:`Spectral` each, in ``parts``."""

    parts: Sequence[Spectral]

    def __init__(self, parts: Sequence[Spectral]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)  # type: ignore[assignment]

    def forward(self, weight: Tensor) -> Tensor:
        """``(n R, C)`` to ``(n R, C)``."""
        chunks = weight.chunk(len(self.parts))
        return torch.cat([part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)])


def enable_spectral(
    module: nn.Module,
    /,
    *,
    eps: float = 1e-6,
    n_power_iterations: int = 1,
    skip: Collection[str] = ("patch_generator",),
) -> tuple[str, ...]:
    """Reparametrise every ``nn.Linear`` below ``module``, in place; its output does not change.

    The power iteration of a training forward runs before ``module`` itself is called, not where a weight is read:
    activation checkpointing, which runs the layers twice, uses the same weights both times, and ``eval()`` changes
    nothing. Call this before the optimiser is built and before a state is loaded, on the module that training calls:
    the student, not the model. DAMP multiplies the reparametrised weights, in either order of enabling.

    An EMA must average the parameters ``original`` and ``scale`` and copy the buffers ``_u`` and ``_v``, because the
    mean of two directions is not a direction.

    Args:
        module: a student.
        eps: added to the norm.
        n_power_iterations: per training forward.
        skip: names or dotted paths; layers whose path contains one of them are not reparametrised.

    Returns:
        Dotted paths of the layers.

    Raises:
        ValueError: no such layer, one that is parametrised already, a fused layer whose rows do not divide, or a layer
            whose largest singular value is too small; ``module`` is then unchanged.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not any(f".{part}." in f".{name}." for part in skip)
    }
    if not layers:
        raise ValueError(f"{type(module).__name__} has no nn.Linear outside {sorted(skip)}")
    wrapped = [name for name, layer in layers.items() if parametrize.is_parametrized(layer)]
    if wrapped:
        raise ValueError(f"{wrapped[0]} is parametrised already: materialize the module first")
    parts = {name: _parts(name, layer.weight, eps, n_power_iterations) for name, layer in layers.items()}
    weak = [
        name
        for name, found in parts.items()
        if any(not part.scale.is_meta and not torch.isfinite(part.scale).all() for part in found)
    ]
    if weak:
        raise ValueError(
            f"the largest singular value of {', '.join(weak)} is not above {FLOOR}, the smallest gain of a layer: "
            f"initialise larger, or use skip={(*skip, *weak)}"
        )
    for name, layer in layers.items():
        found = parts[name]
        parametrize.register_parametrization(layer, "weight", found[0] if len(found) == 1 else FusedSpectral(found))
    module.register_forward_pre_hook(_advance)
    return tuple(layers)


@torch.no_grad()
def materialize(module: nn.Module) -> nn.Module:
    """Replace the reparametrisation by plain weights under plain names, in place.

    The power iteration of one training forward is run first, in ``eval()`` too, as for RADIO's releases.

    Returns:
        The module itself.

    Raises:
        ValueError: a layer has a further parametrisation; the module is then unchanged.
    """
    layers = list(_wrapped(module))
    for layer, _ in layers:
        lists = layer.parametrizations
        if len(lists) > 1 or len(lists["weight"]) > 1:  # type: ignore[arg-type,index]
            raise ValueError("a layer has a further parametrisation: remove that first")
    for layer, parts in layers:
        weight = _original(layer)
        for part, chunk in zip(parts, weight.chunk(len(parts)), strict=True):
            part.iterate(chunk)
        weight.data = layer.weight.detach()
        # Not `remove_parametrizations`: it changes a class that copies of the layer share.
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        layer.register_parameter("weight", weight)
    for owner in module.modules():
        for key in [key for key, hook in owner._forward_pre_hooks.items() if hook is _advance]:
            del owner._forward_pre_hooks[key]
    return module


def _advance(module: nn.Module, args: object) -> None:
    """Hook before a training forward: the power iteration of every layer."""
    if module.training:
        for layer, parts in _wrapped(module):
            for part, chunk in zip(parts, _original(layer).chunk(len(parts)), strict=True):
                part.iterate(chunk)


def _full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast, which the meta device does not support."""
    return contextlib.nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)


def _wrapped(module: nn.Module) -> Iterator[tuple[nn.Linear, Sequence[Spectral]]]:
    """The reparametrised layers and the parts of each."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            first = layer.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(first, Spectral | FusedSpectral):
                yield layer, [first] if isinstance(first, Spectral) else first.parts


def _original(layer: nn.Linear) -> nn.Parameter:
    """The parameter behind the reparametrised weight."""
    return layer.parametrizations["weight"].original  # type: ignore[index,return-value]


def _parts(name: str, weight: Tensor, eps: float, steps: int) -> list[Spectral]:
    """One :class:`Spectral` per matrix of a layer, in the order of its rows."""
    count = FUSED.get(name.split(".")[-1], 1)
    if len(weight) % count:
        raise ValueError(f"{name}: {len(weight)} rows are not divisible into {count} matrices")
    return [Spectral(chunk, eps, steps) for chunk in weight.chunk(count)]
