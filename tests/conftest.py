"""What holds for every test."""

import os

# Tests measure, and the history of whoever runs them is not theirs to write to.
os.environ["KPT_RECORD"] = "off"
