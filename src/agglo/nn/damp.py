"""DAMP: data augmentation via multiplicative perturbations, of the weights (Trinh et al. 2024, arXiv 2405.15017).

A perturbation of a layer's input acts like a multiplication of its weights, so a network that is trained with
``W_eff = W * xi``, ``xi ~ N(1, sigma^2)``, is trained for corrupted images without seeing one (METHOD 2.7)::

    dL/dW = xi * dL/dW_eff

Every rank draws its own noise, shared by its whole batch: the gradient averages over as many draws as there are ranks.
"""

from __future__ import annotations

import hashlib
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from agglo.nn.products import Linear

# What these forwards do with a weight is known: one product.
_PRODUCTS = (nn.Linear.forward, Linear.forward)

Layer = nn.Linear | nn.Conv2d
"""What is perturbed: maps that are linear in their input. A convolution is one, and a ConvNet has hardly any other."""


class _Noise:
    """A layer's factors, drawn ahead of the forward. A deep copy has none: it is the average, or an export."""

    def __init__(self) -> None:
        self.factors: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noise:
        return _Noise()


class Damp:
    """The noise of a module's linear layers and convolutions.

    A pure function of ``(seed, rank, step, micro, layer name)``.
    It is drawn once a step into memory that stays, not in the forward. A recomputed forward (activation checkpointing)
    therefore meets the same noise, and a compiled one needs no generator and does not compile again. That memory is the
    size of the perturbed weights. Names and number of a module's parameters and buffers do not change.

    Attributes:
        sigma: standard deviation of the factors.
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, layers: dict[str, Layer], sigma: float, seed: int, rank: int) -> None:
        self.sigma, self.seed, self.rank = sigma, seed, rank
        self._layers = layers

    @property
    def names(self) -> tuple[str, ...]:
        """The perturbed layers, by their dotted path."""
        return tuple(self._layers)

    @torch.no_grad()
    def set_step(self, step: int, micro: int = 0) -> None:
        """Draw the noise of a step; to be called between a backward and the next forward, after the model was moved.

        Args:
            step: of the training run.
            micro: of the batches whose gradients a step accumulates.
        """
        draws: dict[torch.device, torch.Generator] = {}
        for name, layer in self._layers.items():
            weight, noise = _stored(layer), _noise(layer)
            drawn = noise.factors
            if drawn is None or (drawn.shape, drawn.device, drawn.dtype) != (weight.shape, weight.device, weight.dtype):
                drawn = noise.factors = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            if drawn.is_meta:
                continue
            if drawn.device not in draws:
                draws[drawn.device] = torch.Generator(drawn.device)
            generator = draws[drawn.device].manual_seed(self._key(step, micro, name))
            drawn.normal_(1.0, self.sigma, generator=generator)

    def disable(self) -> None:
        """Give the layers their own forward back."""
        for layer in self._layers.values():
            for name in ("forward", "_damp"):
                layer.__dict__.pop(name, None)
        self._layers = {}

    def _key(self, *place: object) -> int:
        text = "/".join(map(str, ("damp", self.seed, self.rank, *place)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")  # all that a CPU generator reads


def enable_damp(module: nn.Module, sigma: float, /, *, seed: int, rank: int | None = None) -> Damp:
    """Perturb every ``nn.Linear`` and ``nn.Conv2d`` below ``module`` at every training forward, in place.

    In ``eval()`` the layers do exactly what they did; so do deep copies of the module, in either mode. It goes with
    :func:`agglo.nn.spectral.enable_spectral` in any order: the noise multiplies what that makes of the weights.
    Attention that reads a layer's weight without calling the layer (``nn.MultiheadAttention``) is not perturbed.

    Args:
        module: a student, without its heads.
        sigma: standard deviation of the factors; DAMP's own ViTs had 0.15 to 0.25 (D-7: 0.1).
        seed: of the run.
        rank: of this process; what ``torch.distributed`` says when None, and 0 without it.

    Returns:
        The handle: call its ``set_step`` before every step. The noise of step 0 is there already.

    Raises:
        ValueError: a negative or infinite ``sigma``, no such layer, or one that is perturbed already.
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be a number from 0 up, got {sigma}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    if not layers:
        raise ValueError(f"{type(module).__name__} has no nn.Linear and no nn.Conv2d to perturb")
    taken = [name for name, layer in layers.items() if "forward" in layer.__dict__]
    if taken:
        raise ValueError(f"the forward of {taken[0]} was replaced already: disable() what did it first")
    if rank is None:
        known = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if known else 0
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
    weight = self.weight  # once: it may be computed
    if factors.device != weight.device:
        raise RuntimeError(
            f"noise on {factors.device}, weight on {weight.device}: call set_step after moving the model"
        )
    perturbed = weight * factors.to(weight.dtype)
    if own in _PRODUCTS:
        return F.linear(input, perturbed, self.bias)
    if parametrize.is_parametrized(self, "weight"):
        raise RuntimeError(
            f"{type(self).__name__} has a forward of its own and a parametrised weight: no way in for DAMP"
        )
    self.__dict__["weight"] = perturbed  # read before the parameter of that name
    try:
        return own(self, input)
    finally:
        del self.__dict__["weight"]
