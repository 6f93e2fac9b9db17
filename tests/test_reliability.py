"""docs/reliability.md lists every case once, and each has a test by its number."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import COLLECTED, ROOT


def test_each_case_has_a_test(request):
    table = (ROOT / "docs" / "reliability.md").read_text()
    listed = [int(number) for number in re.findall(r"(?m)^\| (\d+) \|.*\|.*\|.*\|$", table)]
    assert sorted(listed) == list(range(1, 91))
    asked_for = {Path(arg).resolve() for arg in request.config.args}
    found = COLLECTED if {ROOT, ROOT / "tests"} & asked_for else collected()
    assert sorted({int(number) for number in re.findall(r"fault_(\d\d)", "\n".join(found))}) == sorted(listed)


def collected():
    """The names of all tests, also of those that are not run by default."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-n", "0", "-k", "fault_"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
