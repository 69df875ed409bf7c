"""Attention by cuDNN, through `jax.nn.dot_product_attention(implementation="cudnn")`: NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kpt.ops.mask import Mask, Window
from pallas_kernels.attention.calls import is_causal
from pallas_kernels.manual_axes import vary_alike


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
        is_causal=is_causal(mask) or window is not None,
        key_value_seq_lengths=None if kv_lengths is None else jnp.clip(kv_lengths, 1, k.shape[1]).astype(jnp.int32),
        local_window_size=None if window is None or window.left is None else (window.left, 0),
        implementation="cudnn",
    )
    if kv_lengths is not None:
        # Equal scores weigh all values alike.
        mean = jnp.repeat(jnp.mean(v, 1, keepdims=True, dtype=jnp.float32), q.shape[2] // k.shape[2], 2).astype(out.dtype)
        out = jnp.where((kv_lengths <= 0)[:, None, None, None], mean, out)
    return out.astype(out_dtype or q.dtype)
