"""Which tests run: `sampled`, `--every` and `--until` of tests/conftest.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NEVER = 4_000_000_000  # seconds since 1970


@pytest.fixture
def ran(tmp_path):
    """`ran(marks, *options)`: the cases of seven that ran, in their order, and what pytest said."""

    def run(marks: str, *options: str) -> tuple[list[int], str]:
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  sampled\n")
        (tmp_path / "test_it.py").write_text(f"import pytest\n\n{marks}\n@pytest.mark.parametrize('i', range(7))\ndef test(i):\n    pass\n")
        command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-v", "-rs", *options]
        done = subprocess.run([*command, "--rootdir", tmp_path, "-c", tmp_path / "pytest.ini", tmp_path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 5), done.stdout + done.stderr
        return [int(i) for i in re.findall(r"::test\[(\d)\] PASSED", done.stdout)], done.stdout

    return run


def test_of_a_sampled_test_the_first_of_every_few_cases_is_quick(ran):
    assert ran("@pytest.mark.sampled(3)", "-m", "not slow")[0] == [0, 3, 6]
    assert ran("@pytest.mark.sampled(3)", "-m", "slow")[0] == [1, 2, 4, 5]


def test_a_sampled_case_keeps_its_place_whatever_else_is_selected(ran):
    assert ran("@pytest.mark.sampled(3)", "-m", "not slow", "-k", "3 or 4")[0] == [3]


def test_every_second_test_and_at_another_time_the_others(ran):
    one, other = (ran("", "--every", "2", "--until", str(until))[0] for until in (NEVER, NEVER + 1))
    assert len(one) + len(other) == 7 and {*one, *other} == {*range(7)}


def test_tests_begin_with_another_one_each_time(ran):
    orders = [ran("", "--until", str(until))[0] for until in (NEVER, NEVER + 1)]
    assert all(sorted(order) == [*range(7)] for order in orders) and orders[0] != orders[1]


def test_once_time_is_up_no_test_begins(ran):
    cases, said = ran("", "--until", "1")
    assert not cases and "7 skipped" in said and "there was no time left for it" in said
