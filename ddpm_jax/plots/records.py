"""Read the files of a run: metrics, grids, evaluation, starts."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.errors import DataError, first_line
from ddpm_jax.images import evenly_spaced

NAMES = "step", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "learning_rate"
SPEED = "images_per_second", "seconds_per_step"


def metrics(path):
    """{name: float64 (N,)} of the rows of a metrics.jsonl, NaN for missing values; None if there are no rows.

    Ignores an unfinished last line, which a running or killed process leaves. Raises DataError for any other damage.
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
    """The starts of a run from run.json; git's "-dirty" is spelled out."""
    found = _read_json(path, lambda starts: [(start["time"] + "", " ".join(start["argv"])) for start in starts])
    for start in found or ():
        if start.get("git"):
            start["git"] = re.sub("-dirty$", " with uncommitted changes", str(start["git"]))
    return found


def evaluation(path):
    """The report of evaluate.py."""

    def check(report):
        for number in report["metrics"].values():
            float(number["value"]), float(number.get("real", number)["value"]), number["unit"] + ""
        curve = report["metrics"].get("nll", {"curve": {}})["curve"]
        np.array([curve[name] for name in ("t", "rate", "rmse") if curve], float)

    return _read_json(path, check)


def _read_json(path, check):
    """The content of a JSON file, None if there is no file. Raises DataError if it is damaged or `check` fails."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(errors="replace"))
        check(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({first_line(error)}); delete it or write it again") from error
    return found


def grid_files(folder, member=0):
    """[(step, path)] of all grids in a folder, in order; for an ensemble, those of one `member`."""
    names = ((re.fullmatch(rf"step_(\d+)(_member_{member})?", path.stem), path) for path in folder.glob("step_*.png"))
    return sorted((int(name[1]), path) for name, path in names if name)


def grids(folder, member=0, limit=6):
    """[(step, uint8 (H, W, 3))] of at most `limit` evenly spaced grids of a folder, including the first and last.

    Large grids are scaled down. Raises DataError for an unreadable file.
    """
    found = grid_files(folder, member)
    return [(found[i][0], _picture(found[i][1])) for i in evenly_spaced(len(found), limit)]


def _picture(path):
    try:
        with Image.open(path) as picture:
            picture.thumbnail((1200, 1200))
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow raises anything for a damaged file
        raise DataError(f"{path} cannot be read: {first_line(error)}; delete it") from error
