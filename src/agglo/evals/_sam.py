"""The map of a model that a segmentation decoder reads, checked for an eval."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from agglo.decoders.channels import map_of
from agglo.evals._features import check
from agglo.evals.base import FeatureError
from agglo.types import Features


def features_for(
    out: Features, head: str | None, widths: Collection[int], eval_name: str, image: str, usual: str | None = None
) -> Tensor:
    """The map ``(1, D, h, w)`` float32 of one image; see :func:`agglo.decoders.channels.choose`.

    Raises:
        ConfigError: an unknown head, no fitting one, or several.
        FeatureError: features that are not finite.
    """
    features = map_of(out, head, widths, f"evals.{eval_name}", usual)
    if features is None or check(features, "spatial", [image], 4) is None:
        raise FeatureError(f"{image}: no spatial features")
    return features.float()
