"""Compiles the Triton kernels ahead of time, for GPUs that are not here, and reads the registers that spill."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kpt.ops.activations import ACTIVATIONS
from kpt_torch.triton_kernels import linear_cross_entropy
from kpt_torch.triton_kernels.jitted import attention, cross_entropy, glu, norms, product, rope

F32, I32 = "*fp32", "i32"
NORM = {"rows": I32, "width": I32, "eps": "fp32", "offset": "fp32"}
LOSS = {"labels": "*i64", "loss": F32, "lse": F32, "dloss": F32, "vocab": I32, "smoothing": "fp32", "cap": "fp32"}
ROPE = dict.fromkeys("x_batch x_time x_head other_batch other_time other_head table_batch times heads other_heads size width".split(), I32)
ATTENTION = dict.fromkeys("q_batch q_row q_head k_batch k_row k_head v_batch v_row v_head d_batch d_row d_head".split(), I32)
ATTENTION |= dict.fromkeys("queries keys heads group width v_width low high".split(), I32)
ATTENTION |= {"scale": "fp32", "cap": "fp32", "lse": F32, "delta": F32, "means": F32, "q_ids": "*i32", "kv_ids": "*i32", "lengths": "*i32"}
LOOSE = ("rows", "times", "count", "queries", "keys", "heads", "group", "low", "high")
"""Integers that need not be a multiple of 16."""
GLU = {"count": I32}
PRODUCT = dict.fromkeys("rows columns inner x_row x_inner w_inner w_column".split(), I32)
SCALE = {"factors": F32, "width": I32}
# Bytes of shared memory on a multiprocessor.
SHARED = {"sm75": 65536, "sm80": 167936, "sm86": 102400, "sm89": 102400, "sm90": 233472, "sm100": 233472,
          "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840}  # fmt: skip
SUMS = {"mean": F32, "left": F32, "rstd": F32, "dweight": F32, "dbias": F32, "weights": F32, "biases": F32, "count": I32}


def _norm(fn: Any, tile: norms.Tile, layer: bool) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    given = {"LAYER": layer, "ROWS": tile.rows, "BLOCK": tile.columns}
    if not layer:
        given |= dict.fromkeys(("mean", "left", "bias", "dbias", "biases"))
    return fn, NORM | SUMS, given, tile.warps


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Name -> (kernel, types of arguments that are not arrays of the dtype, constants, warps), at the tiles that are launched."""
    found = {}
    for layer in (False, True):
        op = "layer_norm" if layer else "rms_norm"
        for width in (128, 4096, 8192, 16384):
            found[f"{op} forward {width}"] = _norm(norms.forward_whole, norms.forward_tile(width), layer)
        for width in (128, 4096, 8192):
            found[f"{op} backward {width}"] = _norm(norms.backward_whole, norms.backward_tile(width), layer)
        found[f"{op} forward wide"] = _norm(norms.forward_wide, norms.WIDE, layer)
        found[f"{op} backward wide"] = _norm(norms.backward_wide, norms.WIDE, layer)
        found[f"{op} columns"] = _norm(norms.columns, norms.COLUMNS, layer)
        found[f"{op} sums"] = _norm(norms.sums, norms.SUMS, layer)
    for name, fn, block, warps in (
        ("forward", cross_entropy.forward_rows, cross_entropy.FORWARD_BLOCK, cross_entropy.FORWARD_WARPS),
        ("backward", cross_entropy.backward_blocks, cross_entropy.BACKWARD_BLOCK, cross_entropy.BACKWARD_WARPS),
    ):
        for cap in (False, True):
            constants = {"CAP": cap, "SMOOTH": cap, "INVALID": "drop" if cap else "nan", "BLOCK": block}
            found[f"cross_entropy {name}{' capped, smoothed' if cap else ''}"] = fn, LOSS, constants, warps
    for interleaved in (False, True):
        for backward in (False, True):
            heads, half, tail = rope.tile(64, 192, 33)
            constants = {"INTERLEAVED": interleaved, "BACKWARD": backward, "HEADS": heads, "BLOCK": half, "TAIL": tail, "x_dim": 1}
            found[f"rope{' interleaved' if interleaved else ''}{' backward' if backward else ''}"] = rope.turn, ROPE, constants, rope.WARPS
            both = constants | {"OTHER_HEADS": rope.tile(64, 192, 8)[0], "other_dim": 1}
            found[f"rope pair{' interleaved' if interleaved else ''}{' backward' if backward else ''}"] = rope.turn_both, ROPE, both, rope.WARPS
    scaled = {"BLOCK": linear_cross_entropy.BLOCK}
    found["linear_cross_entropy scale"] = linear_cross_entropy.scale_rows, SCALE, scaled, linear_cross_entropy.WARPS
    for head in (64, 128, 256):
        for masked in (False, True):  # causality; everything
            given = {"LOW": masked, "HIGH": True, "CAP": masked, "EVEN": True, "HEAD": head, "V_HEAD": head}
            given |= {} if masked else dict.fromkeys(("q_ids", "kv_ids", "lengths", "means"))
            for fn in (attention.forward_blocks, attention.queries_backward, attention.keys_backward):
                found[f"attention {fn.__name__} {head}{' masked' if masked else ''}"] = fn, ATTENTION, given, 8
    found["attention delta"] = attention.delta_rows, ATTENTION, {"V_HEAD": 128, "QUERIES": 32}, 4
    for activation in ACTIVATIONS:
        constants = {"ACTIVATION": activation, "BLOCK": glu.BLOCK}
        found[f"glu {activation} forward"] = glu.forward_blocks, GLU, constants, glu.WARPS
        found[f"glu {activation} backward"] = glu.backward_blocks, GLU, constants, glu.WARPS
        found[f"glu {activation} backward and product"] = glu.backward_and_product_blocks, GLU, constants, glu.WARPS
        found[f"linear_act {activation} backward"] = product.slope_blocks, GLU, {"ACTIVATION": activation, "BLOCK": product.BLOCK}, product.WARPS
        for turned in (False, True):  # as x @ w, and as torch's linear layers turn it
            given = {"ACTIVATION": activation, "BIAS": True, "KEEP": True, "GROUP": product.GROUP, "x_inner": 1}
            name = f"linear_act {activation} forward{' turned' if turned else ''}"
            found[name] = product.product_blocks, PRODUCT, given | {"w_inner" if turned else "w_column": 1}, 0
    given = {"ACTIVATION": "identity", "BIAS": False, "KEEP": False, "GROUP": product.GROUP, "x_inner": 1, "w_column": 1, "b": None, "z": None}
    found["matmul"] = product.product_blocks, PRODUCT, given, 0
    return found


