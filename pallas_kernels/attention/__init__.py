"""Attention, `softmax(scale * q k^T + mask) v`, with grouped queries, the masks of `kpt.ops.mask` and its own backward.

`blocks.py` says which blocks of the score matrix a mask leaves, and is shared by every provider; `xla.py` is plain JAX
and runs anywhere.
"""
