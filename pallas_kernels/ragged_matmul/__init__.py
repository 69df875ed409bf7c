"""ragged_matmul: each group of rows times its own matrix, the product of a mixture of experts."""
