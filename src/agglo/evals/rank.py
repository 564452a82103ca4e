"""Effective rank of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.evals._augment import rand_augment, random_crop
from agglo.evals._features import encode, summary_of
from agglo.evals._windows import Changed
from agglo.evals.base import SCENES_TRAIN, Backbone, Eval, EvalContext, FeatureError, ProbeError, input_size
from agglo.types import ConfigError

_EPS = 1e-7
_RIDGE = 1e-8
_ROUNDING = 1e-12
"""Relative rounding error of float64 means, with a margin: variation below counts as none."""


class Rank(Eval):
    """Effective rank of features without labels: RankMe and LiDAR, as in RADIO's SSL metrics.

    Both are the exponential of an entropy, ``exp(-sum p log p)`` with ``p = s / (sum s + 1e-7)`` over positive ``s``:
    the rank of k directions of equal strength is k.

    - ``rank_me`` (Garrido et al. 2023, arXiv:2210.02885): ``s`` are the singular values of the summaries, not centred;
      ``rank_me_spatial``: of all cells of all maps;
    - ``lidar`` (Thilak et al. 2024, arXiv:2312.04000): ``s`` are the eigenvalues of ``Sw^-1/2 Sb Sw^-1/2 + 1e-8 I``,
      with ``Sb`` the covariance of the image means over ``1 + views`` views of each, and
      ``Sw = cov(x - mean of its image) + 1e-8 I``. Features are scaled to a mean within-image channel variance of 1;
      otherwise the ridge would make the rank depend on their scale. Only the largest N - 1 eigenvalues count, the rank
      limit of ``Sb`` for N images. Views are random crops of at least half the area, with three operations of
      RandAugment at magnitude 9.

    A rank is at most the number of images (or cells) and the width, and grows with both: compare models on the same
    images only. RADIO's protocol is 1000 images, 99 views, 336 pixels. For a model without a summary the mean-pooled
    map is used.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        views: random views per image beside the plain one; 0 omits LiDAR.
        seed: of the views.
        source: of the images.
    """

    revision = 2

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 128,
        views: int = 9,
        seed: int = 0,
        source: Mapping[str, Any] = SCENES_TRAIN,
    ) -> None:
        if views < 0:
            raise ConfigError(f"evals.rank: views must be 0 or more, got {views}")
        self.size = size
        self.views = views
        self.seed = seed
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        plain = encode(
            model,
            self.source,
            self.size,
            context,
            want="summary" if model.spec.spatial is None else "spatial",
        )
        summary = summary_of(model, plain)
        found = {"rank_me": rank_me(summary)}
        if plain.spatial is not None:
            found["rank_me_spatial"] = rank_me(plain.spatial.permute(0, 2, 3, 1).flatten(0, 2))
        if self.views:
            stack, source, view = [summary], context.sources.open(self.source), input_size(model, self.size)
            for number in range(1, self.views + 1):
                context.report(f"view {number}/{self.views}")
                change, read = self._view(view, number), context.sources.reader(source)
                changed = Changed(source, change, f"view{number}", list(plain.index), read)
                again = encode(model, changed, self.size, context, want="summary", share=False).summary
                if again is None or len(again) != len(summary):
                    raise FeatureError(f"{type(model).__name__} returned no summary of view {number}")
                stack.append(again)
            found["lidar"] = lidar(unit_views(torch.stack(stack, 1)))
        return found

    def _view(self, size: tuple[int, int], number: int) -> Callable[[Image.Image, int], Image.Image]:
        def change(image: Image.Image, index: int) -> Image.Image:
            draw = np.random.default_rng([self.seed, number, index])
            return rand_augment(random_crop(image, size, draw), draw)

        return change


def smooth_rank(values: Tensor) -> float:
    """``exp(entropy)`` of the positive values of ``(k,)`` divided by their sum.

    Raises:
        ProbeError: no value is positive.
    """
    values = values.double()
    share = values[values > 0] / (values.sum() + _EPS)
    if not len(share):
        raise ProbeError("all features are zero: the rank is undefined")
    return float((-(share * share.log()).sum()).exp())


def rank_me(x: Tensor) -> float:
    """Smooth rank of the singular values of ``(n, D)``, in float64, by blocks of rows."""
    block = max(4096, 2 * x.shape[1])
    triangle = x.new_zeros(0, x.shape[1], dtype=torch.float64)
    for part in x.split(block):  # R of a QR has the singular values of all previous rows
        triangle = torch.linalg.qr(torch.cat((triangle, part.double())), mode="r").R
    return smooth_rank(torch.linalg.svdvals(triangle))


def unit_views(x: Tensor) -> Tensor:
    """``(N, V, D)`` in float64, scaled to a mean within-image channel variance of 1.

    If all views of each image are equal, the overall variance is scaled to 1 instead.

    Raises:
        ProbeError: all features are equal.
    """
    x = x.double()
    for mean in (x.mean(1, keepdim=True), x.mean((0, 1), keepdim=True)):
        variance = (x - mean).square().mean()
        if variance > (_ROUNDING * x.square().mean().sqrt()) ** 2:
            return x / variance.sqrt()
    raise ProbeError("the features of all images are the same: the rank is undefined")


def lidar(x: Tensor) -> float:
    """LiDAR of ``(N, V, D)``, N images with V views each; at most N - 1 and at most D.

    The ridge is absolute, as in RADIO's code: see :func:`unit_views`.

    Raises:
        ProbeError: fewer than two images or views.
    """
    if x.shape[0] < 2 or x.shape[1] < 2:
        raise ProbeError(f"LiDAR needs at least two images and two views per image, got {x.shape[0]} and {x.shape[1]}")
    x = x.double()
    means = x.mean(1)
    eye = torch.eye(x.shape[2], dtype=torch.float64)
    between = torch.cov(means.T).reshape(eye.shape)
    within = torch.cov((x - means[:, None]).flatten(0, 1).T).reshape(eye.shape) + _RIDGE * eye
    values, vectors = torch.linalg.eigh(within)
    root = vectors * values.clamp_min(_RIDGE).rsqrt() @ vectors.T
    strengths = torch.linalg.eigvalsh(root @ between @ root + _RIDGE * eye)
    return smooth_rank(strengths[-min(x.shape[0] - 1, x.shape[2]) :])  # the others come from the ridge
