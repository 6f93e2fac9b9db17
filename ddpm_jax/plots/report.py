"""A self-contained HTML page of a run: pictures and curves are embedded, without scripts or links."""

import base64
import os
import re
import shlex
from html import escape
from string import Template

from ddpm_jax import config as configs
from ddpm_jax import options
from ddpm_jax.commands import prog_name
from ddpm_jax.plots.album import SECTIONS
from ddpm_jax.plots.figures import GRAY

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c1c1c; --page: #fff; --soft: #666; --line: #ccc; --box: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --page: #14161a; --soft: #a0a0a0; --line: #3c3f45; --box: #1e2127 }
}
body { max-width: 52rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page) }
h1, h2, td, figcaption { overflow-wrap: anywhere }
td + td { min-width: 10em }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
figure { margin: 1.5rem 0 }
figure > div, .wide { overflow-x: auto }
figure svg { width: 100%; min-width: 36rem; height: auto }
img { max-width: max(100%, 36rem); height: auto }
figcaption, p.note { color: var(--soft); font-size: .9rem }
table { border-collapse: collapse; width: 100%; min-width: 22rem; font-size: .9rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
pre { padding: .6rem; background: var(--box); overflow-x: auto; font-size: .85rem }
summary { cursor: pointer }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(run, step, member, config, parameters, plots, starts, evaluation):
    """The HTML of a run's folder (its `member`) at `step`; starts: run.json, evaluation: evaluation.json, or None."""
    body = [f"<p>{escape(_summary(step, config, parameters))}</p>"]
    for section in SECTIONS:
        body += [f"<h2>{section}</h2>", *(_figure(plot) for plot in plots if plot.section == section)]
    lines = commands(run, step, member, config)
    body.append(_evaluation(evaluation, lines[2]))
    body += ["<h2>Config</h2>", *_config(config), "<h2>Environment</h2>", *_starts(starts)]
    body += ["<h2>Commands</h2>", _code("\n".join(lines))]
    return PAGE.substitute(title=escape(run_name(run)), body="\n".join(body))


def commands(run, step, member, config):
    """The command lines that repeat a run's training, last grid, evaluation and plots.

    In an ensemble they are for one `member`, with its config; training is always of the whole ensemble.
    """
    which = [f"--member={member}"] if member else []
    train = config.train
    training = ["train", f"--config={run / 'config.json'}", f"--workdir=runs/{run_name(run)}-again"]
    grid = [f"--num={train.sample_num}", f"--seed={train.seed}", f"--sampler={train.sampler}"]
    grid = ["sample", f"--workdir={run}", f"--step={step}", *which, *grid, f"--steps={train.sample_steps}"]
    scripts = training, grid, ["evaluate", f"--workdir={run}", *which]
    lines = [[*prog_name(command).split(), *words] for command, *words in scripts]
    lines.append(["-m", "ddpm_jax.plots", str(run), *which, "--report"])
    return [shlex.join(["python", *words]) for words in lines]


def run_name(run):
    """The last part of the path of a run's folder, even if it is given as "."."""
    return os.path.basename(os.path.abspath(run))


def _summary(step, config, parameters):
    train = config.train
    return (
        f"{config.data.source}, {parameters:,} parameters, step {step:,} of {train.steps:,} with {train.batch_size} "
        f"images each, schedule {config.diffusion.schedule}"
    )


def _figure(plot):
    if plot.data is None:
        return f'<p class="note">{escape(plot.caption)}</p>'
    if plot.file.endswith(".svg"):
        shown = _svg(plot)
    else:
        kind, data = plot.file.rpartition(".")[-1], base64.b64encode(plot.data).decode()
        shown = f'<img src="data:image/{kind};base64,{data}" alt="{escape(plot.caption)}">'
    return f"<figure>\n<div>{shown}</div>\n<figcaption>{escape(plot.caption)}</figcaption>\n</figure>"


def _svg(plot):
    """An SVG for embedding: text in the page's colour, and ids that are unique in the page."""
    text, name = plot.data.decode(), plot.file.removesuffix(".svg")
    text = text[text.index("<svg") :].replace(GRAY, "currentColor")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(plot.caption)}"', 1)


def _evaluation(report, command):
    if report is None:
        return f'<p class="note">Not evaluated yet: {escape(command)}</p>'
    rows = [(metric, value, to_line(own | settings)) for metric, value, own, settings in metric_rows(report)]
    return _table(("metric", "value", "with"), [*rows, ("all metrics", "", to_line(common_settings(report)))])


def metric_rows(report):
    """[(metric, value as text, its other entries, settings)] of evaluation.json."""
    shown, rows = ("value", "standard_error", "unit", "real", "curve", "settings"), []
    for metric, number in report["metrics"].items():
        real = f" (real images {_value(number['real'])})" if "real" in number else ""
        own = {key: value for key, value in number.items() if key not in shown}
        rows.append((metric, f"{_value(number)} {number['unit']}{real}", own, number.get("settings", {})))
    return rows


def common_settings(report):
    """The entries of evaluation.json that apply to all metrics, without the run's config."""
    return {key: value for key, value in report.items() if key not in ("metrics", "config")}


def _value(number):
    error = number.get("standard_error")
    return f"{number['value']:.4f}" + ("" if error is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.4f}")


def to_line(value):
    """A tree of JSON as one line of text."""
    if isinstance(value, dict):
        parts = {key: f"({to_line(part)})" if isinstance(part, dict) else to_line(part) for key, part in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items())
    return f"{value:.6g}" if isinstance(value, float) else options.to_text(value)


def changed_fields(config):
    """[(field, value, default)] as text, of the fields that differ from the defaults."""
    differences = configs.differences(configs.Config(), config)
    return [(field, options.to_text(here), options.to_text(default)) for field, default, here in differences]


def _config(config):
    yield _details("Fields that differ from the defaults", _table(("field", "here", "default"), changed_fields(config)))
    yield _details("Full config", _code(configs.to_json(config)))


def _starts(starts):
    if not starts:
        yield '<p class="note">There is no run.json: the environment of the training is not known.</p>'
    for start in starts or ():
        rows = [(key, to_line(value)) for key, value in start.items() if key not in ("time", "argv")]
        command = _code(shlex.join(["python", *start["argv"]]))
        yield _details(f"Started {start['time']}", command + _table(("name", "value"), rows))


def _details(title, inside):
    return f"<details>\n<summary>{escape(title)}</summary>\n{inside}\n</details>"


def _code(text):
    return f"<pre><code>{escape(text)}</code></pre>"


def _table(head, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line(head, "th"), *(line(cells, "td") for cells in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
