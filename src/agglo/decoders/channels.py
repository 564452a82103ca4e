"""Which map of a model a segmentation decoder reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from agglo.config import nearest
from agglo.types import ConfigError, Features


def choose(
    heads: Mapping[str, int],
    own: int,
    head: str | None,
    accepted: Collection[int],
    where: str,
    usual: str | None = None,
) -> str:
    """Name of the head whose map has as many channels as a decoder takes; ``""`` for the model's own map.

    Args:
        heads: channels of each head's map; 0 for a head without one.
        own: channels of the model's own map, which is read if no head has a map.
        head: to read; None for the one head that fits.
        accepted: numbers of channels that the decoder takes.
        where: beginning of error messages.
        usual: head to prefer if several fit.

    Raises:
        ConfigError: an unknown head, no fitting one, or several.
    """
    if head is not None and head not in heads:
        raise ConfigError(f"{where}: the model has no head {head!r}{nearest(head, heads)}")
    takes = f"takes {' or '.join(map(str, sorted(accepted)))} channels"
    if head is not None:
        if heads[head] not in accepted:
            raise ConfigError(f"{where}: head {head!r} has {heads[head]} channels; the decoder {takes}")
        return head
    maps = {name: width for name, width in heads.items() if width} or {"": own}
    fitting = [name for name, width in maps.items() if width in accepted]
    if usual in fitting:
        return str(usual)
    if len(fitting) == 1:
        return fitting[0]
    had = ", ".join(f"{name or 'the model itself'} ({width})" for name, width in maps.items())
    raise ConfigError(
        f"{where}: the decoder {takes}, and {'several heads have' if fitting else 'none has'} them: {had}; set `head` "
        "to one that was distilled from the decoder's own encoder"
    )


def map_of(
    out: Features, head: str | None, accepted: Collection[int], where: str, usual: str | None = None
) -> Tensor | None:
    """The map ``(B, D, h, w)`` of an output that :func:`choose` selects; None if it has none."""
    heads: Mapping[str, Features] = getattr(out, "heads", None) or {}
    name = choose({key: _width(each) for key, each in heads.items()}, _width(out), head, accepted, where, usual)
    return heads[name].spatial if name else out.spatial


def _width(features: Features) -> int:
    return 0 if features.spatial is None else features.spatial.shape[1]
