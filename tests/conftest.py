"""What holds for every test."""

import atexit
import os
import shutil
import tempfile

# Tests measure, and the history of whoever runs them is not theirs to write to.
os.environ["KPT_RECORD"] = "off"
# transformers reads these once a process, which tests of both frameworks share.
os.environ |= {"USE_TF": "0", "USE_FLAX": "1", "USE_TORCH": "AUTO"}
# Nor are kernels to be chosen in tests by what was measured on this machine. Workers of one run share the folder.
if "KPT_CACHE_DIR" not in os.environ:
    os.environ["KPT_CACHE_DIR"] = tempfile.mkdtemp(prefix="kpt-tests-")
    atexit.register(shutil.rmtree, os.environ["KPT_CACHE_DIR"], ignore_errors=True)
