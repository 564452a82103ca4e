#!/usr/bin/env bash
# Pillow spreads grey PNG files of 2 and 4 bits over 0 to 255
#
# Guess:    a mask stored as a grey PNG of 2 or 4 bits decodes to its class numbers, as an 8-bit or a palette PNG does.
# Happens:  the mode is "L" and each value is multiplied by 85 (2 bits) or 17 (4 bits): class 3 of a 2-bit mask becomes
#           255, which often marks ignored pixels. After load() nothing records the original depth.
# Way out:  before load(), image.tile[0].args is the raw mode ("L;2", "L;4"); divide by 85 or 17.
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


FACTORS = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies by, for each raw mode."""


def class_numbers(file):
    """The stored values of a grey or palette PNG."""
    with Image.open(file) as image:
        factor = FACTORS.get(image.tile[0].args, 1)  # load() empties `tile`
        return np.asarray(image) // factor


palette = chunk(b"PLTE", bytes(range(12)))
cases = [  # name, values, depth, colour, extra, factor
    ("grey, 2 bits", [0, 1, 2, 3], 2, 0, b"", 85),
    ("grey, 4 bits", [0, 1, 2, 3, 15], 4, 0, b"", 17),
    ("grey, 8 bits", [0, 1, 2, 3, 15], 8, 0, b"", 1),
    ("palette, 2 bits", [0, 1, 2, 3], 2, 3, palette, 1),
]
for name, values, depth, colour, extra, factor in cases:
    with Image.open(png(values, depth, colour, extra)) as image:
        raw = image.tile[0].args
        decoded = np.asarray(image)[0].tolist()
        mode, left = image.mode, image.tile
    print(f"{name:16} stored {values}  decoded {decoded}  mode {mode}  raw mode {raw}, after load() {left}")
    if decoded != [value * factor for value in values]:
        sys.exit(f"The behaviour has changed: {name} no longer decodes to the stored values times {factor}.")
    if class_numbers(png(values, depth, colour, extra))[0].tolist() != values:
        sys.exit(f"The way out fails: the raw mode {raw} does not give back the stored values of {name}.")
print("As described: 2 and 4 bits are spread over 0 to 255, and the raw mode gives the stored values back.")
PYTHON
