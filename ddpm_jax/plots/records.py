"""What a run has written of itself, read back: metrics, grids, evaluation, starts."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.errors import DataError, first_line

NAMES = "step", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "learning_rate"
SPEED = "images_per_second", "seconds_per_step"


def metrics(path):
    """{name: float64 (N,)} of the rows of a metrics.jsonl, NaN where a row has no value; None where there are no rows.

    A last line that is not finished, as a run leaves it that is at work or was killed, does not count. Raises DataError
    for any other damage.
    """
    path, rows, names = Path(path), [], (*NAMES, *SPEED)
    if not path.exists():
        return None
    *lines, _ = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rest = (row.get(name) for name in names[1:])
            rows.append([float(row["step"]), *(float("nan") if value is None else float(value) for value in rest)])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}, line {number} is damaged; delete that line") from error
    return dict(zip(names, np.array(rows).T, strict=True)) if rows else None


def starts(path):
    """What run.json tells of each start of a run; the mark that git puts on a revision becomes words."""
    found = _document(path, lambda starts: [(start["time"] + "", " ".join(start["argv"])) for start in starts])
    for start in found or ():
        if start.get("git"):
            start["git"] = re.sub("-dirty$", " with uncommitted changes", str(start["git"]))
    return found


def evaluation(path):
    """The report that evaluate.py has written."""

    def fits(report):
        for number in report["metrics"].values():
            float(number["value"]), float(number.get("real", number)["value"]), number["unit"] + ""
        curve = report["metrics"].get("nll", {"curve": {}})["curve"]
        np.array([curve[name] for name in ("t", "rate", "rmse") if curve], float)

    return _document(path, fits)


def _document(path, fits):
    """What a JSON file holds, None where there is none. Raises DataError where it, or `fits` of it, fails."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(errors="replace"))
        fits(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({first_line(error)}); take it away or write it anew") from error
    return found


def grid_files(folder, member=0):
    """[(step, path)] of all of the grids in a folder, in order; in that of an ensemble, of those of one `member`."""
    names = ((re.fullmatch(rf"step_(\d+)(_member_{member})?", path.stem), path) for path in folder.glob("step_*.png"))
    return sorted((int(name[1]), path) for name, path in names if name)


def grids(folder, member=0, most=6):
    """[(step, uint8 (H, W, 3))] of at most so many of the grids in a folder, evenly spread, with the first and last.

    They are picked from grid_files. Large ones are made smaller. Raises DataError for one that cannot be read.
    """
    found = grid_files(folder, member)
    picked = np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)
    return [(found[i][0], _picture(found[i][1])) for i in picked]


def _picture(path):
    try:
        with Image.open(path) as picture:
            picture.thumbnail((1200, 1200))
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow raises whatever a broken file brings about
        raise DataError(f"{path} cannot be read: {first_line(error)}; delete it") from error
