"""DAMP: data augmentation via multiplicative perturbations, of the weights (Trinh et al. 2024, arXiv:2406.16540).

A corruption of a layer's input acts like a multiplicative perturbation of its weights, so training with
``W_eff = W * xi``, ``xi ~ N(1, sigma^2)``, makes a network robust to corrupted images (docs/method.md, 2.7)::

    dL/dW = xi * dL/dW_eff

Each rank draws its own noise, shared by its batch; the gradient averages over the draws of all ranks.
"""

from __future__ import annotations

import hashlib
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from agglo import dist

Layer = nn.Linear | nn.Conv2d
"""Perturbed layers: those that are linear in their input."""


class _Noise:
    """A layer's factors, drawn before the forward. A deep copy has none: it is an EMA model or an export."""

    def __init__(self) -> None:
        self.factors: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noise:
        return _Noise()


class Damp:
    """The noise of a module's linear layers and convolutions, a function of ``(seed, rank, step, micro, layer name)``.

    It is drawn once per step into persistent memory, of the size of the perturbed weights, not in the forward. A
    recomputed forward (activation checkpointing) therefore uses the same noise, and a compiled one needs no generator
    and is not recompiled. The module's parameters and buffers keep their names and number.
    """

    def __init__(self, layers: dict[str, Layer], sigma: float, seed: int, rank: int) -> None:
        self.sigma, self.seed, self.rank = sigma, seed, rank
        self._layers = layers

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted paths of the perturbed layers."""
        return tuple(self._layers)

    @torch.no_grad()
    def set_step(self, step: int, micro: int = 0) -> None:
        """Draw the noise of a step. Call it before the step's forward, after the model was moved to its device.

        Args:
            step: of the training run.
            micro: index of the batch within a step that accumulates gradients.
        """
        generators: dict[torch.device, torch.Generator] = {}
        for name, layer in self._layers.items():
            weight, noise = _stored(layer), _noise(layer)
            drawn = noise.factors
            if drawn is None or (drawn.shape, drawn.device, drawn.dtype) != (weight.shape, weight.device, weight.dtype):
                drawn = noise.factors = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            if drawn.is_meta:
                continue
            if drawn.device not in generators:
                generators[drawn.device] = torch.Generator(drawn.device)
            generator = generators[drawn.device].manual_seed(self._key(step, micro, name))
            drawn.normal_(1.0, self.sigma, generator=generator)

    def disable(self) -> None:
        """Restore the layers' own forward."""
        for layer in self._layers.values():
            for name in ("forward", "_damp"):
                layer.__dict__.pop(name, None)
        self._layers = {}

    def _key(self, *place: object) -> int:
        text = "/".join(map(str, ("damp", self.seed, self.rank, *place)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")  # a CPU generator uses 32 bits


def enable_damp(module: nn.Module, sigma: float, /, *, seed: int, rank: int | None = None) -> Damp:
    """Perturb every ``nn.Linear`` and ``nn.Conv2d`` below ``module`` at every training forward, in place.

    Layers in ``eval()`` and deep copies of the module are not perturbed. Can be combined with
    :func:`agglo.nn.spectral.enable_spectral` in any order: the noise multiplies the reparametrised weights. A module
    that reads a layer's weight without calling the layer (``nn.MultiheadAttention``) is not perturbed.

    Args:
        module: a student, without its heads.
        sigma: standard deviation of the factors; 0.15 to 0.25 in the paper's ViTs, 0.1 here (docs/method.md, D-7).
        seed: of the run.
        rank: of this process; that of ``torch.distributed`` when None, else 0.

    Returns:
        A handle, with the noise of step 0 drawn; call its ``set_step`` before every step.

    Raises:
        ValueError: ``sigma`` is negative or infinite, no layer can be perturbed, or one is perturbed already.
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    if not layers:
        raise ValueError(f"{type(module).__name__} has no nn.Linear and no nn.Conv2d to perturb")
    replaced = [name for name, layer in layers.items() if "forward" in layer.__dict__]
    if replaced:
        raise ValueError(f"the forward of {replaced[0]} is replaced already: call disable() of its handle first")
    rank = dist.rank() if rank is None else rank
    for layer in layers.values():
        layer.__dict__["_damp"] = _Noise()
        layer.__dict__["forward"] = MethodType(_forward, layer)
    damp = Damp(layers, sigma, seed, rank)
    damp.set_step(0)
    return damp


def _stored(layer: Layer) -> Tensor:
    """A tensor of the weight's shape, dtype and device, without computing a parametrised one."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations["weight"].original  # type: ignore[index,return-value]
    return layer.weight


def _noise(layer: Layer) -> _Noise:
    return layer.__dict__["_damp"]


def _forward(self: Layer, input: Tensor) -> Tensor:
    """The layer's own forward, with perturbed weights in training."""
    noise: _Noise = self._damp  # type: ignore[assignment]
    factors = noise.factors
    own: Any = type(self).forward
    if factors is None or not self.training:
        return own(self, input)
    weight = self.weight  # read once: a parametrised weight is computed at each access
    if factors.device != weight.device:
        raise RuntimeError(
            f"noise on {factors.device}, weight on {weight.device}: call set_step after moving the model"
        )
    perturbed = weight * factors.to(weight.dtype)
    if own is nn.Linear.forward:  # one matrix product, computed with the other weight
        return F.linear(input, perturbed, self.bias)
    if parametrize.is_parametrized(self, "weight"):
        raise RuntimeError(
            f"DAMP cannot perturb {type(self).__name__}: it has a custom forward and a parametrised weight"
        )
    self.__dict__["weight"] = perturbed  # shadows the parameter of that name
    try:
        return own(self, input)
    finally:
        del self.__dict__["weight"]
