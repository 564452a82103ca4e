"""What agglo must know of one family of transformers' vision encoders: how it is built, and what its output means."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agglo.config import nearest
from agglo.extras import require
from agglo.types import AssetError, ConfigError


class Family(ABC):
    """One model of a family, from its configuration alone: no weights are read to know what it returns.

    A family is one small class: the constructor reads the configuration, :meth:`read` reads the output. It is named in
    ``_families.py``.

    Args:
        config: transformers' configuration, of the vision encoder or of a larger model that holds one.

    Attributes:
        config: of the vision encoder.
        network: transformers' class of the vision encoder.
        summary: width of the summary, or None where the model has none.
        slots: class tokens that the summary is a concatenation of.
        spatial: channels of the map.
        patch: side of a token in pixels.
        step: sides of images are multiples of this.
        tokens: whether all of the model's tokens have that side; False for pyramids.
        native: side in pixels of the square images the configuration was made for, or None.
        fixed: it was trained at one size, and sees every view at that size unless told otherwise.
        rigid: it cannot run at any size but :attr:`native`.
        conditions: the network normalises pixels itself: it takes [0, 1].
    """

    network: str
    tokens: bool = True
    fixed: bool = False
    rigid: bool = False
    conditions: bool = False
    keys: ClassVar[Mapping[str, str] | None] = None
    """Patterns → replacements for parameter names of larger models that hold the encoder."""

    def __init__(self, config: Any) -> None:
        self.config = getattr(config, "vision_config", config)
        self.patch = side(getattr(self.config, "patch_size", 1), "patch")
        self.step = self.patch
        self.spatial = int(getattr(self.config, "hidden_size", 0))
        self.summary: int | None = self.spatial
        self.slots = 1
        size = getattr(self.config, "image_size", None)
        self.native: int | None = None if size is None else side(size, "image")

    @abstractmethod
    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Summary ``(B, D)`` or None, and map ``(B, C, H, W)``, of normalised pixels ``(B, 3, h, w)``."""

    def without_summary(self, net: Any) -> None:
        """Take out what only the summary needs; the default leaves everything in."""
        del net

    # --- building -----------------------------------------------------------------------------------------------------

    def random(self) -> nn.Module:
        """The network with random weights, the same in every process, on the default device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._network()(self.config)

    def load(self, folder: Path) -> nn.Module:
        """The network with the weights of a local folder, float32.

        Raises:
            AssetError: the weights are corrupt, or not those of this configuration.
        """
        options: dict[str, Any] = {} if self.keys is None else {"key_mapping": dict(self.keys)}
        try:
            with _quiet():
                net, report = self._network().from_pretrained(
                    folder,
                    config=self.config,
                    dtype=torch.float32,
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:  # a truncated file, other sizes, a pickle with foreign objects
            raise AssetError(f"{folder}: the weights cannot be read as {self.network} ({error})") from error
        missing = sorted(key for key in report["missing_keys"] if not self.forgives(net, key))
        if missing:
            raise AssetError(
                f"{folder}: not the weights of its config.json: {len(missing)} tensors of {self.network} are missing "
                f"({', '.join(missing[:5])}); fetch the checkpoint again"
            )
        return net

    def forgives(self, net: Any, key: str) -> bool:
        """Whether a checkpoint may leave out the parameter ``key``; what is left out is then not used."""
        del net
        return key.endswith("mask_token")  # only masked training reads it

    def _network(self) -> Any:
        return getattr(guest(), self.network)


def guest() -> Any:
    """The package transformers."""
    return require("transformers", "teachers")


def make_config(content: Mapping[str, Any], where: str) -> Any:
    """Transformers' configuration object from the content of a config.json.

    Raises:
        ConfigError: no ``model_type``, or one that this version of transformers does not know.
    """
    values = dict(content)
    kind = values.pop("model_type", None)
    mapping = guest().CONFIG_MAPPING
    if kind not in mapping:
        raise ConfigError(
            f"{where}: transformers {guest().__version__} knows no model of type {kind!r}"
            f"{nearest(str(kind), [name for name in mapping if name[:3] == str(kind)[:3]])}. A model of timm or "
            "OpenCLIP is named with `kind: timm` or `kind: open_clip`; a newer one may need a newer transformers"
        )
    try:
        return mapping[kind].from_dict(values)
    except Exception as error:  # each configuration refuses bad values in its own way
        raise ConfigError(f"{where}: config.json is no configuration of {kind}: {error}") from error


def side(value: Any, what: str) -> int:
    """One side of a square that a configuration states as a number, a pair or ``{height, width}``.

    Raises:
        ConfigError: it is not a square.
    """
    if isinstance(value, Mapping):
        value = tuple(value.values())
    sides = {int(each) for each in value} if isinstance(value, list | tuple) else {int(value)}
    if len(sides) != 1:
        raise ConfigError(f"the {what} of this model is {value}, not a square: it cannot be a teacher")
    return sides.pop()


def grid(tokens: Tensor, pixels: Tensor, patch: int, prefix: int = 0) -> Tensor:
    """Row-major tokens ``(B, prefix + h*w, C)`` of an image ``(B, 3, H, W)`` as a map ``(B, C, h, w)``.

    Raises:
        ConfigError: there are not that many tokens; the numbers are named, since a wrong prefix shifts every cell.
    """
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if tokens.shape[1] != prefix + height * width:
        raise ConfigError(
            f"{tokens.shape[1]} tokens are not {prefix} before a grid of {height}x{width}: the configuration does not "
            "describe these weights"
        )
    return tokens[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of the other half of a checkpoint, which is left unread on purpose."""
    verbosity = guest().logging
    before = verbosity.get_verbosity()
    bars = verbosity.is_progress_bar_enabled()
    verbosity.set_verbosity(logging.CRITICAL)
    verbosity.disable_progress_bar()
    try:
        yield
    finally:
        verbosity.set_verbosity(before)
        if bars:
            verbosity.enable_progress_bar()
