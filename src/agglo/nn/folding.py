"""Folds the BatchNorm layers of a frozen network into its convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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
