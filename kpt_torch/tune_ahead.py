"""`kpt tune --framework torch`: the calls of `kpt_torch.bench` at its shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kpt.errors import KptError
from kpt.strategy.tune import Call, Runner
from kpt_torch import auto
from kpt_torch.shapes import CPU_SHAPES, PARAMS, SHAPES, specs_of


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runner() -> Runner:
    """Trials on the GPU, where there is one."""
    return auto.runner(_device())


def calls(names: Sequence[str], dtype: str | None) -> list[Call]:
    """Of these ops, all where none is named, at every shape for what torch computes on.

    Args:
      dtype: bfloat16, or float32 on a CPU, unless given.

    Raises:
      KptError: there are no shapes for an op of such a name.
    """
    if unknown := [n for n in names if n not in CPU_SHAPES]:
        raise KptError(f"{unknown[0]!r} was asked for", f"For PyTorch there are {', '.join(CPU_SHAPES)}", "Choose among these")
    on_cpu = _device().type == "cpu"
    shapes, dtype = CPU_SHAPES if on_cpu else SHAPES, dtype or ("float32" if on_cpu else "bfloat16")
    return [Call(n, specs_of(n, dims, dtype), PARAMS.get(n, {})) for n in names or CPU_SHAPES for dims in shapes[n]]
