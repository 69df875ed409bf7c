"""Numbers that prove a swap: one tolerance formula, error metrics, certificates."""

from kpt.validation.certificate import Certificate, Check, certify, compare
from kpt.validation.conditioning import MARK, sensitivity
from kpt.validation.metrics import ErrorMetrics, metrics
from kpt.validation.tolerance import Tolerance, epsilon, tolerance

__all__ = [
    "MARK",
    "Certificate",
    "Check",
    "ErrorMetrics",
    "Tolerance",
    "certify",
    "compare",
    "epsilon",
    "metrics",
    "sensitivity",
    "tolerance",
]
