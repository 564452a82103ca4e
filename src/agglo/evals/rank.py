"""How many dimensions do features really use?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.evals._augment import rand_augment, random_crop
from agglo.evals._features import encode
from agglo.evals._windows import Changed
from agglo.evals.base import SCENES_TRAIN, Backbone, Eval, EvalContext, FeatureError, ProbeError, input_size
from agglo.types import ConfigError

_EPS = 1e-7
_RIDGE = 1e-8
_ROUNDING = 1e-12
"""Of float64 means, relative to what they are of, with room to spare: variation below is none."""


class Rank(Eval):
    """Effective ranks of features, without labels: RankMe and LiDAR (as in RADIO's SSL metrics).

    Both are the exponential of an entropy, ``exp(-sum p log p)`` with ``p = s / (sum s + 1e-7)`` over positive ``s``: k
    directions of equal strength have rank k.

    - ``rank_me`` (Garrido et al. 2023): ``s`` are the singular values of the summaries, not centred;
      ``rank_me_spatial`` the same of all cells of all maps;
    - ``lidar`` (Thilak et al. 2024): ``s`` are the eigenvalues of ``Sw^-1/2 Sb Sw^-1/2 + 1e-8 I``, with ``Sb`` the
      covariance of the images' means over ``1 + views`` views of each, and ``Sw = cov(x - its image's mean) + 1e-8 I``,
      of features in units in which the mean variance of a channel within an image is 1: without that, the ridge makes
      features of another scale another rank. Only as many eigenvalues count as ``Sb`` can have, the images less one.
      The views are random crops of half the area or more, with three operations of RandAugment at magnitude 9.

    A rank is at most the number of images (or cells) and at most the width, and grows with both: compare models on the
    same images only. RADIO's protocol is 1000 images, 99 views, 336 pixels. A model without a summary is measured by
    its mean-pooled map.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        views: random views of each image beside the plain one; 0 leaves LiDAR out.
        seed: of the views.
        source: the images.
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
            raise ConfigError(f"evals.rank: views is 0 or more, got {views}")
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
        if plain.summary is None:
            raise FeatureError(f"{type(model).__name__} returned neither a summary nor a spatial map")
        found = {"rank_me": rank_me(plain.summary)}
        if plain.spatial is not None:
            found["rank_me_spatial"] = rank_me(plain.spatial.permute(0, 2, 3, 1).flatten(0, 2))
        if self.views:
            stack, source, view = [plain.summary], context.sources.open(self.source), input_size(model, self.size)
            for number in range(1, self.views + 1):
                context.report(f"view {number}/{self.views}")
                changed = Changed(source, self._view(view, number), f"view{number}", list(plain.index))
                again = encode(model, changed, self.size, context, want="summary", share=False).summary
                if again is None or len(again) != len(plain.summary):
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
    """``exp(entropy)`` of positive numbers ``(k,)`` divided by their sum.

    Raises:
        ProbeError: none is positive.
    """
    values = values.double()
    share = values[values > 0] / (values.sum() + _EPS)
    if not len(share):
        raise ProbeError("all features are zero: they have no rank")
    return float((-(share * share.log()).sum()).exp())


def rank_me(x: Tensor) -> float:
    """Smooth rank of the singular values of ``(n, D)``, in float64, a block of rows at a time."""
    block = max(4096, 2 * x.shape[1])
    triangle = x.new_zeros(0, x.shape[1], dtype=torch.float64)
    for part in x.split(block):  # the triangle of a QR has the singular values of all rows before it
        triangle = torch.linalg.qr(torch.cat((triangle, part.double())), mode="r").R
    return smooth_rank(torch.linalg.svdvals(triangle))


def unit_views(x: Tensor) -> Tensor:
    """``(N, V, D)`` in float64, divided so that the mean variance of a channel within an image is 1.

    Where all views of each image are the same, it is the variance over everything that becomes 1.

    Raises:
        ProbeError: all features are the same.
    """
    x = x.double()
    for mean in (x.mean(1, keepdim=True), x.mean((0, 1), keepdim=True)):
        variance = (x - mean).square().mean()
        if variance > (_ROUNDING * x.square().mean().sqrt()) ** 2:
            return x / variance.sqrt()
    raise ProbeError("the features of all images are the same: they have no rank")


def lidar(x: Tensor) -> float:
    """LiDAR of ``(N, V, D)``: N images, V views of each; at most N - 1 and at most D.

    The ridge is absolute, as in RADIO's arithmetic: see :func:`unit_views`.

    Raises:
        ProbeError: fewer than two images or views.
    """
    if x.shape[0] < 2 or x.shape[1] < 2:
        raise ProbeError(f"LiDAR needs two images and two views of each at least, got {x.shape[0]} and {x.shape[1]}")
    x = x.double()
    means = x.mean(1)
    eye = torch.eye(x.shape[2], dtype=torch.float64)
    between = torch.cov(means.T).reshape(eye.shape)
    within = torch.cov((x - means[:, None]).flatten(0, 1).T).reshape(eye.shape) + _RIDGE * eye
    values, vectors = torch.linalg.eigh(within)
    root = vectors * values.clamp_min(_RIDGE).rsqrt() @ vectors.T
    strengths = torch.linalg.eigvalsh(root @ between @ root + _RIDGE * eye)
    return smooth_rank(strengths[-min(x.shape[0] - 1, x.shape[2]) :])  # all others are the ridge's alone