def family(architecture: str) -> str:
    """The name that tiles go by."""
    return "cdna" if architecture.startswith("gfx") else "hopper" if int(architecture.removeprefix("sm")) >= 90 else "ampere"


def compiled(name: str, target: GPUTarget, architecture: str, dtype: str) -> Any:
    fn, types, constants, warps = kernels()[name]
    if fn is norms.backward_whole:  # with h, dy and dh, as it is launched with a residual
        tile = norms.Tile(constants["ROWS"], constants["BLOCK"], warps, norms.PROGRAMS)
        constants = constants | {"STAGES": norms.stages(tile, 3 * (4 if dtype == "fp32" else 2), SHARED[architecture])}
    options = {"num_warps": warps}
    if fn in (norms.backward_whole, norms.backward_wide) and constants["LAYER"]:
        options["enable_fp_fusion"] = False
    if types is ATTENTION and "KEYS" in fn.arg_names:
        tiles = attention.TILES["blackwell" if architecture == "sm100" else family(architecture)][constants["HEAD"]]
        chosen = {"queries_backward": tiles.dq, "keys_backward": tiles.dkv}.get(fn.__name__, tiles.busy if constants["CAP"] else tiles.forward)
        constants = constants | {"QUERIES": chosen.queries, "KEYS": chosen.keys, "STAGES": chosen.stages}
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    if types is PRODUCT:
        t = product.TILES[family(architecture)] if dtype != "fp32" else product.WIDE
        constants = constants | {"ROWS": t.rows, "COLUMNS": t.columns, "INNER": t.inner}
        options = {"num_warps": t.warps, "num_stages": t.stages}
    types = types if fn is not norms.sums else types | {"dweight": f"*{dtype}", "dbias": f"*{dtype}"}
    constants = {n: v for n, v in constants.items() if n in fn.arg_names}
    signature = {n: "constexpr" if n in constants else types.get(n, f"*{dtype}") for n in fn.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(fn.arg_names)
        if signature[n].startswith("*") or signature[n] == I32 and n not in LOOSE
    }
    return triton.compile(ASTSource(fn, signature, constants, aligned), target=target, options=options)


def spills(kernel: Any, directory: Path) -> int:
    """Bytes that registers spill on NVIDIA, and how many registers do on AMD."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1])  # type: ignore[index]
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(sys.modules["triton.backends.nvidia.compiler"].__file__ or "").parent / "bin" / "cuobjdump"
    out = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", out))
