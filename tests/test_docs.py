"""The pages: links lead somewhere, commands and names exist, code runs, the reference is whole, the site builds."""

import ast
import contextlib
import importlib
import inspect
import itertools
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, make_run

import ddpm_jax
from ddpm_jax import config, data, diffusion, options, parallel, samplers
from ddpm_jax.commands import sample

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
PAGES = {name: path.read_text() for name, path in PAGES.items() if "_build" not in name}
FENCE = re.compile(r"(?ms)^```+(.*?)\n(.*?)^```+$")
MODULES = [module.name for module in pkgutil.walk_packages(ddpm_jax.__path__, "ddpm_jax.")]
MODULES = [name for name in MODULES if not name.endswith("__main__")]
COMMANDS = {  # as they are typed: the module that has their options
    **{f"{name}.py": f"ddpm_jax.commands.{name}" for name in ("train", "sample", "evaluate")},
    "-m ddpm_jax": "ddpm_jax.__main__",
    **{f"-m ddpm_jax.{name}": f"ddpm_jax.{name}.__main__" for name in ("data", "run", "plots", "schedules", "interop")},
    "-m benchmarks": "benchmarks.__main__",
    **{f"-m benchmarks.{name}": f"benchmarks.{name}" for name in ("checkpoints", "convolutions", "ensemble", "growth")},
    **{f"-m benchmarks.{name}": f"benchmarks.{name}" for name in ("maps", "nets", "networks", "peers", "race")},
    **{f"-m benchmarks.{name}": f"benchmarks.{name}" for name in ("samplers", "scale", "variants")},
}


def prose(text):
    return FENCE.sub("", text)


def blocks(text, *languages):
    return [body for language, body in FENCE.findall(text) if language.strip() in languages]


def codes(text):
    """What stands in code letters."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def anchors(text):
    """Of the headings, as code hosts and MyST make them."""
    titles = re.findall(r"(?m)^#+ (.*)$", prose(text))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        assert ROOT in there.resolve().parents, f"{page}: {target}"
        if anchor:
            assert anchor in anchors(there.read_text()), f"{page}: {target}"


def test_each_page_is_in_one_table_of_contents():
    listed = []
    for page in ("docs/index.md", "docs/results.md", "docs/reference/index.md"):
        folder = (ROOT / page).parent.relative_to(ROOT)
        for body in blocks(PAGES[page], "{toctree}"):
            listed += [f"{folder}/{line}.md" for line in body.split("\n") if line and line[0] != ":"]
    assert sorted(listed) == sorted(page for page in PAGES if page not in ("README.md", "docs/index.md"))


def commands(text):
    """The words after python of each command in the page's blocks for the shell, and of those in code letters."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").split("\n")
    lines += [code for code in codes(text) if re.match(r"python (-m )?\w", code)]
    for line in lines:
        inside = re.search(r'--command="(.*)"', line)
        lexer = shlex.shlex(inside[1] if inside else line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        while "python" in words:
            words = words[words.index("python") + 1 :]
            yield list(itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), words))


class Parsed(Exception):
    pass


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_typed(page, monkeypatch):
    """Each is given to its script, which is stopped when the options have been read and checked."""
    read, load = options.parse, config.load

    def stop(*args, **kwargs):
        raise Parsed(read(*args, **kwargs))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(options, "parse", stop)
    monkeypatch.setattr(config, "load", lambda path: config.Config() if "runs/" in path else load(path))
    for script, *words in commands(PAGES[page]):
        name = f"-m {words.pop(0)}" if script == "-m" else script
        assert name in COMMANDS, f"{page}: {name}"
        words = [re.sub(r"=N$", "=1", word) for word in words]
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises((Parsed, SystemExit)) as stopped:
            importlib.import_module(COMMANDS[name]).main()
        assert stopped.type is Parsed or words == ["--help"], f"{page}: {name} {words}"


