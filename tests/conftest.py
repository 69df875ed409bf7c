"""What holds for every test."""

import atexit
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
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every Nth of the tests that were selected")
    parser.addoption("--until", type=int, default=0, metavar="EPOCH", help="begin no test after this time, in seconds since 1970, and begin with"
                     " another one each time: where there is too little for all tests, it is not the same ones that are left out; nor by --every")  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    """Of a test that is marked `sampled(n)`, the first of every n cases is quick, and the others are slow."""
    made = yield
    for place, item in enumerate(made if isinstance(made, list) else []):
        mark = item.get_closest_marker("sampled")
        if mark is not None and place % mark.args[0]:
            item.add_marker(pytest.mark.slow)
    return made


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    result = yield  # tests are selected by their marks
    every, until = config.option.every, config.option.until
    if every > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if (i - until) % every])
        items[:] = items[until % every :: every]
    if until and items:
        first = until % len(items)
        items[:] = items[first:] + items[:first]
    return result


def pytest_runtest_setup(item):
    if 0 < item.config.option.until < time.time():
        pytest.skip("there was no time left for it")
