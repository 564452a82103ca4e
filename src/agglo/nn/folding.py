"""Folds BatchNorm layers into convolutions: once in a frozen network, per step in one that learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

TOLERANCE = 1e-4
"""Difference of the outputs that is rounding, as a share of the largest output."""


@torch.no_grad()
def fold_batch_norms(net: nn.Module, run: Callable[[], Mapping[str, Tensor]]) -> int:
    """Fold BatchNorm layers in eval mode into the convolutions before them, in place.

    With ``BN(x) = (x - mean) * g + b`` and ``x = W * z + c``: ``BN(x) = (g W) * z + (g (c - mean) + b)`` with ``g =
    weight / sqrt(var + eps)`` per channel, so that one pass over the maps is saved per layer. Layers are paired by
    running the network, whatever its code looks like: a norm is folded if its input is the output of a convolution,
    and both run once. If the outputs then differ by more than :data:`TOLERANCE`, as where something else also reads
    the convolution's output, the network is restored.

    Args:
        net: a network whose parameters do not change any more.
        run: runs it on an input that does not change, and returns what is used of its output, by name.

    Returns:
        The number of folded layers; 0 if the network was restored.
    """
    if not any(_foldable(module) for module in net.modules()):
        return 0
    pairs, before = _pairs(net, run)
    names = {module: name for name, module in net.named_modules()}
    kept = [(convolution, convolution.weight, convolution.bias) for convolution, _ in pairs]
    for convolution, norm in pairs:
        convolution.weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        net.set_submodule(names[norm], _rest(norm))
    try:
        same = _close(before, run())
    except Exception:  # noqa: BLE001 - code that reads attributes of its norms raises errors of any kind
        same = False
    if same:
        return len(pairs)
    for convolution, weight, bias in kept:
        convolution.weight, convolution.bias = weight, bias
    for _, norm in pairs:
        net.set_submodule(names[norm], norm)
    return 0


@torch.no_grad()
def fuse_fixed_norms(net: nn.Module, run: Callable[[], Mapping[str, Tensor]]) -> int:
    """Compute BatchNorm layers of fixed statistics inside the convolutions before them while the network learns.

    As :func:`fold_batch_norms`, but the folded weights are computed from the parameters in every forward pass that
    records gradients, so that convolution and norm learn as before, with equal gradients up to rounding. This saves
    two passes over each map, forward and backward. Without gradients, and for norms in training mode, the layers
    compute as before. Names of parameters and buffers do not change.

    Args:
        net: a network in eval mode whose BatchNorm layers stay in eval mode.
        run: as in :func:`fold_batch_norms`.

    Returns:
        The number of layers; 0 if the network was restored.
    """
    if not any(_foldable(module) for module in net.modules()):
        return 0
    pairs, before = _pairs(net, run)
    pairs = [pair for pair in pairs if type(pair[0]).forward is nn.Conv2d.forward and not is_parametrized(pair[0])]
    names = {module: name for name, module in net.named_modules()}
    for convolution, norm in pairs:
        fixed = _FixedNorm(norm)
        net.set_submodule(names[convolution], _NormedConv2d(convolution, fixed))
        net.set_submodule(names[norm], fixed)
    try:
        with torch.enable_grad():
            same = _close(before, run())
    except Exception:  # noqa: BLE001 - as in fold_batch_norms
        same = False
    if same:
        return len(pairs)
    for module in (module for pair in pairs for module in pair):
        net.set_submodule(names[module], module)
    return 0


class _FixedNorm(nn.BatchNorm2d):
    """A norm that leaves its affine map to the convolution before it where gradients are recorded."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    @property
    def moved(self) -> bool:
        """Whether the convolution computes the affine map."""
        return torch.is_grad_enabled() and not self.training

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(input if self.moved else super().forward(input)))


class _NormedConv2d(nn.Module):
    """A convolution that computes the affine map of the norm after it (:class:`_FixedNorm`)."""

    def __init__(self, convolution: nn.Conv2d, norm: _FixedNorm) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self._convolve, self._norm = convolution._conv_forward, (norm,)  # in a tuple: no second name of its parameters
        self.train(convolution.training)

    def forward(self, images: Tensor) -> Tensor:
        norm: Any = self._norm[0]
        if not norm.moved:
            return self._convolve(images, self.weight, self.bias)
        gain = torch.rsqrt(norm.running_var + norm.eps)
        shift = -norm.running_mean * gain if self.bias is None else (self.bias - norm.running_mean) * gain
        if norm.affine:
            gain, shift = gain * norm.weight, shift * norm.weight + norm.bias
        return self._convolve(images, self.weight * gain[:, None, None, None], shift)


def _foldable(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with stored statistics, alone or, as in timm, with dropout and activation."""
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.training:
        return False
    return type(module) is nn.BatchNorm2d or (hasattr(module, "drop") and hasattr(module, "act"))


def _rest(norm: Any) -> nn.Module:
    """What remains of a norm without its affine map."""
    return nn.Identity() if type(norm) is nn.BatchNorm2d else nn.Sequential(norm.drop, norm.act).eval()


def _pairs(
    net: nn.Module, run: Callable[[], Mapping[str, Tensor]]
) -> tuple[list[tuple[nn.Conv2d, Any]], Mapping[str, Tensor]]:
    """Convolutions and the norms that read them, and the output of the run."""
    outputs: list[tuple[nn.Conv2d, Tensor]] = []  # holds the tensors: the address of a freed one is used again
    found: list[tuple[nn.Conv2d, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            outputs.append((module, output))
        else:
            found.extend((convolution, module) for convolution, each in outputs if inputs and each is inputs[0])

    handles = [
        module.register_forward_hook(note)
        for module in net.modules()
        if isinstance(module, nn.Conv2d) or _foldable(module)
    ]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in found if calls[pair[0]] == calls[pair[1]] == 1]
    readers = Counter(convolution for convolution, _ in once)
    return [pair for pair in once if readers[pair[0]] == 1], result


def _close(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether all outputs are equal to rounding; NaN equals NaN."""
    return before.keys() == after.keys() and all(
        torch.allclose(
            value, after[name], rtol=0, atol=TOLERANCE * float(value.abs().nan_to_num().max()), equal_nan=True
        )
        for name, value in before.items()
    )
