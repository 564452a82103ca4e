"""A folder of distinct photographs cut from those in the packages, and near duplicates of some of them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageEnhance

from agglo.config import build

GRIDS = {
    "astronaut": (4, 4), "brick": (1, 1), "camera": (4, 4), "cell": (2, 2), "chelsea": (3, 4), "china": (4, 5),
    "clock_motion": (2, 3), "coffee": (3, 4), "coins": (3, 4), "flower": (3, 4), "grass": (1, 1), "gravel": (1, 1),
    "hubble_deep_field": (1, 1), "ihc": (1, 1), "microaneurysms": (1, 1), "moon": (1, 1), "motorcycle_left": (4, 6),
    "page": (1, 2), "retina": (2, 2), "rocket": (3, 4), "text": (1, 3),
}  # fmt: skip
"""Photograph → rows and columns of its crops, which do not overlap."""

ALIKE = {
    "camera": "02 03", "cell": "01 10", "chelsea": "13 23", "china": "00 02 03 04 21 34",
    "clock_motion": "00 02 10 11 12", "coffee": "02", "coins": "01 02 03 10 11 12 20 21 22 23",
    "flower": "02 03 10 13 20 22", "motorcycle_left": "02", "page": "01", "retina": "01 10 11",
    "rocket": "02 03 10 12 22 23", "text": "01",
}  # fmt: skip
"""Crops, by row and column, that look like another one (sky, background, paper); without them, the summaries of
agglo-lite have cosine distances of at least 0.2."""


def write_photographs(folder: Path, most: int | None = None) -> list[Path]:
    """Write the crops as ``<photograph>_<row>_<column>.jpg``, at most ``most``; return their paths, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    source = build("sources", {"kind": "photos", "split": "all"})
    written = []
    for index in range(len(source)):
        name = source.name(index).rpartition("/")[2]
        rows, columns = GRIDS.get(name, (0, 0))
        image = source.read(index).convert("RGB") if rows else None
        for row in range(rows):
            for column in range(columns):
                if f"{row}{column}" in ALIKE.get(name, "").split():
                    continue
                assert image is not None
                width, height = image.width // columns, image.height // rows
                box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                written.append(folder / f"{name}_{row}_{column}.jpg")
                image.crop(box).save(written[-1], quality=95)
    for extra in written[most:] if most is not None else ():
        extra.unlink()
    return sorted(written[:most])


def write_near_duplicates(folder: Path, originals: list[Path]) -> dict[Path, Path]:
    """Near duplicates of each original: compressed, resized, brighter, copied in turn; copy → original."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, original in enumerate(originals):
        copy = folder / f"{original.stem}_again.jpg"
        with Image.open(original) as opened:
            image = opened.convert("RGB")
        if number % 4 == 0:
            image.save(copy, quality=85)
        elif number % 4 == 1:
            image.resize((image.width * 7 // 8, image.height * 7 // 8)).save(copy, quality=90)
        elif number % 4 == 2:
            ImageEnhance.Brightness(image).enhance(1.03).save(copy, quality=90)
        else:
            copy.write_bytes(original.read_bytes())
        found[copy] = original
    return found
