"""The contract of a balancer: how the terms of the objective are weighed against each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Balancer(nn.Module, ABC):
    """Combines named loss terms. A kind's constructor takes ``weights`` positionally: term name to recipe weight.

    Terms are named ``<teacher>/summary`` and ``<teacher>/spatial``; those of no teacher have a name without a slash
    (``mesa``). What a kind learns or remembers lies in parameters and buffers, so a run's state holds it; parameters
    must reach the optimizer. In eval mode nothing is remembered and nothing is random. No kind waits for the device.

    Attributes:
        weighs_images: wants ``per_image``, which costs those who make the terms another reduction.
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
            terms: term name to a scalar; announced terms may be absent.
            step: of the schedule, from 0.
            total: steps of the schedule.
            per_image: the terms of the single images, ``(B,)`` each (:meth:`agglo.losses.base.Loss.by_image`), of which
                ``terms`` then holds the means; given to kinds that weigh images. A term of no teacher has none.

            shares: which part of its weight a term has in this step, such as one that is ramped up; 1 where none is
                given. A kind whose weights look at losses looks at whole terms, or it would undo the ramp.

        Raises:
            KeyError: a term that was not announced in ``weights``.
        """
