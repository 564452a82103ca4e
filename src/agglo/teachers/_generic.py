"""Any other vision encoder that transformers' AutoModel builds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from agglo.teachers._family import Family, grid, guest
from agglo.types import ConfigError


class Generic(Family):
    """The rule for models nobody has described, found out on a model without storage.

    * ``last_hidden_state (B, C, h, w)``: that is the map.
    * ``last_hidden_state (B, N, C)``: the last ``h*w`` of the N tokens, row by row, are the map; those before are a
      prefix. A model with tokens behind its patches, or in another order, needs a family of its own.
    * Summary: ``pooler_output`` where the model has one and the checkpoint its weights; else the first token of the
      prefix; else none.
    * Nothing else is changed: whether the map is after the final norm is the model's own choice.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.config is not config:
            raise ConfigError(
                f"a {config.model_type} is more than a vision encoder, and agglo does not know where in it the "
                "encoder is: save that part alone with save_pretrained, and name its folder"
            )
        self.network = "AutoModel"
        self.native = self.native or 224
        try:
            with torch.device("meta"):
                net = self._network()(self.config).eval()
                self.interpolates = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
                self._measure(net)
        except ConfigError:
            raise
        except Exception as error:  # a language model, a detector, whatever AutoModel can build
            raise ConfigError(f"a {config.model_type} does not run on images alone: {error}") from error

    def _network(self) -> Any:
        # AutoModel is a factory: it builds and loads, but it is not a class of networks.
        return _Auto

    def _measure(self, net: Any) -> None:
        size = self.native or 224
        hidden, pooled = self._run(net, torch.zeros(1, 3, size, size, device="meta"))
        if hidden.ndim == 4:
            self.spatial, self.prefix, self.tokens = int(hidden.shape[1]), 0, False
            # Sides double from stage to stage: at this size none of them is rounded, and the stride can be read off.
            self.patch = self.step = 512 // int(self._run(net, torch.zeros(1, 3, 512, 512, device="meta"))[0].shape[-1])
        else:
            self.spatial = int(hidden.shape[-1])
            self.prefix = int(hidden.shape[1]) - (size // self.patch) ** 2
            if self.prefix < 0 or self.patch == 1:
                raise ConfigError(
                    f"{hidden.shape[1]} tokens of an image of {size} pixels are no grid of patches of {self.patch}"
                )
        self.pools = pooled is not None
        self.summary = int(pooled.shape[1]) if pooled is not None else self.spatial if self.prefix else None
        try:
            other = size + self.step
            self._run(net, torch.zeros(1, 3, other, other, device="meta"))
        except Exception:  # noqa: BLE001 - whatever it says, it does not run at that size
            self.rigid = self.fixed = True

    def _run(self, net: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        out = net(pixels, interpolate_pos_encoding=True) if self.interpolates else net(pixels)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state, None if pooled is None else pooled.flatten(1)

    def forgives(self, net: Any, key: str) -> bool:
        if key.startswith("pooler.") and self.prefix:  # often left out: then the class token stands for it
            net.pooler, self.pools = None, False
            return True
        return super().forgives(net, key)

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        hidden, pooled = self._run(net, pixels)
        first = hidden[:, 0] if hidden.ndim == 3 and self.prefix else None
        spatial = hidden if hidden.ndim == 4 else grid(hidden, pixels, self.patch, self.prefix)
        return (pooled if self.pools else first), spatial


class _Auto:
    """AutoModel with the two doors that :class:`Family` uses."""

    def __new__(cls, config: Any) -> nn.Module:
        return guest().AutoModel.from_config(config)

    @staticmethod
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        return guest().AutoModel.from_pretrained(*arguments, **options)
