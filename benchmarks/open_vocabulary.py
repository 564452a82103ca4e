"""mIoU of masks from words without a segmentation decoder: plain similarity and its training-free refinements.

    python benchmarks/open_vocabulary.py scenes --images 40
    python benchmarks/open_vocabulary.py camvid --path DIR --images 24

Every variant runs on the same images at the same input size. On `scenes`, pixels outside objects compete as
"background", "floor" and "wall"; on CamVid they are not scored. `chance` is the expected mIoU of
uniformly drawn classes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

import agglo
from agglo.config import build
from agglo.decoders.dense import text_scores
from agglo.evals.segmentation import confusion, miou

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"affinity": None, "centre": 0.0},
    "affinity": {"affinity": 0.1, "centre": 0.0},
    "affinity, centre 0.5": {},
    "affinity, centre 0.9": {"centre": 0.9},
}
BACKGROUND = ["background", "floor", "wall"]


def labels(scores: Tensor, classes: int) -> Tensor:
    """Class 1 to K of each pixel; 0 where a background text has the highest score."""
    best = scores.argmax(0)
    return torch.where(best < classes, best + 1, 0)


def chance(matrix: Tensor) -> float:
    """Expected mIoU of a class drawn uniformly at each pixel, over the classes that occur."""
    share = matrix.sum(1) / matrix.sum()
    share = share[share > 0]
    draw = 1 / len(share)
    return float((share * draw / (share + draw - share * draw)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("scenes", "camvid"))
    parser.add_argument("--path", help="folder of CamVid")
    parser.add_argument("--model", default="agglo-lite")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--size", type=int, default=448)
    given = parser.parse_args()
    options = {"kind": "scenes", "split": "test"} if given.source == "scenes" else {"kind": "camvid", "split": "val"}
    source: Any = build("sources", options | ({"path": given.path} if given.path else {}))
    names, rest = list(source.classes), BACKGROUND if given.source == "scenes" else []
    model = agglo.load(given.model)
    found: dict[str, Tensor] = {}
    for index in np.linspace(0, len(source) - 1, min(given.images, len(source))).astype(int).tolist():
        truth = torch.as_tensor(np.asarray(source.annotation(index).semantic)).long()
        if not rest:
            truth = torch.where(truth == 0, 255, truth)
        for name, keys in VARIANTS.items():
            with torch.inference_mode():
                scores = text_scores(model, source.read(index), [*names, *rest], size=given.size, **keys)
            matrix = confusion(truth, labels(scores, len(names)), len(names) + 1)
            found[name] = found.get(name, torch.zeros_like(matrix)) + matrix
    print(f"{given.model}, {given.source}, longer side {given.size} px: mIoU in %")
    for name, matrix in found.items():
        print(f"{name:22} {100 * miou(matrix):5.1f}")
    print(f"{'chance':22} {100 * chance(found['plain']):5.1f}")


if __name__ == "__main__":
    main()
