"""Convolutions with the SAME padding of TensorFlow, without a padded copy of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """A convolution that pads to ``ceil(size / stride)`` outputs, the odd pixel at the bottom and the right.

    ``F.conv2d`` pads both sides equally, so that the one-sided pixel of an even size at stride 2 needs a padded copy of
    the input, which takes longer than a depthwise convolution itself. On a CPU and without gradients, the copy is
    replaced by a row and a column of zeros before the kernel, and equal padding: ``sum_k w[k] x[2i + k]`` is ``sum_k
    w'[k] x[2i + k - 1]`` with ``w' = (0, w)``. The backward pass of such kernels is slower than the copy.

    Args:
        convolution: the convolution whose parameters and geometry are taken over; its padding is not read.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        # The parameters are shared, not initialised, so that no random number is drawn.
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.stride = convolution.kernel_size, convolution.stride
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.padding, self.output_padding = (0, 0), (0, 0)
        self.transposed, self.padding_mode = False, "zeros"
        self.weight, self.bias = convolution.weight, convolution.bias
        self.train(convolution.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve ``(B, C, H, W)`` to ``(B, C', ceil(H / stride), ceil(W / stride))``; the forward pass of PyTorch."""
        (top, bottom), (left, right) = (self._margins(input.shape[axis + 2], axis) for axis in (0, 1))
        padding = (0, 0)
        if top == bottom and left == right:
            padding = (top, left)
        elif self._widens(input, weight):
            weight, padding = F.pad(weight, (right - left, 0, bottom - top, 0)), (bottom, right)
        else:
            input = F.pad(input, (left, right, top, bottom))
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _margins(self, size: int, axis: int) -> tuple[int, int]:
        """Pixels before and after; the latter is greater by 0 or 1."""
        stride = self.stride[axis]
        reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
        # A remainder is constant under torch.export if the size is a multiple; rounding up there takes minutes.
        total = max(reach - (size % stride or stride), 0)
        return total // 2, total - total // 2

    def _widens(self, images: Tensor, weight: Tensor) -> bool:
        """Whether a wider kernel is faster than a padded copy: where the kernel's arithmetic is small."""
        if torch.compiler.is_compiling():
            return False
        learns = torch.is_grad_enabled() and (images.requires_grad or weight.requires_grad)
        depthwise = self.groups == self.in_channels
        return images.device.type == "cpu" and depthwise and not learns and self.dilation == (1, 1)


def replace_same_convolutions(net: nn.Module, kind: type[nn.Conv2d]) -> int:
    """Put :class:`SameConv2d` in the place of every convolution of class ``kind`` (timm's ``Conv2dSame``).

    Parameters keep their names and values.

    Returns:
        The number of replaced layers.
    """
    found = [(name, module) for name, module in net.named_modules() if type(module) is kind]
    for name, module in found:
        net.set_submodule(name, SameConv2d(module))
    return len(found)
