"""The Triton kernels of `kpt_torch/triton_kernels/jitted` called from JAX through jax-triton, with their derivatives. Imports no torch."""
