"""DAMP: robustness to corruptions."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from claims.base import HOG, Claim, Means, Numbers, explained, held_out, student_maps, target_maps, trained


def _blur(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def _noise(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + 0.1 * torch.randn(images.shape, generator=generator).to(images.device)).clamp(0, 1)


def _jpeg(images: Tensor) -> Tensor:
    from agglo.preprocess import to_tensor

    found = []
    for image in images.cpu():
        stream = io.BytesIO()
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=10)
        found.append(to_tensor(Image.open(stream)))
    return torch.stack(found).to(images.device)


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "JPEG": _jpeg,
    "contrast": lambda images: 0.5 + 0.4 * (images - 0.5),
}


class Damp(Claim):
    """DAMP makes features robust: agreement with HOG's view of the clean image, from images with noise (0.1), blur
    (5 px), JPEG (quality 10) or low contrast (0.4). Goal: better on average at equal clean agreement."""

    CLEAN, MEAN = "agreement, clean", "agreement, mean of corruptions"
    arms = ("without", "sigma 0.1", "sigma 0.2")
    shown = (CLEAN, MEAN)
    judged = (MEAN,)

    def measure(self, arm: str, seed: int) -> Numbers:
        run = trained(seed, HOG, [] if arm == "without" else [f"train.damp={arm.removeprefix('sigma ')}"])
        images = held_out()
        target = target_maps(run, images, run.teachers["hog"], "hog")
        spoiled = {name: explained(student_maps(run, spoil(images), "hog"), target) for name, spoil in SPOIL.items()}
        return {
            self.CLEAN: explained(student_maps(run, images, "hog"), target),
            **{f"agreement, {name}": value for name, value in spoiled.items()},
            self.MEAN: statistics.mean(spoiled.values()),
        }

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = means["without"], means["sigma 0.1"]
        equal = with_it[self.CLEAN] >= without[self.CLEAN] - 0.01
        return equal and with_it[self.MEAN] > without[self.MEAN], (
            f"corrupted {without[self.MEAN]:.3f} to {with_it[self.MEAN]:.3f}, "
            f"clean {without[self.CLEAN]:.3f} to {with_it[self.CLEAN]:.3f} (sigma 0.1)"
        )
