"""The page of benchmarks.race: tables and grids from the JSON files of its runs."""

import json
import os
import shutil
import statistics
from pathlib import Path

from ddpm_jax.errors import writing
from ddpm_jax.run.files import write_atomic

HELD_OUT, TRAINING = "held-out images, half against half", "training images"
HEAD = """\
# Recipes at equal time

Which recipe makes the best pictures in the time that you have? Each recipe is trained in a process of its own for the
same time, from the start of the process to the last step. Compilation counts, sampling does not. Then it draws samples
with its own sampler, at the same number of evaluations of the network. `benchmarks.race` does this and writes this
page:

```sh
python -m benchmarks.race --data=digits --minutes=1 --recipes=digits,fashion_mnist_cpu --seeds=0,1,2
python -m benchmarks.race --report --page=docs/recipes.md
```

A recipe is a config in `configs/`. Changes follow a colon, as in
`"folder_cpu:train.learning_rate=1e-3;sample.sampler=ddim"`: options of the config, and options of `sample.py` after
`sample.`; `sample.guide=checkpoints/500` is a step of the run itself. Recipes that differ only in how they draw share
one training. `folder_cpu@DIR` is the config of another revision of this project, in the folder DIR. A race that was
interrupted resumes with the same command. [How the laptop preset was chosen](presets.md) has shorter runs.

Images to compare with are held out of the data at random, a fifth or `--held-out=N` of them, or come from
`--held-out=SOURCE`. Those that are training images too are left out. The emoji are those of [results](results.md#emoji)
without skin tones (`1f3fb` to `1f3ff` in the name of the file), 1,906 pictures.

The other projects' recipes need `--their-python=PATH`, a Python with torch and the project:

| recipe | what it is |
|---|---|
| `diffusers` | the network and the defaults of its `train_unconditional.py`, with EMA; DDPM |
| `diffusers_small` | the same defaults with the network of `configs/folder_cpu.py` |
| `diffusers_best` | that network, Adam at 1e-3, batches of 32, faster EMA; DDPM |
| `ddpm_pytorch` | the defaults of denoising-diffusion-pytorch's README and Trainer, with `dim=32`; DDIM |

They run on `--threads` threads of PyTorch. The cosine of diffusers' learning rate ends with the given time.
`diffusers_best:sampler=dpmpp` draws by DPM-Solver++, which does not clip its estimates there, and `sampler=ddim` by
DDIM: after ten minutes on the emoji, most pictures of the one were saturated and those of the other grey.

KID, Frechet distance, precision and recall compare the features ([ENL0-64](evaluation.md)) of the samples with those of
images that training has not seen. KID is 1000 times the squared MMD, the mean over random parts of the samples, at
least ten of them, each against all held-out images. Copies are samples nearer to a training image than 99 % of the
training images are to another, by pixels and by features. Means and spreads are those of the channels, in levels
0..255. images/s is the median over the training. The losses of recipes with other parameterizations cannot be compared;
the column has the loss after a quarter, a half and all of the steps. With several seeds a row is the mean over them,
and ± is its standard error; with one, ± is the error of KID from the number of samples.

Two rows are for real images. Held-out images are compared one half with the other. Training images are what a perfect
memory would draw: by every number but the copies they are the best samples.
"""
COLUMNS = "recipe", "KID-ENL0-64", "Frechet", "precision", "recall", "copies, pixels", "copies, features", "means"
COLUMNS += "spreads", "loss", "steps", "images/s", "minutes"


def write(out, page):
    """Write the page about all races in the folder `out`, and the grids beside it; the path of the page."""
    races = [json.loads(file.read_text()) | {"folder": file.parent} for file in sorted(out.glob("*/race.json"))]
    pictures = page.parent / page.stem
    with writing(f"--page={page}"):
        pictures.mkdir(parents=True, exist_ok=True)
        parts = [section(race, results(race["folder"]), pictures) for race in races]
        write_atomic(page, "\n".join([HEAD, *parts]).encode())
    return page


def results(folder):
    """{label: records of its seeds} of the race in a folder, best KID first."""
    found = {}
    for file in sorted(folder.glob("*/seed-*/result.json")):
        record = json.loads(file.read_text()) | {"folder": file.parent}
        found.setdefault(label(record), []).append(record)
    for records in found.values():
        records.sort(key=lambda record: record["seed"])
    return dict(sorted(found.items(), key=lambda item: average(item[1], "kid")[0]))


