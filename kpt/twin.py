"""The same model in two frameworks, stepped in lockstep: where they first differ by more than rounding.

A model that is written twice marks its values by name, `x = tap("layers.0/attention", x)`. What is compared, in this order:

1. Every tapped value. The second framework goes on from the first one's value at each tap, so that a difference is that of the
   code between two taps, and the bound that of one op: the project's tolerance for the dtype, not what a deep model adds up to.
2. The loss, and the gradient of every weight, each framework on its own: the same bound once for every tap passed. One that
   cancels (that of a key's bias, which softmax does not see) may be off by the rounding of the largest (`kpt.validation.rounding`).
3. One step of AdamW from the first one's gradients: an update divides gradients by their own size, so that those of a weight whose
   gradient is rounding alone would differ wholly.
4. The losses of training, each framework on its own.

Neither framework is imported here: a `Side` is one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from kpt.errors import ValidationError
from kpt.validation.conditioning import is_float, nudged
from kpt.validation.metrics import ErrorMetrics, metrics
from kpt.validation.rounding import cancelling
from kpt.validation.tolerance import epsilon, tolerance

Arrays = Mapping[str, np.ndarray]
Tap = Callable[[str, Any], Any]
Loss = Callable[[Mapping[str, Any], Mapping[str, Any], Tap], Any]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer on both sides (Loshchilov and Hutter 2019), as both libraries name them."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Twin:
    """A model that is written twice.

    Attributes:
      name: for the report.
      weights: `weights(seed) -> name -> float32 NumPy array`, what both are given. A side that wants another layout transposes inside.
      batch: `batch(step) -> name -> NumPy array`, the data of a step.
      jax, torch: `loss(weights, batch, tap) -> scalar` in that framework's arrays, all of `weights` differentiable.
      optimizer: of the training steps.
    """

    name: str
    weights: Callable[[int], dict[str, np.ndarray]]
    batch: Callable[[int], dict[str, np.ndarray]]
    jax: Loss
    torch: Loss
    optimizer: AdamW = AdamW()


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A value at a tap, widened to what NumPy knows, and the dtype that it had."""

    value: np.ndarray
    dtype: str


class Side(Protocol):
    """One framework's half. Arrays come and go as NumPy's."""

    framework: str

    def forward(self, weights: Arrays, batch: Arrays, forced: Arrays | None) -> tuple[float, dict[str, Tapped]]:
        """The loss and the value at each tap, in order of execution; after a tap in `forced` the model goes on from that value."""

    def gradients(self, weights: Arrays, batch: Arrays) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and its gradient in every weight."""

    def updated(self, weights: Arrays, gradients: Arrays) -> dict[str, np.ndarray]:
        """The weights after the first step of AdamW."""

    def train(self, weights: Arrays, batch: Callable[[int], Arrays], steps: int, done: Callable[[int], None]) -> list[float]:
        """The loss of each step, of training from these weights."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One comparison.

    Attributes:
      stage: "forward", "loss", "gradient", "update" or "training".
      name: of the tap or weight; "step 17" in training.
      error: relative L2 difference of the second side from the first.
      allowed: bound on it.
      at: index of the largest single difference.
      values: of both sides there.
    """

    stage: str
    name: str
    error: float
    allowed: float
    at: tuple[int, ...]
    values: tuple[float, float]

    @property
    def passed(self) -> bool:
        """False for NaN."""
        return self.error <= self.allowed


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; `sides` names them in the order of `Difference.values`."""

    twin: str
    sides: tuple[str, str]
    differences: tuple[Difference, ...]
    losses: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def first(self) -> Difference | None:
        """The first that is more than rounding."""
        return next((d for d in self.differences if not d.passed), None)

    @property
    def passed(self) -> bool:
        return self.first is None

    def to_json(self) -> str:
        """JSON text; infinities and NaN are null."""

        def plain(x: Any) -> Any:
            return None if isinstance(x, float) and not math.isfinite(x) else x

        rows = []
        for d in self.differences:
            values = {f.name: plain(getattr(d, f.name)) for f in dataclasses.fields(d)}
            rows.append(values | {"values": [plain(v) for v in d.values], "passed": d.passed})
        first = None if self.first is None else self.differences.index(self.first)
        data = {"kind": "kpt.twin", "twin": self.twin, "sides": self.sides, "passed": self.passed, "first": first, "differences": rows,
                "losses": [[plain(x) for x in side] for side in self.losses]}  # fmt: skip
        return json.dumps(data, indent=1)

    def explain(self) -> str:
        """A few lines for people: what was compared, the worst of each stage, and the first difference with both values."""
        lines = [f"{self.twin}: {self.sides[0]} and {self.sides[1]}"]
        for stage in dict.fromkeys(d.stage for d in self.differences):
            rows = [d for d in self.differences if d.stage == stage]
            worst = max(rows, key=lambda d: math.inf if math.isnan(d.error) else d.error / d.allowed)
            lines.append(f"  {stage:9} {len(rows):4} compared, nearest to its bound: {worst.name} {worst.error:.1e} of {worst.allowed:.1e}")
        first = self.first
        if first is None:
            return "\n".join([*lines, "They differ by rounding alone."])
        where = f"{first.name}{list(first.at)}" if first.at else first.name
        a, b = (f"{side} {value:.9g}" for side, value in zip(self.sides, first.values, strict=True))
        return "\n".join([*lines, f"First to differ by more than rounding: {first.stage} of {where}: {a}, {b}",
                          f"  relative difference {first.error:.2e}, allowed {first.allowed:.2e}"])  # fmt: skip


