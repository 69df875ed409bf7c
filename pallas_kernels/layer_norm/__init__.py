"""layer_norm: (x - mean) rsqrt(var + eps) weight + bias over the last axis, with an optional residual sum before it."""
