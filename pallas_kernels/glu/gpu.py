"""Gated linear unit for NVIDIA Hopper: both products share the tiles of x, and meet before anything is written.

Where a gradient is wanted, the two projections are written beside their product and kept. x's gradient is one product of ours, in whose
sums both parts meet; those of the weights are XLA's, which are at the ceiling.

`then_linear` is the product with the weight that follows, too, as in every gated MLP: what glu makes is read by that product and by the
gradient of its weight alone, which can make it again beside the projections' gradients. An array of the MLP's width less is kept. All three
are made where glu's own gradient is, in a product of ours: it is in the sums, and never written.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kpt.kernels.stand_in import stood_for
from pallas_kernels.activations import ACTIVATIONS, Array
from pallas_kernels.hopper_gemm import Tiles, enough, products, tiles_for
from pallas_kernels.hopper_gemm import refusal as refusal
from pallas_kernels.linear_act.gpu import IN_KERNEL, SLOPE_IN_KERNEL, sigmoid
from pallas_kernels.linear_act.xla import contract, weight_vjp
from pallas_kernels.manual_axes import vary_alike


def glu(
    *,
    x: Array,
    w_gate: Array,
    w_up: Array,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    activation: str = "silu",
    out_dtype: str | None = None,
    tiles: Tiles | None = None,
) -> Array:
    """`act(x w_gate + b_gate) * (x w_up + b_up)` (Shazeer 2020, arXiv:2002.05202), of float32 sums.

    Args:
      x: `[..., K]` bfloat16 or float16. w_gate, w_up: `[K, N]`, of the same dtype. b_gate, b_up: `[N]` or None.
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: x's, or None for it.
      tiles: of the forward products; `pallas_kernels.hopper_gemm.tiles_for` chooses them by default.

    Raises:
      KernelError: the tiles are not possible.
    """
    y = _glu((activation, tiles or _tiles(x, w_gate)), *vary_alike(x.reshape(-1, x.shape[-1]), w_gate, w_up, b_gate, b_up))
    return y.reshape(*x.shape[:-1], w_gate.shape[1])


def _tiles(x, w_gate):
    return tiles_for(math.prod(stood_for("x", x.shape)[:-1]), stood_for("w_gate", w_gate.shape)[1], 2)


def _forward(static, keep, x, w_gate, w_up, b_gate, b_up):
    activation, tiles = static

    def epilogue(gate: Array, up: Array, *biases: Array) -> list[Array]:
        queue = iter(biases)
        gate, up = (z if b is None else z + next(queue) for z, b in ((gate, b_gate), (up, b_up)))
        return [IN_KERNEL[activation](gate) * up, gate, up][: 1 + 2 * keep]

    rows = [b for b in (b_gate, b_up) if b is not None]
    return products(x, [w_gate, w_up], epilogue, 1 + 2 * keep, rows, tiles=tiles, name="glu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu(static, x, w_gate, w_up, b_gate, b_up):
    return _forward(static, False, x, w_gate, w_up, b_gate, b_up)[0]


def _fwd(static, *arrays):
    y, gate, up = _forward(static, True, *arrays)
    return y, (*arrays, gate, up)


def _bwd(static, residuals, g):
    *arrays, gate, up = residuals
    d_gate, d_up, _ = _between(static, gate, up, g)
    return _of_products(arrays, d_gate, d_up)


def _between(static, gate, up, g):
    """Gradients of both projections, and their product once more; XLA makes all three in one pass, and none that nobody reads."""
    act, slope = ACTIVATIONS[static[0]]
    g, gate_f, up_f = (a.astype(jnp.float32) for a in (g, gate, up))
    activated = act(gate_f)
    return [a.astype(gate.dtype) for a in (g * up_f * slope(gate_f), g * activated, activated * up_f)]


def _of_products(arrays, d_gate, d_up):
    """Gradients of what the two projections are of."""
    x, w_gate, w_up, b_gate, b_up = arrays
    *tokens, k = stood_for("x", x.shape)
    if enough(math.prod(tokens), k):
        tiles = tiles_for(math.prod(tokens), k)
        (dx,) = products(d_gate, [w_gate], lambda acc: [acc], 1, b_axis=1, tiles=tiles, then=(d_up, w_up), name="glu_dx")
    else:
        dx = contract(d_gate, w_gate, ((1,), (1,)), x.dtype) + contract(d_up, w_up, ((1,), (1,)), x.dtype)
    (dw_gate, db_gate), (dw_up, db_up) = (weight_vjp(x, b, d) for b, d in ((b_gate, d_gate), (b_up, d_up)))
    return dx, dw_gate, dw_up, db_gate, db_up


_glu.defvjp(_fwd, _bwd)


def then_linear(
    *,
    x: Array,
    w_gate: Array,
    w_up: Array,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    w_down: Array,
    activation: str = "silu",
    out_dtype: str | None = None,
    tiles: Tiles | None = None,
) -> Array:
    """`(act(x w_gate + b_gate) * (x w_up + b_up)) w_down` (Shazeer 2020, arXiv:2002.05202): a gated MLP, which keeps both projections for
    its backward pass and not their product.

    Args:
      w_down: `[N, M]`, of x's dtype; all else as `glu` has it.

    Returns:
      `[..., M]`, in x's dtype.

    Raises:
      KernelError: the tiles are not possible.
    """
    y = _linear((activation, tiles or _tiles(x, w_gate)), *vary_alike(x.reshape(-1, x.shape[-1]), w_gate, w_up, b_gate, b_up, w_down))
    return y.reshape(*x.shape[:-1], w_down.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w_gate, w_up, b_gate, b_up, w_down):
    return _down(_glu(static, x, w_gate, w_up, b_gate, b_up), w_down)


def _down(y, w_down):
    return contract(y, w_down, ((1,), (0,)), y.dtype)


def _linear_fwd(static, *given):
    *arrays, w_down = given
    y, kept = _fwd(static, *arrays)
    return _down(y, w_down), (*kept, w_down)


def _linear_bwd(static, residuals, g):
    *arrays, gate, up, w_down = residuals
    d_gate, d_up, y = _between_products(static, gate, up, g, w_down)
    return *_of_products(arrays, d_gate, d_up), weight_vjp(y, None, g)[0]


def _d_swish(scale: float, x: Array) -> Array:
    s = sigmoid(scale * x)
    return s * (1 + scale * x * (1 - s))


# Of the sigmoid that the activation itself is of, or of one instruction.
SLOPE = SLOPE_IN_KERNEL | {
    "silu": functools.partial(_d_swish, 1.0),
    "quick_gelu": functools.partial(_d_swish, 1.702),
    "softplus": sigmoid,
}


def _between_products(static, gate, up, g, w_down):
    """`_between` of `g w_down^T`, in whose epilogue it is."""
    (*tokens, _), (n, m) = stood_for("x", g.shape), stood_for("w_down", w_down.shape)
    if not enough(math.prod(tokens), n) or m % 64 or w_down.shape[1] % 64:
        return _between(static, gate, up, contract(g, w_down, ((1,), (1,)), g.dtype))
    act, slope = IN_KERNEL[static[0]], SLOPE[static[0]]

    def epilogue(g_y: Array, gate: Array, up: Array) -> list[Array]:
        activated = act(gate)
        return [g_y * up * slope(gate), g_y * activated, activated * up]

    tiles = tiles_for(math.prod(tokens), n)
    return products(g, [w_down], epilogue, 3, beside=[gate, up], b_axis=1, tiles=tiles, name="glu_between")


_linear.defvjp(_linear_fwd, _linear_bwd)
glu.then_linear = then_linear  # type: ignore[attr-defined]  # see kpt_jax/pairs.py
