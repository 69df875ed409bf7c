"""What each op means, element by element in Python loops: slow, and too plain to be wrong the way an einsum can be.

Each function takes the op's arrays and parameters by keyword and returns the tuple of outputs, as nested float64 arrays.
Nothing here is shared with `kpt.ops` but the mask terms.
"""

from __future__ import annotations

import math

import numpy as np

from kpt.ops import Causal, Explicit, Lengths, Mask, Segments, Window

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x if x > 0 else 0.0,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu2": lambda x: x * x if x > 0 else 0.0,
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
}


def sees(mask: Mask, b: int, n: int, i: int, j: int, arrays: dict) -> bool:
    """Whether query `i` of head `n` sees key `j`, as the docstring of each term says."""

    def at(a: np.ndarray, *index: int):
        return a[tuple(0 if d == 1 else x for d, x in zip(a.shape, index, strict=True))]

    for term in mask.terms:
        match term:
            case Causal(offset):
                ok = j <= i + offset
            case Window(left, right, offset):
                ok = (left is None or i + offset - left <= j) and (right is None or j <= i + offset + right)
            case Segments():
                ok = arrays["q_segment_ids"][b, i] == arrays["kv_segment_ids"][b, j]
            case Lengths():
                ok = j < arrays["kv_lengths"][b]
            case Explicit():
                ok = at(arrays["keep"], b, n, i, j)
            case _:
                ok = True
        if not ok:
            return False
    return True


def attention(*, q, k, v, mask=Mask(), scale=None, logits_soft_cap=None, **arrays):  # noqa: B008
    (B, T, N, H), (S, K, Hv) = q.shape, v.shape[1:]
    out = np.zeros((B, T, N, Hv))
    scale = 1 / math.sqrt(H) if scale is None else scale
    for b, i, n in np.ndindex(B, T, N):
        kv = n // (N // K)
        scores = []
        for j in range(S):
            s = scale * sum(q[b, i, n, h] * k[b, j, kv, h] for h in range(H))
            if logits_soft_cap is not None:
                s = logits_soft_cap * math.tanh(s / logits_soft_cap)
            if "bias" in mask.operands:
                bias = arrays["bias"]
                s += bias[tuple(0 if d == 1 else x for d, x in zip(bias.shape, (b, n, i, j), strict=True))]
            if not sees(mask, b, n, i, j, arrays):
                s = s + mask.fill if mask.additive else mask.fill
            scores.append(s)
        if S and max(scores) == -math.inf:
            out[b, i, n] = math.nan
            continue
        weights = [math.exp(s - max(scores)) for s in scores]
        for h in range(Hv):
            out[b, i, n, h] = sum(w * v[b, j, kv, h] for j, w in enumerate(weights)) / (sum(weights) or 1.0)
    return (out,)


def rms_norm(*, x, weight=None, residual=None, eps, weight_offset=0.0):
    h, y = np.array(x), np.zeros(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        if residual is not None:
            h[row] = [a + b for a, b in zip(x[row], residual[row], strict=True)]
        norm = math.sqrt(sum(a * a for a in h[row]) / len(h[row]) + eps) if h[row].size else 1.0
        y[row] = [a / norm * (1 if weight is None else weight_offset + weight[d]) for d, a in enumerate(h[row])]
    return (y,) if residual is None else (y, h)


def layer_norm(*, x, weight=None, bias=None, residual=None, eps):
    h, y = np.array(x), np.zeros(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        if residual is not None:
            h[row] = [a + b for a, b in zip(x[row], residual[row], strict=True)]
        d = len(h[row])
        if not d:
            continue
        mean = sum(h[row]) / d
        deviation = math.sqrt(sum((a - mean) ** 2 for a in h[row]) / d + eps)
        for c, a in enumerate(h[row]):
            y[row][c] = (a - mean) / deviation * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
    return (y,) if residual is None else (y, h)


def _linear(x, w, b):
    out = np.zeros((*x.shape[:-1], w.shape[1]))
    for at in np.ndindex(out.shape):
        out[at] = sum(x[at[:-1]][k] * w[k, at[-1]] for k in range(w.shape[0])) + (0 if b is None else b[at[-1]])
    return out


def linear_act(*, x, w, b=None, activation):
    z = _linear(x, w, b)
    return (np.reshape([ACTIVATIONS[activation](float(a)) for a in z.flat], z.shape),)


def glu(*, x, w_gate, w_up, b_gate=None, b_up=None, activation):
    gate, up = linear_act(x=x, w=w_gate, b=b_gate, activation=activation)[0], _linear(x, w_up, b_up)
    return (np.reshape([a * b for a, b in zip(gate.flat, up.flat, strict=True)], gate.shape),)


def rope(*, x, cos, sin, interleaved=False):
    out, r = np.array(x), cos.shape[-1]
    for b, t, n in np.ndindex(x.shape[:3]):
        table = b if cos.shape[0] > 1 else 0
        for pair in range(r // 2):
            first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + r // 2)
            x0, x1 = x[b, t, n, first], x[b, t, n, second]
            out[b, t, n, first] = x0 * cos[table, t, first] - x1 * sin[table, t, first]
            out[b, t, n, second] = x1 * cos[table, t, second] + x0 * sin[table, t, second]
    return (out,)


def cross_entropy(*, logits, labels, label_smoothing=0.0, logits_soft_cap=None, invalid="nan"):
    loss = np.zeros(labels.shape)
    for row in np.ndindex(labels.shape):
        z = [float(a) for a in logits[row]]
        if logits_soft_cap is not None:
            z = [logits_soft_cap * math.tanh(a / logits_soft_cap) for a in z]
        log_sum = math.log(sum(math.exp(a) for a in z))
        label = int(labels[row])
        if invalid == "clip":
            label = min(max(label, 0), len(z) - 1)
        no_class = math.nan if invalid == "nan" else 0.0
        picked = z[label] if 0 <= label < len(z) else no_class
        # (1 - s) of the target on the label, s spread over every class
        if invalid == "drop" and not 0 <= label < len(z):  # what remains of the target is the smoothing
            log_sum = label_smoothing * log_sum
        loss[row] = log_sum - (1 - label_smoothing) * picked - label_smoothing * sum(z) / len(z)
    return (loss,)


def linear_cross_entropy(*, x, w, labels, b=None, weights=None, **params):
    (loss,) = cross_entropy(logits=_linear(x, w, b), labels=labels, **params)
    return (loss if weights is None else loss * weights,)


def matmul(*, a, b):
    return (_linear(a, b, None),)


def ragged_matmul(*, x, w, group_sizes):
    out, row = np.zeros((x.shape[0], w.shape[2])), 0
    for g, size in enumerate(group_sizes):
        for _ in range(size):
            out[row] = _linear(x[row : row + 1], w[g], None)[0]
            row += 1
    return (out,)


BRUTE_FORCE = {f.__name__: f for f in (attention, rms_norm, layer_norm, linear_act, glu, rope, cross_entropy, linear_cross_entropy,
                                       matmul, ragged_matmul)}  # fmt: skip
