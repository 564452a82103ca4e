"""Small photographs-like files: smooth, coloured, and the same ones each time."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def picture(path: Path, generator: torch.Generator) -> None:
    """One file of 80x72 pixels (HxW)."""
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(80, 72), mode="bicubic").clamp(0, 1)[0]
    Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(path)


def write_images(folder: Path, count: int = 6) -> Path:
    """``count`` of them, ``0.png`` and on, in a new folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        picture(folder / f"{index}.png", generator)
    return folder
