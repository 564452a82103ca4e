"""The contract of a balancer: the weighted combination of the objective's loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Balancer(nn.Module, ABC):
    """Combines named loss terms. A kind's constructor takes ``weights`` positionally: term name to recipe weight.

    Terms are named ``<teacher>/summary`` and ``<teacher>/spatial``; others have a name without a slash (``mesa``).
    State lives in parameters, which must be optimised, and buffers. In eval mode nothing is updated and nothing is
    random. No kind synchronises the device.

    Attributes:
        weighs_images: needs ``per_image``, which costs an additional reduction of every term.
    """

    weighs_images: bool = False

    @abstractmethod
    def forward(
        self,
        terms: Mapping[str, Tensor],
        *,
        step: int = 0,
        total: int = 1,
        per_image: Mapping[str, Tensor] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> Tensor:
        """The scalar to minimise.

        Args:
            terms: term name to a scalar; terms of ``weights`` may be absent.
            step: of the schedule, from 0.
            total: steps of the schedule.
            per_image: teachers' terms per image, ``(B,)`` each (:meth:`agglo.losses.base.Loss.by_image`), whose means
                are in ``terms``; for kinds that weigh images.
            shares: factor on the weight of a term in this step, e.g. of a ramp; 1 by default. Not included in the loss
                values from which a kind computes its weights, which would cancel it.

        Raises:
            KeyError: a term is not in ``weights``.
        """
