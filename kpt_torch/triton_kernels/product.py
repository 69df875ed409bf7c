"""`act(x w + b)` by the Triton kernels of `jitted/product.py`, for linear_act and matmul."""

from __future__ import annotations

import torch
import triton

from kpt_torch.triton_kernels import launch
from kpt_torch.triton_kernels.jitted import product as jitted


def put_product(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, activation: str = "identity", z: torch.Tensor | None = None
) -> None:
    """Writes `act(x w + b)`, and the sums into `z`; these two are contiguous."""
    (rows, columns), inner, t = y.shape, x.shape[1], jitted.tile(launch.family(x), x.element_size())
    if y.numel():
        with launch.on(y):
            launch.run(jitted.product_blocks, (triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns),),
                x, w, b, z, y, rows, columns, inner, *x.stride(), *w.stride(),
                ACTIVATION=activation, BIAS=b is not None, KEEP=z is not None, ROWS=t.rows, COLUMNS=t.columns, INNER=t.inner,
                GROUP=jitted.GROUP, num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip


def put_gradients(z: torch.Tensor, dy: torch.Tensor, dz: torch.Tensor, activation: str) -> None:
    """Writes the gradients of the sums `z`, which may be where these are; all arrays are contiguous."""
    if z.numel():
        with launch.on(z):
            launch.run(jitted.slope_blocks, (triton.cdiv(z.numel(), jitted.BLOCK),),
                z, dy, dz, z.numel(), ACTIVATION=activation, BLOCK=jitted.BLOCK, num_warps=jitted.WARPS
            )  # fmt: skip
