"""A model card (Mitchell et al. 2019) of a run from its own files: Markdown, with the front matter of Hugging Face."""

import re
from pathlib import Path

import numpy as np

from ddpm_jax import experiment
from ddpm_jax.commands.evaluate import METRICS
from ddpm_jax.plots import report
from ddpm_jax.run import log

FRONT = """---
library_name: ddpm_jax
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, jax]
---"""

PAPER = "[Ho et al. 2020](https://arxiv.org/abs/2006.11239)"

MARKS = [first * 10**power for power in range(2, 8) for first in (1, 2, 5)]  # steps of which the loss is told

LIMITS = """Made to draw images like those of its data, for study. Nothing was tested but what stands under Evaluation:
not bias, not fitness for any use. Samples can resemble training images; `evaluate --metrics=copies` measures how
often. The licence of the data, which is not known here, governs what may be done with the model and its samples too."""


def text(run, step, member, parts, data, grid, metrics, starts, evaluation):
    """The card of a run's folder (its `member`) at `step`; parts: its Experiment, data: fingerprint.

    grid: (step, path) of the last. The others are what records.py reads; each may be None. No path of this machine is
    in it: of one that begins with / or ~ only the last name is left, and such a folder of a run is spelled runs/NAME.
    """
    folder = Path("runs", report.name(run)) if run.is_absolute() else run
    train, sample, evaluate, _ = report.commands(folder, step, member, parts.config)
    picture = f"![Samples at step {grid[0]:,}](samples/{grid[1].name})" if grid else "There is no grid of samples yet."
    blocks = [FRONT, f"# {_escaped(report.name(run))}", picture, _model(parts, step)]
    blocks += ["## How to sample", "`--workdir` is the folder of this run:", _code(sample)]
    blocks += ["## Data", _data(parts.config.data, data)]
    blocks += ["## Training", *_training(parts.config.train, metrics, starts), "To train it again:", _code(train)]
    blocks += ["## Evaluation", *_evaluation(evaluation, evaluate)]
    blocks += ["## Config", "What differs from the defaults; `config.json` has all of it."]
    blocks += [_table(("field", "here", "default"), _short(report.changed(parts.config)))]
    return "\n\n".join([*blocks, "## Intended use and limits", LIMITS]) + "\n"


def _model(parts, step):
    names, classes = parts.config.diffusion, parts.config.model.num_classes
    size, schedule = "x".join(map(str, parts.shape)), "of own betas" if names.betas else names.schedule
    of_classes = f" of {classes:,} classes" if classes else ""
    if classes and parts.classes:
        of_classes += _escaped(f" ({', '.join(parts.classes[:20])}{', ...' * (len(parts.classes) > 20)})")
    return (
        f"A U-Net of {experiment.parameter_count(parts):,} parameters that makes images of {size} (height x width x "
        f"channels){of_classes} from noise: a denoising diffusion model ({PAPER}), at step {step:,}. Parameterization "
        f"{names.parameterization}, schedule {schedule}, T {names.T:,}, variance {names.variance}."
    )


def _data(config, fingerprint):
    split = f", split {config.split}" if config.source.startswith(("tfds:", "digits")) else ""
    known = "how many images is not known"
    if fingerprint:
        known = f"{int(fingerprint.split('x')[0]):,} images, fingerprint {fingerprint}"
    return _escaped(f"{_short(config.source)}{split}: {known}.")


def _training(train, metrics, starts):
    yield f"{train.steps:,} steps in all, each of {train.batch_size:,} images, seed {train.seed}. {_pace(metrics)}"
    begun = {}
    for start in _short(starts or []):
        told = {key: value for key, value in start.items() if key not in ("time", "argv") and value is not None}
        begun.setdefault(report.flat(told), []).append(start["time"])
    lines = [_escaped(f"- Started {', '.join(times)}: {told}") for told, times in begun.items()]
    yield "\n".join(lines) or "Where and when is not known: there is no `run.json`."
    if metrics:
        steps, losses = metrics["step"], metrics["loss"]
        rows = {*np.searchsorted(steps, [mark for mark in MARKS if mark <= steps[-1]]), len(steps) - 1}
        yield "The loss to expect at a step, as the log has it: the mean since its line before."
        yield _table(("step", "loss"), [(f"{steps[i]:,.0f}", f"{losses[i]:.4g}") for i in sorted(rows)])


def _pace(metrics):
    if metrics is None:
        return "There is no line in `metrics.jsonl` yet."
    seconds = metrics["seconds_per_step"] * np.diff(metrics["step"], prepend=0)
    timed = np.isfinite(seconds)
    if not timed.any():
        return "How long they take is not known."
    took, speed = log.format_duration(seconds[timed].sum()), np.median(metrics["images_per_second"][timed])
    return f"Those in the log took {took} (h:mm:ss), with {speed:,.0f} images/s in the median of its lines."


def _evaluation(evaluation, command):
    if evaluation is None:
        return ["Not evaluated: there is no `evaluation.json`. This writes one:", _code(command)]
    evaluation = _short(evaluation)
    rows, shared = report.measured(evaluation), report.of_all(evaluation)
    settings = [row[-1] for row in rows] or [{}]
    shared |= {key: value for key, value in settings[0].items() if all(each.get(key) == value for each in settings)}
    cells = []
    for metric, value, own, each in rows:
        special = {key: setting for key, setting in each.items() if shared.get(key) != setting}
        cells.append((metric, value, report.flat(own | special)))
    rest = f"Not measured is what this table has not; what can be: {', '.join(METRICS)}."
    return [_table(("metric", "value", "with"), cells), _escaped(f"All with {report.flat(shared)}."), rest]


def _short(tree):
    """A tree of JSON in which a path from / or ~, also behind = or :, is left with its last name."""
    if isinstance(tree, dict):
        return {key: _short(part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_short(part) for part in tree]
    return re.sub(r"(?s)(^|[=:])(~[^/]*)?/(.*/)?(?=.)", r"\1…/", tree) if isinstance(tree, str) else tree


def _escaped(text):
    """Text as Markdown shows it as it stands, in one line, also in a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", re.sub(r"[\r\n]+", " ", text))


def _code(text):
    return f"```sh\n{text}\n```"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
