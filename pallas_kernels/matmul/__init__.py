"""matmul: a b with a float32 accumulator."""
