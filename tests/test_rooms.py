"""Imports run one way, and each library is known in one room: read from the source, also inside functions."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "ddpm_jax").rglob("*.py")
}


def imports(file: Path) -> set[str]:
    """The modules that a file imports anywhere; of this package, the submodules where there are such."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


IMPORTS = {module: imports(file) for module, file in FILES.items()}


def room(module):
    """The file or folder of ddpm_jax that a module lies in; a command, which is above all of them, in none."""
    parts = module.split(".")
    return None if parts[0] != "ddpm_jax" or parts[-1] == "__main__" or len(parts) == 1 else parts[1]


GROUND = {"errors", "keys", "vectors"}
MATHS = {
    "augmentation",
    "schedules",
    "diffusion",
    "conditioning",
    "samplers",
    "editing",
    "likelihood",
    "averages",
    "training",
    "networks",
}
MACHINERY = {"environment", "options", "config", "parallel", "run", "images", "data"}
BUILT = {"guiding", "experiment", "program"}
LAYERS = {  # each with all that it may import
    "ground": (GROUND, GROUND),
    "maths": (MATHS, GROUND | MATHS),
    "machinery": (MACHINERY, GROUND | MACHINERY),
    "built": (BUILT, GROUND | MATHS | MACHINERY | BUILT),
    "evaluation": ({"evaluation"}, GROUND | MATHS | MACHINERY | BUILT | {"evaluation"}),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    rooms, allowed = LAYERS[layer]
    for module, found in IMPORTS.items():
        if room(module) in rooms:
            others = {name for name in found if room(name)} - {name for name in found if room(name) in allowed}
            assert not others, f"{module} imports {sorted(others)}"


def test_no_module_needs_itself():
    """By whatever way; prepare raises a CycleError that names it."""
    graphlib.TopologicalSorter({module: found & FILES.keys() for module, found in IMPORTS.items()}).prepare()


@pytest.mark.parametrize(
    ("library", "place"),
    [("flax", "networks."), ("orbax", "run.checkpoint"), ("optax", "training")],
)
def test_each_library_is_known_in_one_room(library, place):
    known = [module for module, found in IMPORTS.items() if library in {name.split(".")[0] for name in found}]
    assert all(module.startswith(f"ddpm_jax.{place}") for module in known), known


@pytest.mark.parametrize(
    "word", ["jax.pmap", "shard_map", "process_index", "process_count", "jax.devices", "local_device_count"]
)
def test_only_parallel_knows_devices_and_processes(word):
    known = [str(file) for module, file in FILES.items() if room(module) != "parallel" and word in file.read_text()]
    assert not known
