"""The Triton kernels themselves, their tiles and what they refuse, a file an op: of no framework. PyTorch and JAX launch them alike."""
