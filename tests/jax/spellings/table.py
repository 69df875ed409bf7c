"""The table that spellings are written in: a function, by the names of its arguments, and the sites it must give."""



from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

B, T, S, N, K, H, D, F, V = 2, 12, 10, 4, 2, 8, 16, 24, 40
_rng = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> Any:
    return jnp.asarray(_rng.normal(size=shape), dtype)


# One array for every argument name that a spelling may have. q, k, v [B,T,N,H]; k2, v2 with K heads; kx, vx of length S.
INPUTS: dict[str, Any] = {
    "q": normal(B, T, N, H), "k": normal(B, T, N, H), "v": normal(B, T, N, H), "v5": normal(B, T, N, 5),
    "k2": normal(B, T, K, H), "v2": normal(B, T, K, H), "k1": normal(B, T, H), "v1": normal(B, T, H),
    "kx": normal(B, S, N, H), "vx": normal(B, S, N, H), "q1": normal(B, 1, N, H),
    "pad": jnp.asarray(np.arange(T)[None] < np.array([[T], [7]])), "padx": jnp.asarray(np.arange(S)[None] < np.array([[S], [3]])),
    "segments": jnp.asarray([[0] * 5 + [1] * 7, [0] * 3 + [1] * 5 + [2] * 4]), "lengths": jnp.asarray([5, 9]),
    "position": jnp.asarray(7), "hidden": jnp.asarray(np.arange(T)[None] < np.array([[0], [7]])), "bias": normal(1, N, T, T), "slopes": normal(N),
    "x": normal(B, T, D), "h": normal(B, T, D), "x2": normal(T, D), "g": normal(D), "b": normal(D),
    "w1": normal(D, F) / 4, "w2": normal(F, D) / 4, "w3": normal(D, F) / 4, "b1": normal(F), "b3": normal(F), "w13": normal(D, 2 * F) / 4,
    "wt": normal(F, D) / 4, "b13": normal(2 * F),
    "head": normal(D, V) / 4, "table": normal(V, D) / 4, "bv": normal(V), "logits": normal(B, T, V),
    "labels": jnp.asarray(_rng.integers(0, V, (B, T))), "weights": jnp.asarray(_rng.random((B, T)) < 0.7),
    "angles": normal(T, H // 2), "cis": jnp.exp(1j * normal(T, H // 2)), "positions": jnp.asarray([range(T), range(3, T + 3)]), "layers": normal(3, D, D) / 4,
    "key0": jnp.asarray([0, 7], jnp.uint32), "qkv": normal(B, T, 3, N, H), "relative": normal(16, N), "wh": normal(H), "wh2": normal(H),
    "w33": normal(D, 3 * D) / 4, "w44": normal(D, D) / 4, "k_new": normal(B, 1, K, H), "v_new": normal(B, 1, K, H),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Site:
    """What a site must be: its op, parameters, shapes of arrays by name, and (if given) exactly these arrays."""

    op: str
    expect: dict[str, Any]


def site(op: str, **expect: Any) -> Site:
    return Site(op, expect)


@dataclasses.dataclass(frozen=True)
class Spelling:
    name: str
    fn: Callable[..., Any]
    sites: tuple[Site, ...]
    dtype: str | None
    gradients: bool

    def args(self) -> list[Any]:
        names = [p.name for p in inspect.signature(self.fn).parameters.values() if p.default is p.empty]
        arrays = [INPUTS[n] for n in names]
        floats = [jnp.issubdtype(a.dtype, jnp.floating) for a in arrays]
        return [a.astype(self.dtype) if self.dtype and f else a for a, f in zip(arrays, floats, strict=True)]


class Table(list[Spelling]):
    """Spellings, added by decorating a function or by `add`."""

    def __call__(self, *sites: Site, dtype: str | None = None, gradients: bool = True) -> Callable[[Callable], Callable]:
        def register(fn: Callable) -> Callable:
            self.add(fn.__name__, fn, *sites, dtype=dtype, gradients=gradients)
            return fn

        return register

    def add(self, name: str, fn: Callable, *sites: Site, dtype: str | None = None, gradients: bool = True) -> None:
        assert name not in {s.name for s in self}, name
        self.append(Spelling(name, fn, sites, dtype, gradients))
