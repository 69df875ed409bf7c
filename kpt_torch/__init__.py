"""kpt for PyTorch: `optimize(module)` finds what better kernels compute in it, swaps them in and proves the numbers.

Imported without torch's compiler until something is optimized: `kpt_torch.library` and `kpt_torch.xla` stand on their own.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpt_torch.optimized import Optimized, explain, optimize, plan

__all__ = ["Optimized", "explain", "optimize", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kpt_torch' has no attribute {name!r}")
    module = importlib.import_module("kpt_torch.optimized")
    globals().update({n: getattr(module, n) for n in __all__})
    return globals()[name]