def known_options():
    modules = [importlib.import_module(name) for name in COMMANDS.values()]
    classes = [thing for module in modules for thing in vars(module).values() if inspect.isclass(thing)]
    of_scripts = [
        field.name for cls in classes if issubclass(cls, options.Arguments) for field, _ in options.fields(cls)
    ]
    return {name.replace("_", "-") for name in of_scripts} | {f"config.{name}" for name in fields()} | {"help"}


def fields():
    return {name for name, _, _, _ in options.leaves(config.Config, config.Config())}


@pytest.mark.parametrize("page", PAGES)
def test_options_and_names_in_the_text_exist(page):
    """`--name`, `section.field` of the config, and `module.name` of the library."""
    known, modules = known_options(), {name.removeprefix("ddpm_jax.") for name in MODULES}
    for code in codes(PAGES[page]):
        for name in re.findall(r"(?:^| )--([\w.-]+)", code) if code.startswith("--") else ():
            assert name in known, f"{page}: --{name} in `{code}`"
        name = re.match(r"[\w.]*", code)[0].removeprefix("ddpm_jax.")
        where, _, last = name.rpartition(".")
        if where in modules and last not in ("py", "json", "md"):
            of_library = name in modules or hasattr(importlib.import_module(f"ddpm_jax.{where}"), last)
            assert of_library or name in fields(), f"{page}: `{code}`"
        elif where in ("model", "train"):
            assert name in fields() or last == "py", f"{page}: `{code}`"


@pytest.mark.parametrize("page", PAGES)
def test_what_python_code_asks_of_the_library_exists(page):
    known = {}
    for body in blocks(PAGES[page], "python", "{code-cell} ipython3"):
        nodes = list(ast.walk(ast.parse(body.removeprefix(":tags: [hide-input]"))))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ddpm_jax"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    module = importlib.import_module(full if full in MODULES else node.module)
                    known[alias.asname or alias.name] = module if full in MODULES else getattr(module, alias.name)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                thing = known.get(node.value.id)
                assert hasattr(thing, node.attr) or not inspect.ismodule(thing), f"{page}: {ast.unparse(node)}"


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, text in PAGES.items():
        for names in re.findall(r'(?:-e "\.|ddpm-jax)\[([\w,]+)\]', text):
            assert set(names.split(",")) <= set(extras), page


@pytest.fixture(scope="module")
def howto(tmp_path_factory):
    """What the code of the how-to page defines, run from top to bottom; and the folder that it ran in."""
    folder, names = tmp_path_factory.mktemp("howto"), {}
    tables = samplers.SAMPLERS, diffusion.WEIGHTINGS, data.SOURCES
    before = [dict(table) for table in tables]
    with contextlib.chdir(folder):
        for body in blocks(PAGES["docs/howto.md"], "python"):
            if ".main(" not in body:  # commands called from a notebook: tests/test_in_process.py
                exec(body, names)
    yield names, folder
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_the_sampler_of_the_howto_is_of_second_order(howto, linear):
    """On the ODE of Gaussian data, from t = 1000 to 200, where quantiles go to quantiles."""
    mean, spread = 0.3, 0.5

    def level(t):
        """Of the data at t: alpha, and the standard deviation, in float64."""
        alphas_bar = 1 / (1 + np.exp(-np.float64(linear.logsnr(t))))
        return alphas_bar**0.5, (alphas_bar * spread**2 + 1 - alphas_bar) ** 0.5

    def predict(x_t, t):
        alpha, sigma = diffusion.alpha_sigma(linear.logsnr(t))
        return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x_t - alpha * mean)

    x = np.random.default_rng(0).normal(size=100)
    (alpha, sd), (alpha_end, sd_end) = level(1000), level(200)
    end = alpha_end * mean + sd_end / sd * (x - alpha * mean)
    errors = []
    for n in (20, 40, 80):
        times, sampler = np.linspace(1000, 200, n + 1).astype(int), samplers.make_sampler("adams", linear)
        path, _ = samplers.run_sampler(predict, sampler, times, jax.random.key(0), jnp.asarray(x, jnp.float32))
        errors.append(np.abs(path[-1] - end).mean())
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all((orders > 1.7) & (orders < 2.4)), orders


