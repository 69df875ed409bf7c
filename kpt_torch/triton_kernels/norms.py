"""rms_norm and layer_norm by the Triton kernels of `jitted/norms.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from kpt.ops.base import Spec
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch
from kpt_torch.triton_kernels.jitted import norms as jitted
from kpt_torch.triton_kernels.jitted.norms import refusal as refusal


def kernel(op: str, layer: bool) -> Any:
    """The provider of rms_norm or layer_norm, as `kpt_torch.library` makes it."""

    def forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        x = arrays["x"].contiguous()
        residual, weight, bias = (None if (t := arrays.get(n)) is None else t.contiguous() for n in ("residual", "weight", "bias"))
        y = torch.empty_like(x, dtype=x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"]))
        h = None if residual is None else torch.empty_like(x)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        mean, left = (torch.empty_like(rstd) for _ in range(2)) if layer else (None, None)
        width, rows = x.shape[-1], rstd.numel()
        if x.numel():
            tile = jitted.forward_tile(width) if width <= jitted.WHOLE_FORWARD else jitted.WIDE
            run = jitted.forward_whole if width <= jitted.WHOLE_FORWARD else jitted.forward_wide
            with launch.on(x):
                launch.run(run, (triton.cdiv(rows, tile.rows),),
                    x, residual, weight, bias, y, h, mean, left, rstd, rows, width, params["eps"], params.get("weight_offset", 0.0),
                    LAYER=layer, ROWS=tile.rows, BLOCK=tile.columns, num_warps=tile.warps,
                )  # fmt: skip
        return [y] if h is None else [y, h], [t for t in (mean, left, rstd) if t is not None]

    def backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
        h = (results[1] if "residual" in arrays else arrays["x"]).contiguous()
        weight = None if (t := arrays.get("weight")) is None else t.contiguous()
        dy, dh = cotangents[0].contiguous(), cotangents[1].contiguous() if "residual" in arrays else None
        mean, left, rstd = kept if layer else (None, None, kept[0])
        found = {n: torch.empty(arrays[n].shape, dtype=arrays[n].dtype, device=h.device) for n in wanted}
        width, rows = h.shape[-1], rstd.numel()
        if not h.numel():
            return {n: t.zero_() for n, t in found.items()}
        vectors = [n for n in ("weight", "bias") if n in wanted]
        rowwise = [found.get(n) for n in ("x", "residual")]
        offset = params.get("weight_offset", 0.0)

        def partial(count: int) -> list[torch.Tensor | None]:
            empty = lambda n: torch.empty((count, width), dtype=torch.float32, device=h.device) if n in vectors else None  # noqa: E731
            return [empty("weight"), empty("bias")]

        # A product less the mean of such products, which are rounded: 0 in a row of one, but not if the first one is not.
        exact = {"enable_fp_fusion": False} if layer else {}
        with launch.on(h):
            if width <= jitted.WHOLE_BACKWARD:
                tile = jitted.backward_tile(width)
                count = min(triton.cdiv(rows, tile.rows), tile.programs * launch.processors(h))
                row_bytes = sum(t.element_size() for t in (h, dy, dh) if t is not None)
                parts = partial(count)
                launch.run(jitted.backward_whole, (count,),
                    h, weight, dy, dh, mean, left, rstd, *rowwise, *parts, rows, width, offset, LAYER=layer, ROWS=tile.rows,
                    BLOCK=tile.columns, STAGES=jitted.stages(tile, row_bytes, launch.shared_bytes(h)), num_warps=tile.warps, **exact,
                )  # fmt: skip
            else:
                if any(t is not None for t in rowwise):
                    launch.run(jitted.backward_wide, (rows,),
                        h, weight, dy, dh, mean, left, rstd, *rowwise, rows, width, offset,
                        LAYER=layer, BLOCK=jitted.WIDE.columns, num_warps=jitted.WIDE.warps, **exact,
                    )  # fmt: skip
                across = triton.cdiv(width, jitted.COLUMNS.columns)
                count = min(triton.cdiv(rows, jitted.COLUMNS.rows), max(1, 8 * launch.processors(h) // across))
                parts = partial(count)
                if vectors:
                    launch.run(jitted.columns, (across, count),
                        h, dy, mean, left, rstd, *parts, rows, width,
                        LAYER=layer, ROWS=jitted.COLUMNS.rows, BLOCK=jitted.COLUMNS.columns, num_warps=jitted.COLUMNS.warps,
                    )  # fmt: skip
            if vectors:
                launch.run(jitted.sums, (triton.cdiv(width, jitted.SUMS.columns),),
                    *parts, found.get("weight"), found.get("bias"), count, width,
                    ROWS=jitted.SUMS.rows, BLOCK=jitted.SUMS.columns, num_warps=jitted.SUMS.warps,
                )  # fmt: skip
        return found

    def kept(specs: dict[str, Spec], params: dict[str, Any]) -> Sequence[Spec]:
        return (Spec(specs["x"].shape[:-1], "float32"),) * (3 if layer else 1)

    return library.kernel(op, "triton", forward, backward, kept=kept, reads=(1,), fresh=True)
