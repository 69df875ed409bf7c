"""Certifying a kernel: random inputs of its op, forward and gradients, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from kpt.errors import ValidationError
from kpt.ops.base import Op, Specs
from kpt.ops.mask import Mask, visible
from kpt.validation import MARK, Certificate, certify, epsilon, sensitivity

Arrays = dict[str, np.ndarray]


def validate(
    kernel: Callable[..., Any],
    op: Op,
    specs: Specs,
    params: Mapping[str, Any],
    *,
    run: Callable[[Callable[..., Any], Arrays, Mapping[str, Any]], Any],
    run_vjp: Callable[..., Mapping[str, Any]] | None = None,
    seeds: Iterable[int] = (0, 1),
    dtype: str | None = None,
) -> Certificate:
    """Runs `kernel` on samples of `op` and holds outputs and gradients to the reference.

    Args:
      kernel: takes the op's arrays and parameters by keyword.
      specs: the arrays to sample.
      run: `run(kernel, arrays, params)` returns its output or tuple of outputs; arrays are NumPy's (bfloat16 from
        ml_dtypes), and results are whatever NumPy can read.
      run_vjp: `run_vjp(kernel, arrays, params, cotangents)` returns the gradients by array name, for one cotangent per
        output in the output's dtype. Without it, gradients are not certified, and the certificate shows none.
      seeds: one sample each; the record names them.
      dtype: that the tolerance is for; by default the coarser of the first array's and the outputs'. "tfloat32" where
        float32 products run on tensor cores.

    Raises:
      OpError: the op does not take these specs and parameters.
      ValidationError: no seed was given.
    """
    outputs = op.infer(specs, **params)
    names = tuple(f"output {i}" if len(outputs) > 1 else "output" for i in range(len(outputs)))
    held_to = dtype or max(specs[op.arrays[0]].dtype, *(o.dtype for o in outputs), key=epsilon)
    differentiable = [n for n in op.differentiable if n in specs and "float" in specs[n].dtype] if run_vjp else []
    certificate = None
    for seed in seeds:
        rng = np.random.default_rng(seed)
        arrays = op.sample(rng, specs, **params)
        wide = {n: a.astype(np.float64) if _is_float(a) else a for n, a in arrays.items()}
        cotangents = tuple(rng.standard_normal(o.shape).astype(_dtype(o.dtype)) for o in outputs)
        wide_cotangents = tuple(np.asarray(c, np.float64) for c in cotangents)

        def reference(given: Mapping[str, np.ndarray], cotangents: tuple = wide_cotangents) -> Arrays:
            exact = dict(zip(names, op.reference(**given, **params), strict=True))
            if differentiable:
                gradients = op.reference_vjp(cotangents, **given, **params)
                exact |= {n: gradients[n] for n in differentiable}
            return exact

        exact = reference(wide)
        moved = sensitivity(reference, wide, rng, exact)
        with np.errstate(all="ignore"):  # the arrays may hold NaN and infinities
            terms = cancelling_terms(op.name, wide, params, names, exact, wide_cotangents, differentiable)
        results = run(kernel, arrays, params)
        results = results if isinstance(results, (tuple, list)) else (results,)
        actual = {n: np.asarray(r) for n, r in zip(names, results, strict=False)}
        if run_vjp:
            found = run_vjp(kernel, arrays, params, cotangents)
            actual |= {n: np.asarray(found[n]) for n in differentiable if n in found}
        lengths = {n: _reduction_length(op, specs, params, np.size(v)) for n, v in exact.items()}
        where = f"random sample, seed {seed}"
        one = certify(
            actual, exact, held_to, lengths, gradients=differentiable, sensitivity=moved, terms=terms, where=where
        )
        certificate = certificate.merge(one) if certificate else one
    if certificate is None:
        raise ValidationError(f"{op.name} was validated without a sample", advice="Pass at least one seed")
    return certificate


def _is_float(a: np.ndarray) -> bool:
    return a.dtype.kind == "f" or a.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def _dtype(name: str) -> np.dtype:
    import ml_dtypes  # registers bfloat16

    return np.dtype(getattr(ml_dtypes, name, name))


def _reduction_length(op: Op, specs: Specs, params: Mapping[str, Any], elements: int) -> int:
    """Terms summed into one element: an op does two operations per term, spread over the elements of what it makes.

    Exact for a product and for both of its gradients: `2 M K N` operations over `M N`, `M K` or `K N` elements.
    """
    return math.ceil(op.cost(specs, **params).flops / (2 * max(elements, 1)))


def cancelling_terms(
    op: str,
    arrays: Arrays,
    params: Mapping[str, Any],
    outputs: tuple[str, ...],
    exact: Arrays,
    cotangents: tuple[np.ndarray, ...],
    differentiable: list[str],
) -> dict[str, np.ndarray | float]:
    """Size of the terms whose difference a result is, where moving the inputs does not show it; `terms` of `certify`.

    - A cross entropy is `logsumexp - logit`; both move together when the logit does.
    - A query that sees no key, in words or by the marks of a bias, under an additive mask, adds the fill to all of its scores; what
      rounds away there comes back as error when softmax subtracts it again.
    - An activation may be all but zero, as gelu is below -4: `1 + tanh` is then the difference of ones.
    - A gradient may vanish for every input, as that of a query which sees one key does. What is left of
      `p (dp - sum(p dp))` is rounding, and the only scale there is comes from units: cotangent times output, per input.

    Args:
      op: the op's name.
      arrays: its inputs, in float64.
      outputs: names of its outputs, as in `exact`.
      exact: the reference's outputs and gradients.
      cotangents: one for each output.
      differentiable: the arrays whose gradients are held to the reference.
    """
    terms: dict[str, np.ndarray | float] = dict.fromkeys(outputs, 0.0)
    if op in ("cross_entropy", "linear_cross_entropy"):
        logits = arrays["logits"] if op == "cross_entropy" else arrays["x"] @ arrays["w"] + arrays.get("b", 0.0)
        if cap := params.get("logits_soft_cap"):
            logits = cap * np.tanh(logits / cap)
        terms[outputs[0]] = np.abs(logits).max(axis=-1, initial=0.0)
    elif op == "attention" and params.get("mask", Mask()).additive:
        mask, (b, t, n, _), s = params["mask"], arrays["q"].shape, arrays["k"].shape[1]
        see = visible(mask, b, n, t, s, arrays) & (arrays.get("bias", 0.0) > -MARK)
        sees_none = ~see.any(-1).swapaxes(1, 2)[..., None]
        terms[outputs[0]] = abs(mask.fill) * _rms(arrays["v"]) * sees_none
    elif op == "linear_act":
        terms[outputs[0]] = arrays["x"] @ arrays["w"] + arrays.get("b", 0.0)
    elif op == "glu":
        gate, up = (arrays["x"] @ arrays[f"w_{n}"] + arrays.get(f"b_{n}", 0.0) for n in ("gate", "up"))
        terms[outputs[0]] = gate * up
    flowing = sum(_rms(c) * max(_rms(exact[o]), _rms(terms[o])) for o, c in zip(outputs, cotangents, strict=True))
    for name in differentiable:
        measured = np.abs(arrays[name]) < MARK
        per_input = _rms(arrays[name][measured]) if measured.any() else 1.0  # marks alone stand among scores, of order 1
        terms[name] = flowing / per_input if per_input else 0.0
        if op in ("layer_norm", "rms_norm") and name in ("x", "residual"):
            h = arrays["x"] + arrays.get("residual", 0.0)
            # A norm divides by the deviation of each row, which may be far below the size of its elements.
            deviation = np.sqrt((h.var(-1) if op == "layer_norm" else (h * h).mean(-1)) + params.get("eps", 1e-6))
            terms[name] = (flowing / deviation)[..., None]
    return terms


def _rms(a: np.ndarray | float) -> float:
    """Root mean square of the finite values; 0 of none."""
    finite = np.asarray(a, np.float64)
    finite = finite[np.isfinite(finite)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
