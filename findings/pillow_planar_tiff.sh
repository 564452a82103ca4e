#!/usr/bin/env bash
# Pillow decodes some TIFF layouts to other pixels, without an error
#
# Guess:    Image.open and load() return the stored pixels of a TIFF file or raise.
# Happens:  two valid layouts decode to other pixels, without an error or a warning:
#           - uncompressed 16-bit RGB with separate planes (PlanarConfiguration 2): each byte is read as one value;
#           - compressed big-endian float32 grey: the bytes of each value are swapped.
#           The same pixels interleaved, in little-endian order or uncompressed (float32) decode correctly.
# Way out:  read the tags before load() (258 bits, 284 planes, 259 compression, and tag_v2.prefix, the byte order), and
#           decode such files with tifffile, or refuse them.
# Versions: Pillow 13.0.0, tifffile 2026.3.3, NumPy 2.4.6, Python 3.11
# Date:     2026-11-30

set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6 ||
    { echo "the packages cannot be installed: the behaviour was not tested" >&2; exit 2; }

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import platform
import sys
import warnings

import numpy as np
import PIL
import tifffile
from PIL import Image

PATH = sys.argv[1] + "/image.tif"
BITS, COMPRESSION, PLANES = 258, 259, 284
warnings.simplefilter("error")  # a warning would be a changed behaviour

print("Python", platform.python_version(), "- Pillow", PIL.__version__, "- tifffile", tifffile.__version__)


def decode(name, pixels, **layout):
    """Return whether Pillow's pixels equal tifffile's, and whether the tags show the layout before load()."""
    tifffile.imwrite(PATH, pixels, **layout)
    stored = tifffile.imread(PATH)
    if not np.array_equal(stored, pixels):
        sys.exit(f"{name}: tifffile does not read what it wrote")
    if pixels.ndim == 3 and layout["planarconfig"] == "separate":
        stored = np.moveaxis(stored, 0, -1)
    try:
        with Image.open(PATH) as image:
            tags, order = image.tag_v2, image.tag_v2.prefix
            bits = max(tags[BITS])
            planar = tags.get(PLANES, 1) == 2 and bits > 8
            swapped = order == b"MM" and tags[COMPRESSION] != 1 and bits > 8
            decoded = np.asarray(image)
    except Exception as error:
        sys.exit(f"{name}: Pillow no longer decodes this layout silently: {error!r}")
    if decoded.dtype == np.uint8:  # Pillow has 8 bits per channel for RGB
        expected = stored // 257
        equal = bool((abs(decoded.astype(int) - expected) <= 1).all())
    else:
        expected = stored
        equal = np.array_equal(decoded, expected)
    print(f"\n{name}\n  tifffile {expected[0].tolist()}\n  Pillow   {decoded[0].tolist()}")
    print(f"  {'equal' if equal else 'DIFFERENT'}; by its tags, use {'tifffile' if planar or swapped else 'Pillow'}")
    return equal, planar or swapped


colours = 257 * np.array([[[10, 20, 30], [40, 50, 60], [70, 80, 90]]] * 2, np.uint16)  # (2, 3, RGB)
planes = np.moveaxis(colours, -1, 0)
grey = np.array([[0.25, 0.5, 1.0, 2.0]] * 2, np.float32)
rgb = {"photometric": "rgb", "byteorder": "<"}
deflate = {"photometric": "minisblack", "compression": "zlib"}

found = {
    "planar": decode("16-bit RGB, separate planes", planes, planarconfig="separate", **rgb),
    "interleaved": decode("16-bit RGB, interleaved", colours, planarconfig="contig", **rgb),
    "big": decode("float32, deflate, big-endian", grey, byteorder=">", **deflate),
    "little": decode("float32, deflate, little-endian", grey, byteorder="<", **deflate),
    "raw": decode("float32, uncompressed, big-endian", grey, photometric="minisblack", byteorder=">"),
}
print()
for name in ("interleaved", "little", "raw"):
    if found[name] != (True, False):
        sys.exit(f"The behaviour has changed: the control '{name}' no longer decodes to the stored pixels.")
for name in ("planar", "big"):
    if found[name][0]:
        sys.exit(f"The behaviour has changed: the layout '{name}' now decodes to the stored pixels.")
    if not found[name][1]:
        sys.exit(f"The way out fails: the tags of the layout '{name}' do not show it.")
print("As described: both layouts decode to other pixels without an error, and their tags show it before load().")
PYTHON
