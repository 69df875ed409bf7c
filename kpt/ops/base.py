"""What an op is: named arrays, parameters, a shape rule, a float64 reference and a cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one array. `dtype` is a NumPy-style name: "float32", "bfloat16", "int32", "bool"."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, and bytes that must cross device memory once."""

    flops: float
    bytes: float


Specs = Mapping[str, Spec]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation, independent of any framework.

    Every function of an op, and every kernel that computes it, takes the op's arrays and
    parameters by keyword under the names given here.

    Attributes:
      name: "attention", "rms_norm", ...
      arrays: names of the required arrays, in signature order.
      optional: names of arrays that may be absent.
      params: parameter names with their defaults; `REQUIRED` where there is none.
      differentiable: the arrays (required or optional) that have a gradient.
      infer: `infer(specs, **params) -> tuple[Spec, ...]`: outputs; raises `OpError`.
      reference: `reference(**arrays, **params) -> tuple[ndarray, ...]`, in float64.
      reference_vjp: `reference_vjp(cotangents, **arrays, **params) -> dict[str, ndarray]`, in float64.
      sample: `sample(rng, specs, **params) -> dict[str, ndarray]`: random arrays in the op's domain
        (labels below the vocabulary size, lengths below the sequence length, masks with some True).
      cost: `cost(specs, **params) -> Cost` of the forward pass.
      constant: those of `differentiable` that models do not learn (rotary tables): kernels are timed without their gradients.
    """

    name: str
    arrays: tuple[str, ...]
    optional: tuple[str, ...]
    params: Mapping[str, Any]
    differentiable: tuple[str, ...]
    infer: Callable[..., tuple[Spec, ...]]
    reference: Callable[..., tuple]
    reference_vjp: Callable[..., dict]
    sample: Callable[..., dict]
    cost: Callable[..., Cost]
    constant: tuple[str, ...] = ()

    @property
    def learned(self) -> tuple[str, ...]:
        """The arrays whose gradients a training step computes."""
        return tuple(n for n in self.differentiable if n not in self.constant)


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
