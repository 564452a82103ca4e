"""The dense loss of AM-RADIO: cosine distance and smooth L1."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from agglo.losses._reduce import Pointwise
from agglo.nn.linalg import unit


class AMRadio(Pointwise):
    """``alpha (1 - cos(x, y)) + beta mean_c smoothL1(x_c - y_c)`` per position, averaged over unmasked positions.

    AM-RADIO (arXiv:2312.06709, section 3.4; docs/method.md, 2.1), on features that are not normalised: smooth L1 makes
    the head match magnitudes, to which the cosine is invariant.

    Args:
        alpha: weight of the cosine distance.
        beta: weight of smooth L1.
        huber: transition from quadratic to linear in smooth L1, in units of the target; 0 gives L1.

    Raises:
        ValueError: an argument is negative, or both weights are 0.
    """

    def __init__(self, *, alpha: float = 0.9, beta: float = 0.1, huber: float = 1.0) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta), ("huber", huber)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if alpha == beta == 0:
            raise ValueError("alpha and beta are both 0; at least one must be positive")
        self.alpha, self.beta, self.huber = alpha, beta, huber

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        cosine = (unit(prediction) - unit(target)).square().sum(1) / 2
        magnitude = F.smooth_l1_loss(prediction, target, reduction="none", beta=self.huber).mean(1)
        return self.alpha * cosine + self.beta * magnitude
