#!/usr/bin/env bash
# Pillow turns TIFF files upright by itself, and no other format
#
# Guess:    pixels are as stored until ImageOps.exif_transpose is called, whatever the format.
# Happens:  a TIFF with an orientation is opened with its upright size, is turned by load(), and loses the tag. JPEG,
#           PNG and WebP with the same orientation are as stored. A mask, box or key point that lies on the stored
#           pixels then fits the JPEG and not the TIFF.
# Way out:  read the orientation before load(), and turn a TIFF's pixels back where the stored ones are needed; or use
#           upright pixels everywhere: exif_transpose changes nothing in a TIFF that load() has turned.
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
import sys

import numpy as np
import PIL
from PIL import Image, ImageOps

print("Python", platform.python_version(), "- Pillow", PIL.__version__)

ORIENTATION = 274
# Left half black, right half white, 32 wide and 16 high; orientation 6 is shown turned by 90 degrees, 16 wide.
stored = np.zeros((16, 32, 3), np.uint8)
stored[:, 16:] = 255


def write(form):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = io.BytesIO()
    Image.fromarray(stored).save(file, form, exif=exif)
    file.seek(0)
    return file


BACK = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""The transposition of Pillow that undoes each orientation."""

for form, turned in (("JPEG", False), ("PNG", False), ("WEBP", False), ("TIFF", True)):
    with Image.open(write(form)) as image:
        before = image.size, image.getexif().get(ORIENTATION)
        image.load()
        after = image.size, image.getexif().get(ORIENTATION)
        upright = ImageOps.exif_transpose(image).size
        print(f"{form:4}: opened {before}, loaded {after}, exif_transpose {upright}")
        expected = (((16, 32), 6), ((16, 32), None)) if turned else (((32, 16), 6),) * 2
        if (before, after) != expected:
            sys.exit(f"The behaviour has changed: {form} is {before} when opened and {after} when loaded.")
        if upright != (16, 32):
            sys.exit(f"The way out fails: exif_transpose makes {form} {upright}.")

with Image.open(write("TIFF")) as image:
    orientation = image.tag_v2[ORIENTATION]
    back = np.asarray(image.convert("RGB").transpose(Image.Transpose(BACK[orientation])))
if not np.array_equal(back, stored):
    sys.exit("The way out fails: turned back, the TIFF's pixels are not the stored ones.")
print("As described: the TIFF is turned by load(), the others are not; turned back, it equals what was stored.")
PYTHON
