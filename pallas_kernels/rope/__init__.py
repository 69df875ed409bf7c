"""rope: rotary position embedding, x cos + rotate(x) sin, in halves or interleaved pairs."""
