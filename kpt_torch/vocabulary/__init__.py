"""ATen ops in the neutral vocabulary: one function an op, which writes what the op computes, dtype promotion included.

A rule gets the op's arguments with values (`V`) for tensors and numbers for symbolic sizes, and returns the value (or list of values) that
the op makes. What it cannot say exactly raises `Unknown`, and the op runs as it stood. `kpt_torch.capture` holds every result to
the shape and dtype that torch gives it.
"""

from kpt_torch.vocabulary import attention, complex_numbers, elementwise, losses, products, reductions, shapes
from kpt_torch.vocabulary.table import TABLE, Rule, Unknown, rule

__all__ = ["TABLE", "Rule", "Unknown", "attention", "complex_numbers", "elementwise", "losses", "products", "reductions", "rule", "shapes"]
