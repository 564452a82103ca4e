"""Multinomial logistic regression, the convex probe of classification and segmentation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._probe import ProbeError


def fit_logistic(
    x: Tensor,
    y: Tensor,
    decay: float,
    steps: int,
    start: tuple[Tensor, Tensor] | None = None,
    what: str = "segmentation",
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with soft labels.

    Args:
        x: ``(n, D)`` standardised features.
        y: ``(n, K)`` non-negative; a row's sum is its weight.
        decay: L2 penalty on the weights.
        steps: L-BFGS iterations at most.
        start: weight and bias to start from; zeros otherwise.
        what: whose probe this is, for errors.

    Returns:
        weight ``(K, D)`` and bias ``(K,)``.

    Raises:
        ProbeError: nothing is labelled, or the loss is not finite or above that of a probe that knows nothing.
    """
    total = float(y.sum())
    if total <= 0:
        unit = "pixel" if what == "segmentation" else "image"
        raise ProbeError(f"the training split has no labelled {unit}: nothing to fit a probe on")
    zeros = x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])
    weight, bias = (tensor.clone() for tensor in start or zeros)
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def loss() -> Tensor:
        ce = -(y * F.log_softmax(x @ weight.T + bias, 1)).sum() / total
        return ce + 0.5 * decay * weight.square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)
    with torch.no_grad():
        final = float(loss())
    ignorant = math.log(y.shape[1])  # the loss of zeros
    if not math.isfinite(final) or final > ignorant * (1 + 1e-6):
        raise ProbeError(f"the {what} probe diverged: loss {final:.4g}, where guessing has {ignorant:.4g}")
    return weight.detach(), bias.detach()
