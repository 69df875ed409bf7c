"""rms_norm in Triton: `h rsqrt(mean(h^2) + eps) (weight_offset + weight)` with `h = x + residual` (arXiv:1910.07467)."""

from __future__ import annotations

from kpt_torch.triton_kernels import norms
from kpt_torch.triton_kernels.norms import refusal as refusal

rms_norm = norms.kernel("rms_norm", layer=False)
