#!/usr/bin/env bash
# Versions: Pillow 13.0.0, NumPy 2.4.6, pypng 0.20220715.0 (which writes the files).
#
# Behaviour: of two 16-bit PNGs of the same gray ramp, the one in colour opens as RGB, scaled to 8 bits by dropping
# the low byte. The gray one opens as I;16 with all its bits, and convert("L") or convert("RGB") clips it at 255: all
# but the darkest 1/256 of the range turns white.
#
# Why it defeats a good guess: a file opened in colour shows that the library scales 16 bits to 8, so convert is
# expected to do so too. Both files give an 8-bit array of the right shape without a warning; medical and depth
# images, mostly gray, are the ones that lose everything.
#
# Do instead: for mode I;16, numpy.asarray(picture) // 257 (or >> 8) before any convert.
#
# Output seen, a ramp of 6 steps from 0 to 65535:
#   colour RGB 0 51 102 153 204 255; gray I;16, converted 0 255 255 255 255 255
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6 pypng==0.20220715.0
"$folder/bin/python" -I -W ignore - <<'EOF'
import io
import sys

import numpy as np
import PIL
import png
from PIL import Image

ramp = (np.arange(6) * 13107).astype(np.uint16)


def opened(greyscale):
    file = io.BytesIO()
    row = ramp if greyscale else ramp.repeat(3)
    png.Writer(6, 1, greyscale=greyscale, bitdepth=16).write(file, [row.tolist()])
    picture = Image.open(io.BytesIO(file.getvalue()))
    return picture.mode, np.asarray(picture.convert("RGB"))[0, :, 0].tolist()


colour, gray = opened(False), opened(True)
print(f"Pillow {PIL.__version__}: colour {colour}, gray {gray}")
held = colour == ("RGB", [0, 51, 102, 153, 204, 255]) and gray == ("I;16", [0, 255, 255, 255, 255, 255])
sys.exit(0 if held else "no longer as described at the top of this script")
EOF
