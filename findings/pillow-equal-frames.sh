#!/usr/bin/env bash
# Versions: Pillow 13.0.0.
#
# Behaviour: saving a film as GIF, APNG or WebP drops each frame that equals the one before and adds its time to the
# frame that stays. Six frames saved are three frames read.
#
# Why it defeats a good guess: save_all with append_images sounds like "these frames". A film of sampling repeats its
# last image to let the eye rest, or shows steps in which no 8-bit value changed; whoever reads it back and takes
# frame i for step i, or counts frames to check a film, gets another film.
#
# Do instead: take time from the frames' durations, not from their number; give one long duration to the last frame.
#
# Output seen, six frames of 100 ms of which the last four are equal:
#   GIF 3 frames, durations 100 100 400; APNG 3 frames, 100 100 400; WebP the same
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
"$folder/bin/python" -I -W ignore - <<'EOF'
import io
import sys

import numpy as np
import PIL
from PIL import Image

pictures = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 50, 100, 100, 100, 100)]


def film(kind):
    file = io.BytesIO()
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], duration=100)
    read = Image.open(file)
    durations = []
    for frame in range(read.n_frames):
        read.seek(frame)
        read.load()
        durations.append(int(read.info["duration"]))
    return durations


seen = {kind: film(kind) for kind in ("GIF", "PNG", "WEBP")}
print(f"Pillow {PIL.__version__}, durations of the frames in ms:", seen)
held = all(durations == [100, 100, 400] for durations in seen.values())
sys.exit(0 if held else "no longer as described at the top of this script")
EOF
