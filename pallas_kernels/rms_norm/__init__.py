"""rms_norm: x rsqrt(mean(x^2) + eps) (weight_offset + weight) over the last axis, with an optional residual sum before it."""
