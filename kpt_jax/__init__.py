"""kpt for JAX: `optimize(fn)` finds what better kernels compute in `fn`, swaps them in and proves the numbers."""

from kpt_jax.optimize import Optimized, optimize, plan

__all__ = ["Optimized", "optimize", "plan"]
