"""What holds for every test."""

import atexit
import collections
import os
import shutil
import tempfile
import time

import pytest

# Tests measure, and the history of whoever runs them is not theirs to write to.
os.environ["KPT_RECORD"] = "off"
# transformers reads these once a process, which tests of both frameworks share.
os.environ |= {"USE_TF": "0", "USE_FLAX": "1", "USE_TORCH": "AUTO"}
# Nor are kernels to be chosen in tests by what was measured on this machine. Workers of one run share the folder.
if "KPT_CACHE_DIR" not in os.environ:
    os.environ["KPT_CACHE_DIR"] = tempfile.mkdtemp(prefix="kpt-tests-")
    atexit.register(shutil.rmtree, os.environ["KPT_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every Nth of a test's cases, of those that the marks select")
    parser.addoption("--until", type=int, metavar="EPOCH", help="begin no test after this time, in seconds since 1970, and begin with another one"
                     " each time: where there is too little for all tests, it is not the same ones that are left out")  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Of a test that is marked `sampled(n)`, the first of every n cases is quick, and the others are slow."""
    for item, place in _places(items):
        if (mark := item.get_closest_marker("sampled")) is not None and place % mark.args[0]:
            item.add_marker(pytest.mark.slow)
    result = yield  # tests are selected by their marks
    if (every := config.option.every) > 1:
        kept = [item for item, place in _places(items) if place % every == 0]
        config.hook.pytest_deselected(items=[item for item, place in _places(items) if place % every])
        items[:] = kept
    if (until := config.option.until) is not None and items:
        first = until % len(items)
        items[:] = items[first:] + items[:first]
    return result


def pytest_runtest_setup(item):
    if (until := item.config.option.until) is not None and time.time() > until:
        pytest.skip("there was no time left for it")


def _places(items):
    """Tests, each with how many cases of the same one came before it."""
    met = collections.Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        yield item, met[test]
        met[test] += 1
