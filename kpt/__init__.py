"""Finds what a better kernel computes in code its user already has, swaps it in, and shows the evidence."""

from kpt.kernels import KernelRegistry, KernelSpec, registry
from kpt.strategy import Plan, Site
from kpt.validation import Certificate

__all__ = ["Certificate", "KernelRegistry", "KernelSpec", "Plan", "Site", "registry"]
