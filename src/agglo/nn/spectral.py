"""Spectral reparametrisation for training: every linear layer learns its largest singular value as a number.

::

    W_eff = W (softplus(s) + 0.05) / sigma(W),    sigma(W) = u^T W v + eps

with ``u``, ``v`` from power iteration (AM-RADIO, arXiv 2312.06709; METHOD 2.9; RADIO.md section 7). The direction of a
matrix is learned apart from its gain, which keeps activations from growing outliers; weight decay reaches the gain
because ``s`` is a 1 x 1 matrix. The keys are those of RADIO's training checkpoints, so whoever reads these reads ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from agglo.nn.products import Linear

FLOOR = 0.05
"""Added to ``softplus(scale)`` so that a layer's gain never vanishes."""

VERSION = 2
"""Of the parametrisation, as checkpoints say it: 1 had the plain scale for a gain."""

INITIAL_STEPS = 20
"""Power iterations when a layer is wrapped."""

FUSED = {"qkv": 3, "w12": 2}
"""Layers that hold several matrices, one above the other, each with a gain of its own."""


class Spectral(nn.Module):
    """The parametrisation of one matrix ``(R, C)``: parameter ``scale (1, 1)``, buffers ``_u (R,)`` and ``_v (C,)``.

    Args:
        weight: the matrix as it is; the gain starts at its largest singular value, so that nothing changes.
        eps: added to that value.
        steps: power iterations a training forward.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, eps: float, steps: int) -> None:
        super().__init__()
        self.eps, self.steps = eps, steps
        rows, columns = weight.shape
        draw = torch.Generator().manual_seed(rows * 1_000_003 + columns)  # leaves the caller's generator alone
        device, gain = weight.device, torch.ones((), device=weight.device)
        self.register_buffer("_u", F.normalize(torch.randn(rows, generator=draw), dim=0).to(device))
        self.register_buffer("_v", F.normalize(torch.randn(columns, generator=draw), dim=0).to(device))
        self.register_buffer("_sn_version", torch.tensor(VERSION, device=device))
        if not weight.is_meta:
            self.iterate(weight, INITIAL_STEPS)
            gain = self.norm(weight.detach())
        # The inverse of softplus, in float64: log(exp(x) - 1) of small and of large numbers.
        x = gain.double() - FLOOR
        self.scale = nn.Parameter((x + torch.log(-torch.expm1(-x))).float().reshape(1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with its largest singular value replaced by the learned one, in float32, in the matrix's dtype."""
        with _full_precision(weight):
            gain = (F.softplus(self.scale.float()) + FLOOR) / self.norm(weight)
            return (weight.float() * gain).to(weight.dtype)

    def norm(self, weight: Tensor) -> Tensor:
        """``u^T W v + eps``, a scalar, with a gradient into ``weight`` alone."""
        # Copies: the next forward may move them before this one's gradient is taken.
        u, v = self._u.float().clone(), self._v.float().clone()
        return torch.dot(u, weight.float() @ v) + self.eps

    @torch.no_grad()
    def iterate(self, weight: Tensor, steps: int | None = None) -> None:
        """Move ``u`` and ``v`` towards the leading singular vectors, as many steps as a training forward takes."""
        matrix = weight.detach().float()
        with _full_precision(weight):
            for _ in range(self.steps if steps is None else steps):
                u = F.normalize(matrix @ self._v.float(), dim=0, eps=self.eps)
                self._u.copy_(u)
                self._v.copy_(F.normalize(matrix.T @ u, dim=0, eps=self.eps))


