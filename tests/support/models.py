"""A labelled source with known ground truth, and models that encode it, ignore it or break."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from agglo.sources.base import Source
from agglo.types import Features, FeatureSpec, ImageError, Output

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Squares(Source):
    """One coloured square on a grey gradient an image; depth (metres) is ``exp(grey)`` or a constant of the colour."""

    classes = tuple(COLOURS)

    def __init__(self, count: int = 9, seed: int = 0, side: int = 32, bad: tuple[int, ...] = ()) -> None:
        self.count, self.seed, self.side, self.bad = count, seed, side, bad
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"squares/{self.seed}/{index}"

    def label(self, index: int) -> int:
        return index % 3

    def query(self, index: int) -> str | None:
        return f"a {self.classes[self.label(index)]} square" if index < 6 else None

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        grey = np.tile(np.linspace(20, 120 + rng.integers(80), self.side).astype(np.uint8), (self.side, 1))
        image = np.repeat(grey[..., None], 3, 2)
        semantic = np.zeros((self.side, self.side), np.uint8)
        depth = np.exp(grey / 255.0).astype(np.float32)
        y, x = rng.integers(0, self.side // 2, 2)
        where = np.s_[y : y + self.side // 2, x : x + self.side // 2]
        c = self.label(index)
        image[where], semantic[where], depth[where] = COLOURS[self.classes[c]], c + 1, 1.5 + c
        return image, semantic, depth

    def read(self, index: int) -> Image.Image:
        self.reads += 1
        if index in self.bad:
            raise ImageError(self.name(index), "broken on purpose")
        return Image.fromarray(self.arrays(index)[0])

    def annotation(self, index: int) -> SimpleNamespace:
        _, semantic, depth = self.arrays(index)
        return SimpleNamespace(semantic=semantic, depth=depth)


def one_hot(images: Tensor) -> Tensor:
    """``(B, 5, H, W)``: background, red, green, blue as 0/1, and the background's grey."""
    r, g, b = images.unbind(1)
    background = ((r == g) & (g == b)).float()
    return torch.stack((background, *((c == 1).float() * (1 - background) for c in (r, g, b)), r * background), 1)


class Oracle(nn.Module):
    """Encodes the ground truth: the mask as spatial map at stride 1, the class as summary, colour words as text."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=3, spatial=5, stride=1)
        self.inner = nn.BatchNorm2d(3)
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Features:
        self.modes.append(self.inner.training)
        spatial = one_hot(images)
        return Features(spatial[:, 1:4].mean((2, 3)) * 7, spatial)

    def encode_image(self, images: Tensor) -> Tensor:
        summary = self(images).summary
        assert summary is not None
        return nn.functional.normalize(summary, dim=1)

    def encode_text(self, texts: list[str]) -> Tensor:
        found = torch.tensor([[float(name in text) for name in COLOURS] for text in texts])
        return nn.functional.normalize(found + 1e-3, dim=1)


class Noise(nn.Module):
    """Random features and no text tower."""

    def __init__(self, spatial: bool = True, summary: bool = True) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=8 if summary else None, spatial=4 if spatial else None, stride=8, step=8)
        self.calls = 0

    def forward(self, images: Tensor) -> Features:
        self.calls += 1
        rng = torch.Generator().manual_seed(int(images.double().sum() * 1000) % 2**31)
        b, _, h, w = images.shape
        summary = torch.randn(b, 8, generator=rng) if self.spec.summary else None
        spatial = torch.randn(b, 4, h // 8, w // 8, generator=rng) if self.spec.spatial else None
        return Features(summary, spatial)


class Broken(nn.Module):
    """Puts ``value`` into the features of the image at position ``at`` of every batch."""

    spec = FeatureSpec(summary=2, spatial=3, stride=8)

    def __init__(self, value: float, at: int, spatial: bool = False) -> None:
        super().__init__()
        self.value, self.at, self.spatial = value, at, spatial

    def forward(self, images: Tensor) -> Features:
        summary, spatial = torch.ones(len(images), 2), torch.ones(len(images), 3, 4, 4)
        (spatial if self.spatial else summary)[self.at].view(-1)[-1] = self.value
        return Features(summary, spatial)


class Student(nn.Module):
    """A model whose heads are functions of the image."""

    spec = FeatureSpec(summary=2, spatial=3, stride=4, step=4)

    def __init__(self, **heads: object) -> None:
        super().__init__()
        self.functions = heads

    def forward(self, images: Tensor) -> Output:
        return Output(images.mean((2, 3)), images, {name: f(images) for name, f in self.functions.items()})


def random_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator), 1.5 * torch.randn(shape, generator=generator)
