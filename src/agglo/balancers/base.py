"""The contract of a balancer: how the terms of the objective are weighed against each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Balancer(nn.Module, ABC):
    """Combines named loss terms. A kind's constructor takes ``weights`` positionally: term name to recipe weight.

    Terms are named ``<teacher>/summary`` and ``<teacher>/spatial``.
    """

    @abstractmethod
    def forward(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The scalar to minimise.

        Raises:
            KeyError: a term that was not announced in ``weights``.
        """
