"""The JAX half of `kpt twin`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kpt_jax
from kpt.twin import AdamW, Arrays, Loss, Tapped, Twin


class Side:
    """See `kpt.twin.Side`. `optimized`: the loss runs through `kpt_jax.optimize`."""

    def __init__(self, twin: Twin, optimized: bool = False):
        self.framework = "jax through kpt" if optimized else "jax"
        tapped = _with_taps(twin.jax)
        self._fn = kpt_jax.optimize(tapped) if optimized else tapped
        self._forward = jax.jit(self._fn)
        self._both = jax.jit(jax.value_and_grad(lambda weights, batch: self._fn(weights, batch, {})[0]))
        self._optimizer = _adamw(twin.optimizer)

    def forward(self, weights: Arrays, batch: Arrays, forced: Arrays | None) -> tuple[float, dict[str, Tapped]]:
        loss, names, taps = self._forward(dict(weights), dict(batch), dict(forced or {}))
        return float(loss), {n: Tapped(np.asarray(taps[n].astype(jnp.float32)), str(taps[n].dtype)) for n in names.names}

    def gradients(self, weights: Arrays, batch: Arrays) -> tuple[float, dict[str, np.ndarray]]:
        loss, found = self._both(dict(weights), dict(batch))
        return float(loss), jax.device_get(found)

    def updated(self, weights: Arrays, gradients: Arrays) -> dict[str, np.ndarray]:
        changes, _ = self._optimizer.update(dict(gradients), self._optimizer.init(dict(weights)), dict(weights))
        return jax.device_get(optax.apply_updates(dict(weights), changes))

    def train(self, weights: Arrays, batch: Callable[[int], Arrays], steps: int, done: Callable[[int], None]) -> list[float]:
        @jax.jit
        def step(weights: Any, state: Any, batch: Any) -> Any:
            loss, found = self._both(weights, batch)
            changes, state = self._optimizer.update(found, state, weights)
            return optax.apply_updates(weights, changes), state, loss

        own: Any = jax.tree.map(jnp.asarray, dict(weights))
        state, losses = self._optimizer.init(own), []
        for i in range(steps):
            own, state, loss = step(own, state, dict(batch(i)))
            losses.append(float(loss))
            done(i)
        return losses


@jax.tree_util.register_static
class _Names:
    """The names of taps in order of execution: a dict that jax returns is sorted."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)


def _with_taps(loss: Loss) -> Callable[..., tuple[Any, _Names, dict[str, Any]]]:
    def run(weights: Mapping[str, Any], batch: Mapping[str, Any], forced: Mapping[str, Any]) -> tuple[Any, _Names, dict[str, Any]]:
        taps: dict[str, Any] = {}

        def tap(name: str, value: Any) -> Any:
            taps[name] = value
            return forced[name].astype(value.dtype) if name in forced else value

        return loss(weights, batch, tap), _Names(tuple(taps)), taps

    return run


def _adamw(settings: AdamW) -> optax.GradientTransformation:
    s = settings
    return optax.adamw(s.learning_rate, b1=s.b1, b2=s.b2, eps=s.eps, weight_decay=s.weight_decay)
