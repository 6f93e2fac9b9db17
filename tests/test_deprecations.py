"""That a deprecation warning is an error when our code causes it, here and in the processes that tests start."""

import importlib
import subprocess
import sys

import pytest
from conftest import PYTHONPATH, ROOT

LIBRARY = """
import functools, warnings

def old(kind=DeprecationWarning):
    warnings.warn("old is no more", kind, stacklevel=1)

def wrapped():
    functools.partial(old, FutureWarning)()
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A library that warns and one that calls it, as if they were installed; their folder."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "a_library.py").write_text(LIBRARY)
    (folder / "another.py").write_text("import a_library\nuse = lambda: a_library.old()\n")
    monkeypatch.syspath_prepend(folder)
    return folder


def test_what_we_call_is_ours_and_what_libraries_call_is_theirs(installed):
    library, another = map(importlib.import_module, ("a_library", "another"))
    for call in (library.old, library.wrapped, lambda: list(map(library.old, [PendingDeprecationWarning]))):
        with pytest.raises(Warning, match="old is no more"):
            call()
    another.use()


@pytest.mark.parametrize(("code", "returned"), [("a_library.old()", 1), ("another.use()", 0)])
def test_processes_of_tests_end_by_it(installed, environment, code, returned):
    variables = environment | {"PYTHONPATH": f"{installed}:{PYTHONPATH}"}
    command = [sys.executable, "-c", f"import a_library, another; {code}"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == returned
    assert ("DeprecationWarning: old is no more" in done.stderr) == bool(returned)