def test_the_weighting_of_the_howto(howto, linear):
    """One where signal and noise are alike, 1 / e where the log-SNR is 2 away."""
    weights = diffusion.WEIGHTINGS["middle"](linear, np.arange(1, 1001))
    levels = np.asarray(linear.logsnr(np.arange(1, 1001)))
    assert np.interp(0, -levels, weights) == pytest.approx(1, abs=1e-4)
    assert np.interp([-2, 2], -levels, weights) == pytest.approx(np.exp(-1), abs=1e-3)


def test_the_network_of_the_howto_learns(howto):
    """The mean of the loss of one batch falls in 20 steps."""
    names, _ = howto
    step = parallel.pmap_step(names["train_step"])
    state, losses = parallel.replicate(names["init_state"]()), []
    images = np.random.default_rng(0).integers(0, 256, (64, *names["parts"].shape), np.uint8)
    batch = parallel.shard({"index": np.arange(64), "image": images})
    for _ in range(20):
        state, metrics = step(state._replace(step=state.step * 0 + 100), batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_the_data_of_the_howto(howto):
    names, folder = howto
    images, labels, _ = data.load(f"npz:{folder / 'mine.npz'}")
    assert images.shape == (100, 32, 32, 3)
    assert labels.tolist() == [*range(10)] * 10
    images, labels, _ = data.load("stripes:20")
    assert images.shape == (20, 8, 8, 1)
    assert labels[13] == 5
    assert (images[13] == 255).all((0, 2)).tolist() == [False] * 5 + [True] + [False] * 2
    assert names["get_config"]().model.groups == "auto"


def test_the_python_of_the_quick_start_draws_what_sample_does(call, tmp_path):
    run = make_run(tmp_path, T=40)[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run)
    (body,), names = blocks(PAGES["docs/quickstart.md"], "python"), {}
    with contextlib.chdir(tmp_path):
        exec(body, names)
    options = ("--num=16", "--sampler=dpmpp_2m", "--steps=20", f"--out={tmp_path / 'out'}")
    assert call(sample, f"--workdir={run}", *options)[0] == 0
    np.testing.assert_array_equal(names["digits"], np.load(tmp_path / "out" / "samples.npz")["images"])


def test_the_reference_has_each_module_and_command_once():
    text = "".join(text for page, text in PAGES.items() if page.startswith("docs/reference/"))
    assert sorted(re.findall(r"automodule:: (\S+)", text)) == sorted(MODULES)
    scripts = {module for name, module in COMMANDS.items() if "benchmarks" not in name} - {"ddpm_jax.__main__"}
    assert {name.rpartition(".")[0] for name in re.findall(r"autoclass:: (\S+)", text)} == scripts


def surface():
    """Functions, classes and tables of each module, by their names in the source."""
    for module in MODULES:
        for node in ast.parse(inspect.getsource(importlib.import_module(module))).body:
            tables = isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
            name = node.targets[0].id if tables else getattr(node, "name", "_")
            if not name.startswith("_"):
                yield f"{module}.{name}"


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_with_the_whole_surface(environment, tmp_path):
    """The tutorial is run too; an error in it, a dead link or a name that does not resolve would be a warning."""
    command = ["-m", "sphinx", "-W", "-n", "--keep-going", "-D", "nb_execution_mode=force", DOCS, tmp_path]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    missing = set(surface()) - {line.split(" ")[0] for line in listed.splitlines()}
    assert not missing
    pictures = len(re.findall(r"(?m)^(?:picture\(|plt\.show\()", PAGES["docs/tutorial.md"]))
    assert (tmp_path / "tutorial.html").read_text().count('src="_images/') == pictures
