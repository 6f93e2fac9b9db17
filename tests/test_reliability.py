"""docs/reliability.md lists every case once, and each has a test by its number."""

import re
import subprocess
import sys

from conftest import ROOT


def test_each_case_has_a_test():
    table = (ROOT / "docs" / "reliability.md").read_text()
    listed = [int(number) for number in re.findall(r"(?m)^\| (\d+) \|.*\|.*\|.*\|$", table)]
    assert sorted(listed) == list(range(1, 91))
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-n", "0", "-k", "fault_"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted({int(number) for number in re.findall(r"fault_(\d\d)", done.stdout)}) == sorted(listed)
