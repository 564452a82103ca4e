#!/usr/bin/env bash
# Pillow does not scale the transparent level of a grey PNG with its pixels
#
# Guess:    convert("RGBA") makes the level in the tRNS chunk transparent, at any depth.
# Happens:  info["transparency"] remains the stored number, and convert() compares it with pixels that were spread over
#           0 to 255 (2 and 4 bits) or clipped to 255 (16 bits). Level 3 of 15 or 1000 of 65535 makes no pixel
#           transparent; level 255 of 65535 makes all brighter pixels transparent. Files of 1 and 8 bits are right.
# Way out:  compare stored values: multiply the level by 85 or 17 (2 and 4 bits), or compare it with the 16-bit pixels
#           before convert().
# Versions: Pillow 13.0.0, NumPy 2.4.6, Python 3.11
# Date:     2026-11-30

set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6 ||
    { echo "the packages cannot be installed: the behaviour was not tested" >&2; exit 2; }

"$folder/venv/bin/python" - <<'PYTHON'
import io
import platform
import struct
import sys
import zlib

import numpy as np
import PIL
from PIL import Image

print("Python", platform.python_version(), "- Pillow", PIL.__version__)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, depth, colour=0, extra=b""):
    """A PNG file of one row; colour 0 is grey, 3 a palette; `extra` goes before the pixels."""
    bits = "".join(format(value, f"0{depth}b") for value in values)
    bits += "0" * (-len(bits) % 8)
    row = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", len(values), 1, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


FACTORS = {"1": 255, "L;2": 85, "L;4": 17}
"""What Pillow multiplies by, for each raw mode."""


def transparent(file, level):
    """Where the stored value equals the level."""
    with Image.open(file) as image:
        factor = FACTORS.get(image.tile[0].args, 1)  # load() empties `tile`
        pixels = np.asarray(image).astype(int)
        return pixels * (255 if image.mode == "1" else 1) == level * factor


cases = [  # depth, values, transparent level, values that convert("RGBA") makes transparent
    (1, [0, 1], 1, [1]),
    (2, [0, 1, 2, 3], 3, []),
    (4, [0, 1, 3, 15], 3, []),
    (8, [0, 3, 51, 255], 3, [3]),
    (16, [0, 255, 1000, 65535], 1000, []),
    (16, [0, 255, 1000, 65535], 255, [255, 1000, 65535]),
]
for depth, values, level, expected in cases:
    file = png(values, depth, 0, chunk(b"tRNS", struct.pack(">H", level)))
    with Image.open(file) as image:
        alpha = np.asarray(image.convert("RGBA"))[0, :, 3]
    found = [value for value, opacity in zip(values, alpha, strict=True) if opacity == 0]
    print(f"{depth:2} bits, values {values}: level {level} is transparent; convert makes {found} transparent")
    if found != expected:
        sys.exit(f"The behaviour has changed: {depth} bits, level {level}: {found} are transparent, not {expected}.")
    file.seek(0)
    if [value for value, hit in zip(values, transparent(file, level)[0], strict=True) if hit] != [level]:
        sys.exit(f"The way out fails: with {depth} bits, comparing stored values does not find level {level}.")
print("As described: right for 1 and 8 bits, wrong for 2, 4 and 16; comparing stored values is right for all.")
PYTHON
