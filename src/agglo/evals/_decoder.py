"""Which of a model's features a segmentation decoder reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from agglo.config import nearest
from agglo.evals._features import check
from agglo.evals.base import FeatureError
from agglo.types import ConfigError, Features


def features_for(
    out: Features, head: str | None, widths: Collection[int], eval_name: str, image: str, usual: str | None = None
) -> Tensor:
    """The spatial map ``(1, D, h, w)`` float32 of the head that a decoder takes, or the model's own if it has no heads.

    Args:
        out: of a model, for one image.
        head: whose features; None: those of the one head that has such a width.
        widths: the channels that the decoder takes.
        eval_name: for messages.
        image: for messages.
        usual: the head that is meant where several fit.

    Raises:
        ConfigError: no such head, none that fits, or several.
        FeatureError: features that are not finite.
    """
    heads: Mapping[str, Features] = getattr(out, "heads", None) or {}
    if head is not None and head not in heads:
        raise ConfigError(f"evals.{eval_name}: the model has no head {head!r}{nearest(head, heads)}")
    known = {key: one.spatial for key, one in heads.items() if one.spatial is not None} or {"": out.spatial}
    takes = " or ".join(map(str, sorted(widths)))
    fitting = [key for key, one in known.items() if one is not None and one.shape[1] in widths]
    if usual in fitting:
        fitting = [usual]
    if head is None and len(fitting) != 1:
        had = ", ".join(f"{key or 'the model itself'} ({0 if m is None else m.shape[1]})" for key, m in known.items())
        raise ConfigError(
            f"evals.{eval_name}: the decoder takes {takes} channels, and "
            f"{'several heads have' if fitting else 'none has'} them: {had}; name one as `head`, of a teacher that is "
            "the decoder's own encoder"
        )
    features = known.get(fitting[0] if head is None else head)
    if features is None or features.shape[1] not in widths:
        raise ConfigError(
            f"evals.{eval_name}: head {head!r} has {0 if features is None else features.shape[1]} channels; "
            f"the decoder takes {takes}"
        )
    if check(features, "spatial", [image], 4) is None:
        raise FeatureError(f"{image}: no spatial features")
    return features.float()
