"""Draw the contact sheet of docs/scenes.md from an archive. Needs agglo and Pillow, not Mitsuba.

python benchmarks/scenes/contact.py -o docs/images/scenes.jpg
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agglo.sources.scenes import SceneAnnotation, Scenes

COLUMNS, PAIRS, GAP, LABEL = 10, 3, 4, 22
PAPER, INK = (250, 249, 246), (60, 60, 64)


def hue(k: int, count: int) -> tuple[int, int, int]:
    """A distinct colour for entry ``k`` of ``count``."""
    r, g, b = colorsys.hsv_to_rgb((k * 0.618) % 1 if count < 8 else k / count, 0.55 + 0.2 * (k % 2), 0.92)
    return int(255 * r), int(255 * g), int(255 * b)


def paint(mask: np.ndarray, count: int) -> np.ndarray:
    """``(H, W, 3)`` colours of a mask with values up to ``count``; the background is nearly black."""
    table = np.array([(34, 36, 42), *(hue(k, count) for k in range(count))], np.uint8)
    return table[mask]


def rows(source: Scenes, index: int, note: SceneAnnotation) -> dict[str, np.ndarray]:
    """The pictures of one view, top to bottom."""
    near, far = np.percentile(note.depth, [0.5, 99])
    depth = np.clip((far - note.depth) / (far - near), 0, 1)[..., None]
    ramp = np.array([30, 24, 72]) * (1 - depth) + np.array([255, 224, 150]) * depth
    facing = note.normals * np.array([1, -1, -1])[:, None, None]  # the usual colours: right red, up green, near blue
    return {
        "image": np.asarray(source.read(index)),
        "instances": paint(note.instances, 5),
        "semantics": paint(note.semantic, len(source.classes)),
        "depth": ramp.astype(np.uint8),
        "normals": ((facing.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8),
    }


def spread(source: Scenes, count: int) -> list[int]:
    """View-0 indices of different subjects over different backgrounds and lights."""
    chosen: list[int] = []
    looks: list[tuple[str, str]] = []
    labels: set[int] = set()
    for repeats in (0, 1, 2, 9):
        for index in range(0, len(source), 2):
            note = source.annotation(index)
            often = max(sum(look[k] == now for look in looks) for k, now in ((0, note.background), (1, note.light)))
            if len(chosen) < count and note.label not in labels and often <= repeats:
                chosen.append(index)
                labels.add(note.label)
                looks.append((note.background, note.light))
    return chosen


def pair_picture(source: Scenes, scene: int, zoom: float, lines: int = 14) -> Image.Image:
    """Both views of a scene side by side, with some of their correspondences."""
    pair = source.pairs()[scene]
    side = int(source.read(pair.first).width * zoom)
    image = Image.new("RGB", (2 * side + GAP, side), PAPER)
    for k, index in enumerate((pair.first, pair.second)):
        image.paste(source.read(index).resize((side, side), Image.Resampling.BICUBIC), (k * (side + GAP), 0))
    draw = ImageDraw.Draw(image)
    kept = np.random.default_rng(0).choice(len(pair.points), min(lines, len(pair.points)), replace=False)
    for k, ((x0, y0), (x1, y1)) in enumerate(pair.points[kept] * zoom):
        colour = hue(k, lines)
        draw.line([(x0, y0), (x1 + side + GAP, y1)], fill=colour, width=1)
        for x, y in ((x0, y0), (x1 + side + GAP, y1)):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour, outline=(255, 255, 255))
    return image


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the scenes benchmark.")
    parser.add_argument("-o", "--output", default="docs/images/scenes.jpg")
    parser.add_argument("--archive", help="an archive other than the bundled one")
    args = parser.parse_args()
    source = Scenes(split="all", path=args.archive)
    chosen = spread(source, COLUMNS)
    columns = [rows(source, index, source.annotation(index)) for index in chosen]
    side = columns[0]["image"].shape[0]
    width = LABEL + COLUMNS * (side + GAP)
    zoom = ((width - LABEL - (PAIRS - 1) * 2 * GAP) / PAIRS - 2 * GAP) / 2 / side
    top = len(columns[0]) * (side + GAP) + GAP
    sheet = Image.new("RGB", (width, top + int(side * zoom) + 2 * GAP), PAPER)
    font = ImageFont.load_default(13)

    def title(text: str, y: int, height: int) -> None:
        strip = Image.new("RGB", (height, LABEL), PAPER)
        ImageDraw.Draw(strip).text((height / 2, LABEL / 2), text, fill=INK, font=font, anchor="mm")
        sheet.paste(strip.rotate(90, expand=True), (0, y))

    for r, name in enumerate(columns[0]):
        title(name, GAP + r * (side + GAP), side)
        for c, column in enumerate(columns):
            sheet.paste(Image.fromarray(column[name]), (LABEL + c * (side + GAP), GAP + r * (side + GAP)))
    title("matches", top, int(side * zoom))
    for k, index in enumerate(spread(source, COLUMNS + PAIRS)[-PAIRS:]):
        picture = pair_picture(source, index // 2, zoom)
        sheet.paste(picture, (LABEL + k * (picture.width + 2 * GAP), top))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output, quality=90, optimize=True)


if __name__ == "__main__":
    main()
