"""Attention by cuDNN, through `jax.nn.dot_product_attention(implementation="cudnn")`: NVIDIA GPUs from Ampere on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kpt.ops.base import Specs
from kpt.ops.mask import Causal, Lengths, Mask, Window
from pallas_kernels.manual_axes import vary_alike


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why cuDNN cannot compute this call on any GPU, or None."""
    q, k, v = (specs[n] for n in "qkv")
    (_, t, _, head), s = q.shape, k.shape[1]
    mask: Mask = params.get("mask") or Mask()
    if len({a.dtype for a in (q, k, v)}) > 1:
        return f"takes q, k and v of one dtype, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in (*q.shape, *k.shape):
        return "takes no empty arrays"
    if v.shape[3] != head:
        return f"takes v with the head dim of q, and these are {v.shape[3]} and {head}"
    if t % 2 or s % 2:
        return f"differentiates attention over even numbers of queries and keys, and these are {t} and {s}"
    if head % 8:
        return f"takes head dims that 8 divides, and this is {head}"
    if (params.get("out_dtype") or q.dtype) not in (q.dtype, "float16", "bfloat16"):
        return f"rounds its output to {q.dtype}, and {params['out_dtype']} was asked for"
    offsets = {term.offset for term in mask.terms if isinstance(term, Causal | Window)}
    if offsets and offsets != {0}:
        return f"aligns queries and keys at their first position, and this mask aligns them at {max(offsets, key=abs)}"
    windows = [term for term in mask.terms if isinstance(term, Window)]
    if any(term.left is None or term.left < 0 for term in windows) or len(windows) > 1:
        return "takes one window, that is bounded on the left and holds the query's own position"
    if windows and not (_is_causal(mask) or windows[0].right == 0):
        return "takes windows under causality alone"
    if Lengths() in mask.terms and windows:
        return "gives 0 to queries whose window is past the length, where this mask has another fill"
    if Lengths() in mask.terms and mask.fill == float("-inf"):
        return "cannot make the NaN that an infinite fill gives a sequence of length 0"
    return None


def refusal_to_128(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """As `refusal`, for every GPU that has cuDNN's attention."""
    return _refused(specs, params, 0, 128, "on every GPU")


def refusal_to_256(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """As `refusal`, for the head dims that Hopper and later GPUs take besides."""
    return _refused(specs, params, 128, 256, "from Hopper on, and attention.cudnn takes those below")


def _refused(specs: Specs, params: Mapping[str, Any], above: int, to: int, where: str) -> str | None:
    head = specs["q"].shape[3]
    if not above < head <= to:
        return f"takes head dims of {above + 8} to {to} {where}, and this is {head}"
    return refusal(specs, params)


def _is_causal(mask: Mask) -> bool:
    return any(isinstance(term, Causal) for term in mask.terms)


def attention(
    *,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_lengths: jax.Array | None = None,
    mask: Mask = Mask(),  # noqa: B008  (frozen)
    scale: float | None = None,
    logits_soft_cap: None = None,
    out_dtype: str | None = None,
) -> jax.Array:
    """`softmax(fill(scale * q k^T, mask)) v`, differentiable in q, k and v. Takes what `refusal` lets pass.

    Args:
      q: `[B, T, N, H]` float16 or bfloat16.
      k, v: `[B, S, K, H]` in q's dtype, `N % K == 0`.
      kv_lengths: `[B]` integers, read where the mask says so.
      mask: causal, causal with a window, or lengths.
      scale: of the scores; `1 / sqrt(H)` if None.
      logits_soft_cap: cuDNN has none.
      out_dtype: float16 or bfloat16; q's if None.

    Returns:
      `[B, T, N, H]`.

    Raises:
      RuntimeError: this jax has no cuDNN.
    """
    q, k, v, kv_lengths = vary_alike(q, k, v, kv_lengths if "kv_lengths" in mask.operands else None)
    window = next((term for term in mask.terms if isinstance(term, Window)), None)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=_is_causal(mask) or window is not None,
        key_value_seq_lengths=None if kv_lengths is None else jnp.clip(kv_lengths, 1, k.shape[1]).astype(jnp.int32),
        local_window_size=None if window is None or window.left is None else (window.left, 0),
        implementation="cudnn",
    )
    if kv_lengths is not None:
        # Equal scores weigh all values alike.
        mean = jnp.repeat(jnp.mean(v, 1, keepdims=True, dtype=jnp.float32), q.shape[2] // k.shape[2], 2).astype(out.dtype)
        out = jnp.where((kv_lengths <= 0)[:, None, None, None], mean, out)
    return out.astype(out_dtype or q.dtype)
