"""Every error that kpt raises. Each says what was asked, what is possible here, and what to do."""

from __future__ import annotations


class KptError(Exception):
    """Base of every error that kpt raises.

    Args:
      asked: what the caller wanted, in one clause.
      possible: what can be had instead, or why not.
      advice: what to do next.
    """

    def __init__(self, asked: str, possible: str = "", advice: str = ""):
        self.asked, self.possible, self.advice = asked, possible, advice
        super().__init__(" ".join(p if p.endswith("?") else f"{p.rstrip('.')}." for p in (asked, possible, advice) if p))


class OpError(KptError):
    """The arrays or parameters handed to an op break its shape, dtype or value rules."""


class GraphError(KptError):
    """A program cannot be expressed as a neutral graph, for it branches on values that are not known, or a graph is malformed."""


class InputError(KptError, TypeError):
    """A program was planned for example inputs that it does not take; `__cause__` is what it raised on them."""


class KernelError(KptError):
    """A kernel is unknown, cannot be loaded, or refuses what was asked of it."""


class HardwareError(KptError):
    """An unknown hardware profile was named."""


class PlanError(KptError):
    """A plan cannot be read, or does not fit the program it is applied to."""


class ValidationError(KptError):
    """A swapped kernel disagrees with the code it replaces by more than the tolerance."""


class ConfigError(KptError):
    """A setting has a value that is not allowed."""


class StoreError(KptError):
    """A file of measurements or of history cannot be used: a newer version of kpt wrote it, or it is not what was asked for."""


class MissingDependencyError(KptError, ImportError):
    """An optional package is needed and not installed. `advice` carries the install line."""