def compare(
    twin: Twin, one: Side, other: Side, *, steps: int = 100, seed: int = 0, done: Callable[[int], None] = lambda step: None
) -> Comparison:
    """Steps both sides and compares them.

    Args:
      steps: of training; none with 0.
      done: called after each of them, on each side.

    Raises:
      ValidationError: the two do not tap the same names in the same order, or differ in a shape.
    """
    weights, batch = twin.weights(seed), twin.batch(0)
    reduced = max((max(w.shape, default=1) for w in (*weights.values(), *batch.values())), default=1)

    _, taps = one.forward(weights, batch, None)
    _, others = other.forward(weights, batch, {n: t.value for n, t in taps.items()})
    if list(taps) != list(others):
        raise ValidationError(
            f"{twin.name} was compared", f"{one.framework} taps {_names(taps)}, {other.framework} {_names(others)}",
            "Tap the same values under the same names, in the order in which they are computed",
        )  # fmt: skip
    found = []
    narrowest = "float32"
    for name, mine in taps.items():
        dtype = max((mine.dtype, others[name].dtype), key=lambda d: tolerance(d, 0).rtol_l2)
        narrowest = max((narrowest, dtype), key=lambda d: tolerance(d, 0).rtol_l2)
        found.append(_difference("forward", name, mine.value, others[name].value, dtype, reduced, 1))

    passes = max(len(taps), 1)
    (loss, gradients), (other_loss, others_gradients) = one.gradients(weights, batch), other.gradients(weights, batch)
    found.append(_difference("loss", "loss", np.float64(loss), np.float64(other_loss), narrowest, reduced, passes))
    terms = functools.cache(lambda: _cancelling(one, weights, batch, gradients, epsilon(narrowest)))
    for name in reversed(list(weights)):  # from the loss to the input, as the backward pass goes
        hold = functools.partial(_difference, "gradient", name, gradients[name], others_gradients[name], narrowest, reduced, passes,
                                 gradient=True)  # fmt: skip
        difference = hold()
        found.append(difference if difference.passed else hold(terms=terms().get(name, 0.0)))
    updated, others_updated = one.updated(weights, gradients), other.updated(weights, gradients)
    found += [_difference("update", name, updated[name], others_updated[name], "float32", 1, 1) for name in weights]

    losses: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    if steps:
        curves = [side.train(weights, twin.batch, steps, done) for side in (one, other)]
        losses = tuple(curves[0]), tuple(curves[1])
        for step, (a, b) in enumerate(zip(*losses, strict=True)):
            # Steps add their roundings like a random walk: what one differs by, the next starts from.
            found.append(_difference("training", f"step {step}", np.float64(a), np.float64(b), narrowest, reduced,
                                     passes * math.sqrt(step + 1), gradient=True))  # fmt: skip
    return Comparison(twin.name, (one.framework, other.framework), tuple(found), losses)


def _names(taps: Mapping[str, Any]) -> str:
    return ", ".join(taps) or "nothing"


def _cancelling(side: Side, weights: Arrays, batch: Arrays, gradients: Arrays, step: float) -> dict[str, float]:
    rng = np.random.default_rng(0)

    def moved(arrays: Arrays) -> Arrays:
        return {n: nudged(a, rng, step) if is_float(a) else a for n, a in arrays.items()}

    def nearby() -> dict[str, ErrorMetrics]:
        _, found = side.gradients(moved(weights), moved(batch))
        return {n: metrics(found[n], g) for n, g in gradients.items()}

    return cancelling(nearby)


def _difference(
    stage: str, name: str, a: Any, b: Any, dtype: str, reduced: int, times: float, *, gradient: bool = False, terms: float = 0.0
) -> Difference:
    """`terms`: size of what cancels in an element, by whose rounding it may be off as well."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValidationError(f"{stage} of {name} was compared", f"The shapes are {a.shape} and {b.shape}", "Make them the same")
    bound = tolerance(dtype, reduced, gradient=gradient)
    if not a.size:
        return Difference(stage, name, 0.0, bound.rtol_l2 * times, (), (0.0, 0.0))
    # Both sides are off, each by as much as the tolerance has it.
    found, allowed = metrics(b, a), 2 * times * bound.allowed_l2(1.0, a.size)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=math.inf, posinf=math.inf))
    at = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), a.shape))
    error = math.nan if found.nonfinite_mismatch else found.rel_l2
    if error > allowed and 0 < terms < math.inf:
        error = min(error, found.abs_l2 / max(terms * math.sqrt(a.size), found.reference_l2))
    return Difference(stage, name, error, allowed, at, (float(a[at]), float(b[at])))
