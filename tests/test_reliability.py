"""docs/reliability.md lists every case once, and each has a test by its number."""

import re

from conftest import ROOT


def test_each_case_has_a_test():
    table = (ROOT / "docs" / "reliability.md").read_text()
    listed = [int(number) for number in re.findall(r"(?m)^\| (\d+) \|.*\|.*\|.*\|$", table)]
    assert listed == list(range(1, 78))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert sorted({int(number) for number in re.findall(r"fault_(\d\d)", tests)}) == listed
