"""layer_norm in Triton: `(h - mean(h)) rsqrt(var(h) + eps) weight + bias` with `h = x + residual` (arXiv:1607.06450)."""

from __future__ import annotations

from kpt_torch.triton_kernels import norms
from kpt_torch.triton_kernels.norms import refusal as refusal

layer_norm = norms.kernel("layer_norm", layer=True)
