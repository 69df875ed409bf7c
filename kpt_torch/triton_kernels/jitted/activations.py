"""Activations and their slopes in Triton, by name, as `kpt.ops.activations` says, of float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh to 4 ulp: near 0 its series, whose next term is 1e-8 of it, since `1 - 2 / (exp(2 x) + 1)` cancels there."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    q = x * x
    near = x * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    return tl.where(a < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _expm1(x):
    """Near 0 its series, whose next term is 1e-8 of it."""
    near = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7))))))
    return tl.where(tl.abs(x) < 0.25, near, tl.exp(x) - 1.0)


@triton.jit
def _tanh_of_softplus(x):
    """With `n = exp(-|x|)`, which does not overflow."""
    n = tl.exp(-tl.abs(x))
    return tl.where(x > 0, (1.0 + 2.0 * n) / (1.0 + 2.0 * n + 2.0 * n * n), n * (n + 2.0) / (n * (n + 2.0) + 2.0))


@triton.jit
def _gelu_angle(x):
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """A comparison with NaN is false: where one decides, NaN takes the branch that keeps it."""
    if NAME == "identity":
        y = x
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(_gelu_angle(x)))
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    elif NAME == "tanh":
        y = tanh(x)
    elif NAME == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif NAME == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif NAME == "softplus":
        y = tl.where(x < 0, 0.0, x) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    elif NAME == "elu":
        y = tl.where(x > 0, x, _expm1(x))
    else:
        tl.static_assert(NAME == "mish", "no such activation")
        y = x * _tanh_of_softplus(x)
    return y


@triton.jit
def slope(x, NAME: tl.constexpr):
    """The derivative."""
    if NAME == "identity":
        d = tl.full(x.shape, 1.0, tl.float32)
    elif NAME == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        t = tanh(_gelu_angle(x))
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif NAME == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif NAME == "sigmoid":
        s = tl.sigmoid(x)
        d = s * (1.0 - s)
    elif NAME == "tanh":
        t = tanh(x)
        d = 1.0 - t * t
    elif NAME == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        d = s * (1.0 + 1.702 * x * (1.0 - s))
    elif NAME == "relu2":
        d = tl.where(x < 0, 0.0, 2.0 * x)
    elif NAME == "softplus":
        d = tl.sigmoid(x)
    elif NAME == "elu":
        d = tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    else:
        tl.static_assert(NAME == "mish", "no such activation")
        t = _tanh_of_softplus(x)
        d = t + x * (1.0 - t * t) * tl.sigmoid(x)
    return d
