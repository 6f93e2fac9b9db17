"""A model card (Mitchell et al. 2019) from the files of a run: Markdown with Hugging Face's front matter."""

import re
from pathlib import Path

import numpy as np

from ddpm_jax import experiment
from ddpm_jax.commands.evaluate import METRICS
from ddpm_jax.plots import report
from ddpm_jax.run import log

FRONT_MATTER = """---
library_name: ddpm_jax
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, jax]
---"""

PAPER = "[Ho et al. 2020](https://arxiv.org/abs/2006.11239)"

LOSS_STEPS = [first * 10**power for power in range(2, 8) for first in (1, 2, 5)]  # steps in the table of losses

LIMITS = """This model generates images like those of its data, for study. It was tested only as shown under Evaluation,
not for bias or for fitness for any use. Samples can resemble training images; `evaluate --metrics=copies` measures how
often. The licence of the data, which is not known here, also applies to the model and its samples."""


def text(run, step, member, parts, data, grid, metrics, starts, evaluation):
    """The card of a run's folder (its `member`) at `step`; parts: its Experiment, data: fingerprint.

    grid: (step, path) of the newest grid. The others are from records.py; each may be None. The card contains no path
    of this machine: a path that begins with / or ~ is reduced to its last part, such a run folder to runs/NAME.
    """
    folder = Path("runs", report.run_name(run)) if run.is_absolute() else run
    train, sample, evaluate, _ = report.commands(folder, step, member, parts.config)
    picture = f"![Samples at step {grid[0]:,}](samples/{grid[1].name})" if grid else "There is no grid of samples yet."
    blocks = [FRONT_MATTER, f"# {_escaped(report.run_name(run))}", picture, _model(parts, step)]
    blocks += ["## How to sample", "`--workdir` is the folder of this run:", _code(sample)]
    blocks += ["## Data", _data(parts.config.data, data)]
    blocks += ["## Training", *_training(parts.config.train, metrics, starts), "To repeat the training:", _code(train)]
    blocks += ["## Evaluation", *_evaluation(evaluation, evaluate)]
    blocks += ["## Config", "Fields that differ from the defaults; `config.json` has the full config."]
    blocks += [_table(("field", "here", "default"), _without_paths(report.changed_fields(parts.config)))]
    return "\n\n".join([*blocks, "## Intended use and limits", LIMITS]) + "\n"


def _model(parts, step):
    names, classes = parts.config.diffusion, parts.config.model.num_classes
    size, schedule = "x".join(map(str, parts.shape)), "with custom betas" if names.betas else names.schedule
    of_classes = f" of {classes:,} classes" if classes else ""
    if classes and parts.classes:
        of_classes += _escaped(f" ({', '.join(parts.classes[:20])}{', ...' * (len(parts.classes) > 20)})")
    return (
        f"A {experiment.describe_network(parts)} that generates images of {size} (height x width "
        f"x channels){of_classes} from noise: a denoising diffusion model ({PAPER}), at step {step:,}. "
        f"Parameterization {names.parameterization}, schedule {schedule}, T {names.T:,}, variance {names.variance}."
    )


def _data(config, fingerprint):
    split = f", split {config.split}" if config.source.startswith(("tfds:", "digits")) else ""
    size = "the number of images is not known"
    if fingerprint:
        size = f"{int(fingerprint.split('x')[0]):,} images, fingerprint {fingerprint}"
    return _escaped(f"{_without_paths(config.source)}{split}: {size}.")


def _training(train, metrics, starts):
    yield f"{train.steps:,} steps of {train.batch_size:,} images, seed {train.seed}. {_pace(metrics)}"
    times_of = {}
    for start in _without_paths(starts or []):
        settings = {key: value for key, value in start.items() if key not in ("time", "argv") and value is not None}
        times_of.setdefault(report.to_line(settings), []).append(start["time"])
    lines = [_escaped(f"- Started {', '.join(times)}: {settings}") for settings, times in times_of.items()]
    yield "\n".join(lines) or "Time and place are not known: there is no `run.json`."
    if metrics:
        steps, losses = metrics["step"], metrics["loss"]
        rows = {*np.searchsorted(steps, [step for step in LOSS_STEPS if step <= steps[-1]]), len(steps) - 1}
        yield "The loss to expect at a step: the mean since the previous line of the log."
        yield _table(("step", "loss"), [(f"{steps[i]:,.0f}", f"{losses[i]:.4g}") for i in sorted(rows)])


def _pace(metrics):
    if metrics is None:
        return "`metrics.jsonl` has no rows yet."
    seconds = metrics["seconds_per_step"] * np.diff(metrics["step"], prepend=0)
    timed = np.isfinite(seconds)
    if not timed.any():
        return "Their duration is not known."
    duration, speed = log.format_duration(seconds[timed].sum()), np.median(metrics["images_per_second"][timed])
    return f"The logged steps took {duration} (h:mm:ss), with a median of {speed:,.0f} images/s."


def _evaluation(evaluation, command):
    if evaluation is None:
        return ["Not evaluated: there is no `evaluation.json`. This writes one:", _code(command)]
    evaluation = _without_paths(evaluation)
    rows, shared = report.metric_rows(evaluation), report.common_settings(evaluation)
    settings = [row[-1] for row in rows] or [{}]
    shared |= {key: value for key, value in settings[0].items() if all(each.get(key) == value for each in settings)}
    cells = []
    for metric, value, own, each in rows:
        special = {key: setting for key, setting in each.items() if shared.get(key) != setting}
        cells.append((metric, value, report.to_line(own | special)))
    rest = f"Metrics that are not in this table were not measured; available: {', '.join(METRICS)}."
    return [
        _table(("metric", "value", "with"), cells),
        _escaped(f"Settings of all metrics: {report.to_line(shared)}."),
        rest,
    ]


def _without_paths(tree):
    """A tree of JSON in which paths from / or ~, also after = or :, are reduced to their last part."""
    if isinstance(tree, dict):
        return {key: _without_paths(part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without_paths(part) for part in tree]
    return re.sub(r"(?s)(^|[=:])(~[^/]*)?/(.*/)?(?=.)", r"\1…/", tree) if isinstance(tree, str) else tree


def _escaped(text):
    """Text escaped for Markdown, in one line, also for a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", re.sub(r"[\r\n]+", " ", text))


def _code(text):
    return f"```sh\n{text}\n```"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
