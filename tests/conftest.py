"""What holds for every test."""

import os

# Tests measure, and the history of whoever runs them is not theirs to write to.
os.environ["KPT_RECORD"] = "off"
# transformers reads these once a process, which tests of both frameworks share.
os.environ |= {"USE_TF": "0", "USE_FLAX": "1", "USE_TORCH": "AUTO"}