def label(record):
    """The recipe of a record, with the revision in place of a folder."""
    changes = ";".join(f"{name}={text}" for name, text in record["changes"].items())
    revision = f"@{record['revision'] or 'unknown'}" if record["clone"] else ""
    return record["name"] + revision + (f":{changes}" if changes else "")


def average(records, name):
    """(mean over the records, its standard error, or that of KID for a single record) of a metric."""
    values = [record["metrics"][name] for record in records]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return values[0], records[0]["metrics"].get(f"{name}_error")


def section(race, found, pictures):
    """The part of the page about one race; its grids are copied to the folder `pictures`."""
    rows = [row(name, [{"metrics": metrics}]) for name, metrics in race["references"].items()]
    rows += [row(f"`{name}`", records) for name, records in found.items()]
    grids = [("Held-out images", race["folder"] / "held_out.png")]
    for name, (first, *_) in found.items():
        grids.append((f"`{name}`, seed {first['seed']}, {first['sampling']}", first["folder"] / "grid.png"))
    lines = [f"## {race['name']}", "", describe(race, found), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}", *rows, ""]
    for number, (title, grid) in enumerate(grids):
        copy = pictures / f"{race['name']}-{number}.png"
        shutil.copyfile(grid, copy)
        lines += [f"{title}:", "", f"![{title.replace('`', '')}]({pictures.name}/{copy.name})", ""]
    return "\n".join(lines)


def describe(race, found):
    """What a race depends on, as one sentence."""
    settings, numbers = race["settings"], race["numbers"]
    records = [record for of_recipe in found.values() for record in of_recipe]
    source = race["data"]
    if race["held_out"] and not race["held_out"].isdigit():
        source += f" and {race['held_out']}"
    seeds = ", ".join(str(seed) for seed in sorted({record["seed"] for record in records})) or "none"
    texts = [
        f"{settings['minutes']:g} minutes on {source}: {numbers['train']:,} training images and "
        f"{numbers['held_out']:,} held-out images of {'x'.join(map(str, race['shape']))}",
        f"{settings['num']:,} samples by {settings['evaluations']} evaluations",
        f"seeds {seeds}",
        race["machine"],
        f"Python {race['python']}, jax {race['versions']['jax']}, revision {race['revision'] or 'unknown'}",
        *sorted({record["versions"] for record in records if record["peer"]}),
    ]
    return "; ".join(texts) + "."


def row(name, records):
    """A row of the table: the means over the records of one recipe, or the metrics of real images."""
    first = records[0]

    def mean(values, form="{:,.0f}"):
        values = [value for value in values if value is not None]
        return form.format(statistics.mean(values)) if values else ""

    def metric(name, form):
        value, error = average(records, name)
        return form.format(value) + ("" if error is None else " ± " + form.format(error))

    def levels(name):
        channels = (record["metrics"][name] for record in records)
        return ", ".join(f"{statistics.mean(values):.0f}" for values in zip(*channels, strict=True))

    cells = [metric("kid", "{:,.1f}"), metric("frechet", "{:,.1f}"), metric("precision", "{:.3f}")]
    cells += [metric("recall", "{:.3f}")]
    cells += [
        mean([record["metrics"][f"copies_{kind}"] for record in records], "{:.1%}") for kind in ("pixels", "features")
    ]
    cells += [levels("means"), levels("spreads")]
    if "steps" in first:
        cells += [
            losses(first["curve"]),
            *(mean([r[name] for r in records]) for name in ("steps", "images_per_second")),
        ]
        cells += [mean([record["seconds"] / 60 for record in records], "{:.2f}")]
    return f"| {' | '.join([name, *cells, *[''] * (len(COLUMNS) - 1 - len(cells))])} |"


def losses(curve):
    """The loss after a quarter, a half and all of the steps of a curve, a list of (step, loss)."""
    if not curve:
        return ""
    last = curve[-1][0]
    points = [min(curve, key=lambda point: abs(point[0] - share * last))[1] for share in (0.25, 0.5, 1)]
    return ", ".join(f"{loss:.4f}" for loss in points)


def describe_machine():
    """The processor and its cores, as text."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    except OSError:
        model = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model or 'an unknown processor'}"
