"""Triton kernels for PyTorch on GPUs, forward and backward: a file an op, each with the op's function and its `refusal`."""