class FusedSpectral(nn.Module):
    """The parametrisation of several matrices, one above the other: a :class:`Spectral` each, in ``parts``."""

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
    """Reparametrise every ``nn.Linear`` below ``module``, in place; its output stays what it was.

    One power iteration belongs to every training forward. It runs before ``module`` itself is called, not where a
    weight is read: activation checkpointing, which runs the layers twice, sees the same weights both times, and in
    ``eval()`` nothing moves. Call it before the optimiser is built and before a state is loaded, on what is called in
    training: the student, which a model's ``encode`` calls, not the model. DAMP multiplies what comes out of it,
    whichever was enabled first.

    An average of the weights (EMA) averages the parameters ``original`` and ``scale`` and must copy the buffers, whose
    names end in ``_u`` and ``_v``: the mean of two directions is not one.

    Args:
        module: a student.
        eps: added to the norm.
        n_power_iterations: a training forward.
        skip: names or dotted paths; layers whose own path holds one of them are left alone.

    Returns:
        The layers, by their dotted path.

    Raises:
        ValueError: nothing to wrap, something wrapped already, a fused layer whose rows do not divide, or a layer whose
            largest singular value is below what the parametrisation can express; nothing was changed then.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not any(f".{part}." in f".{name}." for part in skip)
    }
    if not layers:
        raise ValueError(f"{type(module).__name__} has no nn.Linear outside {sorted(skip)}")
    taken = [name for name, layer in layers.items() if parametrize.is_parametrized(layer)]
    if taken:
        raise ValueError(f"{taken[0]} is parametrised already: materialize the module first")
    parts = {name: _parts(name, layer.weight, eps, n_power_iterations) for name, layer in layers.items()}
    weak = [
        name
        for name, found in parts.items()
        if any(not part.scale.is_meta and not torch.isfinite(part.scale).all() for part in found)
    ]
    if weak:
        raise ValueError(
            f"the largest singular value of {', '.join(weak)} is not above {FLOOR}, the smallest gain of a layer: "
            f"initialise larger, or leave out with skip={(*skip, *weak)}"
        )
    for name, layer in layers.items():
        found = parts[name]
        parametrize.register_parametrization(layer, "weight", found[0] if len(found) == 1 else FusedSpectral(found))
        if type(layer).forward is Linear.forward:
            # It reads the weight twice, which is to compute it twice. The class is this layer's own.
            type(layer).forward = nn.Linear.forward
    module.register_forward_pre_hook(_advance)
    return tuple(layers)


@torch.no_grad()
def materialize(module: nn.Module) -> nn.Module:
    """Take the reparametrisation off, in place: plain weights under plain names.

    One more training forward's power iteration comes first, in ``eval()`` too, as RADIO's releases were made: the
    result is what a reader of the checkpoint gets.

    Returns:
        The module itself, as it was where nothing was wrapped.

    Raises:
        ValueError: a layer was parametrised further by someone else; nothing was changed then.
    """
    layers = list(_wrapped(module))
    for layer, _ in layers:
        lists = layer.parametrizations
        if len(lists) > 1 or len(lists["weight"]) > 1:  # type: ignore[arg-type,index]
            raise ValueError("a layer was parametrised further: take that off first")
    for layer, parts in layers:
        weight = _original(layer)
        for part, chunk in zip(parts, weight.chunk(len(parts)), strict=True):
            part.iterate(chunk)
        weight.data = layer.weight.detach()
        # Not by `remove_parametrizations`: it takes the property off a class that copies of the layer share.
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        layer.register_parameter("weight", weight)
    for owner in module.modules():
        for key in [key for key, hook in owner._forward_pre_hooks.items() if hook is _advance]:
            del owner._forward_pre_hooks[key]
    return module


def _advance(module: nn.Module, args: object) -> None:
    """Before a training forward: the power iteration of every layer."""
    if module.training:
        for layer, parts in _wrapped(module):
            for part, chunk in zip(parts, _original(layer).chunk(len(parts)), strict=True):
                part.iterate(chunk)


def _full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast, which the meta device does not have."""
    return contextlib.nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)


def _wrapped(module: nn.Module) -> Iterator[tuple[nn.Linear, Sequence[Spectral]]]:
    """The reparametrised layers and the parts of each."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            first = layer.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(first, Spectral | FusedSpectral):
                yield layer, [first] if isinstance(first, Spectral) else first.parts


def _original(layer: nn.Linear) -> nn.Parameter:
    """What is trained in the place of the weight."""
    return layer.parametrizations["weight"].original  # type: ignore[index,return-value]


def _parts(name: str, weight: Tensor, eps: float, steps: int) -> list[Spectral]:
    """The states of a layer, in the order of its rows."""
    count = FUSED.get(name.split(".")[-1], 1)
    if len(weight) % count:
        raise ValueError(f"{name} should hold {count} matrices, which its {len(weight)} rows do not divide into")
    return [Spectral(chunk, eps, steps) for chunk in weight.chunk(count)]
