"""The whole rewritten function beside the original: results, and gradients of a random projection of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kpt.errors import ValidationError
from kpt.strategy import Plan, Site
from kpt.strategy.certify import narrowest, reduction_length
from kpt.strategy.plan import differentiated
from kpt.validation import Certificate, ErrorMetrics, compare
from kpt.validation.certificate import Sensitivity
from kpt.validation.rounding import cancelling, movements
from kpt.validation.tolerance import Tolerance, epsilon, tolerance
from kpt_jax import _compat
from kpt_jax.measure import Timed
from kpt_jax.on_device import ROOM, on_gpu
from kpt_jax.optimize import Optimized

log = logging.getLogger("kpt")
Run = Callable[[Sequence[Any]], dict[str, Any]]
_GUILTY = "The whole program disagreed with the original while this site was in; a bisection found it."


def certify_whole(
    optimized: Optimized, args: tuple, kwargs: dict, timed: Callable[[Callable[..., Any]], Timed] | None = None
) -> tuple[Plan, float | None]:
    """Holds the rewritten function to the original on these arguments.

    Where they disagree although each site agreed alone, halves of the sites are tried until the guilty one is
    found; it runs as it was written from then on.

    Args:
      timed: the program that is timed of a function. Where it makes what is compared it is run, and nothing is compiled for the proof.

    Returns:
      The plan in force afterwards, whose notes hold the outcome, and whose `skipped` names what was taken out; and the largest relative L2
      difference from the original, over results and gradients, None where there are no floats.

    Raises:
      ValidationError: the two disagree with no kernel in place.
    """
    plan = optimized.plan(*args, **kwargs)
    reference = Reference(optimized, args, kwargs, plan, timed)
    verdict = reference.compare(optimized)
    guilty: list[str] = []
    if not verdict.passed and not reference.compare(optimized.without(_paths(s.path for s in plan.sites))).passed:
        raise ValidationError(
            f"The rewritten {plan.function} was compared with the original",
            f"They disagree with no kernel in place: {verdict.summary()}",
            "The function may not be deterministic; if it is, please report this",
        )
    while not verdict.passed:
        left = [s for s in plan.sites if s.path not in guilty]
        guilty += _guilty(reference, optimized, left)
        verdict = reference.compare(optimized.without(_paths(guilty)))
    if guilty:
        log.warning("%s disagreed with the original because of %s", plan.function, ", ".join(guilty))
        optimized.ban(_paths(guilty))
        plan = optimized.plan(*args, **kwargs)
    worst = [w for w in (verdict.worst(gradient=False), verdict.worst(gradient=True)) if w is not None]
    note = f"The whole function on example inputs: {verdict.summary()}."
    return dataclasses.replace(plan, notes=(*plan.notes, note)), max(worst, default=None)


def _paths(sites: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(sites, _GUILTY)


def _guilty(reference: Reference, optimized: Optimized, sites: Sequence[Site]) -> list[str]:
    """The sites that make the function disagree; more than one where they do so only together."""
    every = [s.path for s in reference.plan.sites]
    suspects = [s.path for s in sites]
    while len(suspects) > 1:
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            if not reference.compare(optimized.without(_paths(p for p in every if p not in half))).passed:
                suspects = half
                break
        else:
            return suspects
    return suspects


class Reference:
    """Results and gradients of the original on given arguments, and how far those move with the inputs' last bits.

    What a training step returns is as large as its state: of all else that has such results, each goes as soon as it was compared.
    """

    def __init__(
        self, optimized: Optimized, args: tuple, kwargs: dict, plan: Plan, timed: Callable[[Callable[..., Any]], Timed] | None = None
    ):
        self.plan, self.timed, self.seeds = plan, timed, itertools.count()
        self.key, self.inputs = optimized.split(args, kwargs)
        if any(_compat.is_tracer(x) for x in self.inputs):
            raise ValidationError(f"certify was called on {plan.function} inside of a trace", "Values are compared",
                                  "Call it with arrays, outside of jit and grad")  # fmt: skip
        self.diff = tuple(i for i, x in enumerate(self.inputs) if jnp.issubdtype(jax.typeof(x).dtype, jnp.floating))
        # What takes gradients itself is compared in those; its kernels need not have a second derivative.
        self.gradients = bool(self.diff) and not any(differentiated(s.path) for s in plan.sites)
        self.run = self._compiled(optimized.original)
        try:
            self.want = self.run(self.inputs)
        except Exception as error:
            if not self.gradients:
                raise
            log.info("gradients of %s are not compared: %s", plan.function, error)
            self.gradients = False  # a while loop, a callback: it has none
            self.run = self._compiled(optimized.original)
            self.want = self.run(self.inputs)
        floats = [jax.typeof(self.inputs[i]).dtype.name for i in self.diff]
        floats += [spec.dtype for s in plan.sites for spec in s.specs.values()] + [a.dtype.name for a in self.want.values()]
        self.dtype = narrowest(floats)
        # Roundings of sites in sequence add in squares, as if all of their sums were one.
        self.terms = max(1, sum(reduction_length(s.op, s.specs, s.params) for s in plan.sites))

    @functools.cached_property
    def sensitivity(self) -> Mapping[str, Sensitivity]:
        def bound(name: str) -> Tolerance:
            return tolerance(self.dtype, self.terms, gradient=name.startswith("d"), chain=len(self.plan.sites))

        return movements(self.want, self._nearby, self._distances, ROOM.get, bound, epsilon(self.dtype))

    @functools.cached_property
    def cancelling(self) -> Mapping[str, float]:
        """Of the gradients that are rounding alone, the size of what cancels in them."""
        def gradients() -> dict[str, ErrorMetrics]:
            return {n: m for n, m in self._distances(self._nearby(epsilon(self.dtype))).items() if n.startswith("d")}

        return cancelling(gradients) if self.gradients else {}

    def _nearby(self, step: float | None) -> dict[str, Any]:
        """What the original makes of inputs that were moved by so much; None: by their last bits."""
        def moved(x: Any) -> Any:
            return ROOM.nudged(x, next(self.seeds), epsilon(jax.typeof(x).dtype.name) if step is None else step)

        return self._ran(self.run, [moved(x) if i in self.diff else x for i, x in enumerate(self.inputs)])

    def _distances(self, got: dict[str, Any]) -> dict[str, ErrorMetrics]:
        return {n: m for n, m in self._beside(got).items() if isinstance(m, ErrorMetrics)}

    def compare(self, fn: Callable[..., Any]) -> Certificate:
        """The certificate of `fn`, called like the original."""
        try:
            told = self._beside(self._ran(self._compiled(fn), self.inputs))
        except Exception as error:  # what does not run does not agree
            log.warning("the rewritten %s failed while it was certified: %s", self.plan.function, error)
            told = {}
        found = self._held(told)
        if found.passed or not told:  # for most programs nothing cancels, and what follows needs more runs
            return found
        found = self._held(told, self.sensitivity)
        return found if found.passed else self._held(told, self.sensitivity, self.cancelling)

    def _ran(self, run: Run, inputs: Sequence[Any]) -> dict[str, Any]:
        """What it makes. Where the original's results leave no room for that on a GPU, they wait on the host."""
        try:
            return run(inputs)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or not any(map(on_gpu, self.want.values())):
                raise
        self.want = jax.device_get(self.want)
        return run(inputs)

    def _beside(self, got: dict[str, Any]) -> dict[str, ErrorMetrics | ValidationError]:
        """How far each array is from the original's, or why it cannot be said. Empties `got`."""
        told: dict[str, ErrorMetrics | ValidationError] = {}
        for name in list(got):
            array = got.pop(name)
            try:
                told[name] = ROOM.metrics(array, self.want.get(name, array))
            except ValidationError as error:
                told[name] = error.with_traceback(None)  # whose frames hold the array
        return told

    def _held(
        self,
        told: Mapping[str, ErrorMetrics | ValidationError],
        moved: Mapping[str, Sensitivity] | None = None,
        terms: Mapping[str, float] | None = None,
    ) -> Certificate:
        gradients = [n for n in self.want if n.startswith("d")]
        return compare(told, self.want, self.dtype, self.terms, gradients=gradients, sensitivity=moved, where="the example inputs",
                       terms=terms, measure=lambda found, _: _said(found), chain=len(self.plan.sites))  # fmt: skip

    def _compiled(self, fn: Callable[..., Any]) -> Run:
        def results(inputs: Sequence[Any]) -> list[Any]:
            return [x for x in map(_numbers, jax.tree.leaves(self.key.call(fn, inputs))) if hasattr(x, "dtype")]

        def both(inputs: list[Any]) -> tuple[list[Any], list[Any]]:
            def projected(diff: list[Any]) -> tuple[Any, list[Any]]:
                given = list(inputs)
                for i, x in zip(self.diff, diff, strict=True):
                    given[i] = x
                outs = results(given)
                floats = [x for x in outs if jnp.issubdtype(x.dtype, jnp.floating)]
                keys = jax.random.split(jax.random.key(0), max(len(floats), 1))
                onto = [jnp.sum(x * jax.random.normal(k, x.shape).astype(x.dtype), dtype=jnp.promote_types(x.dtype, "float32"))
                        for k, x in zip(keys, floats, strict=False)]  # fmt: skip
                return sum(onto, jnp.zeros((), "float32")), outs

            if not self.gradients:
                return results(inputs), []
            grads, outs = jax.grad(projected, has_aux=True)([jnp.asarray(inputs[i]) for i in self.diff])
            return outs, grads

        timed = self.timed and self.timed(fn)
        jitted = jax.jit(both)

        def made(inputs: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
            if timed is None or timed.trained != self.gradients:
                return jitted(list(inputs))
            outs = timed.jitted(*inputs)
            value, grads = outs if timed.trained else (None, ())
            return [value] if timed.trained else list(map(_numbers, outs)), grads

        def run(inputs: Sequence[Any]) -> dict[str, Any]:
            outs, grads = ROOM.fetched(jax.block_until_ready(made(inputs)))
            return {f"result{i}": x for i, x in enumerate(outs)} | {f"d{i}": g for i, g in zip(self.diff, grads, strict=False)}

        return run


def _said(found: ErrorMetrics | ValidationError) -> ErrorMetrics:
    if isinstance(found, ValidationError):
        raise found
    return found


def _numbers(x: Any) -> Any:
    """Of random keys the numbers that they are."""
    return jax.random.key_data(x) if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
