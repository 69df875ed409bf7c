"""A graph that runs as it is, node by node: by the functions and methods of torch that its ops are, and less what does nothing.

`torch.ops.aten.mul.Tensor` and `torch.mul` are one op; the latter's arguments are read by code that was made for them, where the former's
go through the op's schema. `python -m kpt_torch.bench_overhead` times a program that is nearly all such calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kpt_torch.lower import aten

_nn: Any = torch._C._nn

# Whose arguments, in order and by name, are those of the op, and what they are by default. (Cross entropy's reduction is not.)
FUNCTIONS: dict[Any, Any] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg, aten.exp.default: torch.exp, aten.tanh.default: torch.tanh, aten.sigmoid.default: torch.sigmoid,
    aten.rsqrt.default: torch.rsqrt, aten.sqrt.default: torch.sqrt, aten.sin.default: torch.sin, aten.cos.default: torch.cos,
    aten.pow.Tensor_Scalar: torch.pow, aten.mean.dim: torch.mean, aten.mean.default: torch.mean, aten.where.self: torch.where,
    aten.matmul.default: torch.matmul, aten.mm.default: torch.mm, aten.bmm.default: torch.bmm, aten.addmm.default: torch.addmm,
    aten.cat.default: torch.cat, aten.softmax.int: torch.softmax, aten.relu.default: torch.relu,
    aten.layer_norm.default: torch.layer_norm, aten.embedding.default: torch.embedding, aten.linear.default: _nn.linear,
    aten.gelu.default: _nn.gelu, aten.silu.default: _nn.silu, aten.scaled_dot_product_attention.default: _nn.scaled_dot_product_attention,
}  # fmt: skip
METHODS: dict[Any, str] = {
    aten.view.default: "view", aten.reshape.default: "reshape", aten.expand.default: "expand", aten.permute.default: "permute",
    aten.transpose.int: "transpose", aten.unsqueeze.default: "unsqueeze", aten.squeeze.dim: "squeeze", aten.select.int: "select",
    aten.contiguous.default: "contiguous", aten.to.dtype: "to", aten.t.default: "t", aten.flatten.using_ints: "flatten",
    aten.masked_fill.Scalar: "masked_fill", aten.clone.default: "clone", aten.chunk.default: "chunk",
}  # fmt: skip


def direct(module: fx.GraphModule) -> None:
    """Rewrites the module, and those that it runs."""
    for n in list(module.graph.nodes):
        if n.op != "call_function":
            continue
        if _is_cast_to_its_own(n):
            n.replace_all_uses_with(n.args[0])
            module.graph.erase_node(n)
        elif n.target in FUNCTIONS:
            n.target = FUNCTIONS[n.target]
        elif n.target in METHODS:
            n.op, n.target = "call_method", METHODS[n.target]
    module.recompile()
    for body in module.children():
        if isinstance(body, fx.GraphModule):
            direct(body)


def _is_cast_to_its_own(n: fx.Node) -> bool:
    """Whether it is `x.to(dtype)` of an `x` of that dtype, which is `x`."""
    if n.target is not aten.to.dtype or len(n.args) != 2 or n.kwargs:
        return False
    of: Any = n.args[0]
    val = of.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype == n.args[1]


__all__ = ["FUNCTIONS", "METHODS", "direct"]
