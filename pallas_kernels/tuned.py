"""The block sizes that `kpt tpu tune` found better than the rules of the kernels, shipped as data with where they come from."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kpt.ops.base import Spec, Specs
from kpt.tuning.bucket import bucket
from pallas_kernels import tensorcore

TABLE = Path(__file__).with_name("tuned_tpu.json")
VERSION = 2


@functools.cache
def rows(path: Path = TABLE) -> Mapping[tuple[str, str, str], Mapping[str, int]]:
    """Blocks by op, generation and bucket. A table that cannot be read is none, with a warning."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']}, and {VERSION} is known")
        return {(row["op"], row["generation"], row["bucket"]): row["blocks"] for row in table["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        warnings.warn(f"{path} is not used: {problem}", stacklevel=2)
        return {}


def place(specs: Specs, params: Mapping[str, Any]) -> str:
    """The bucket of a call, with the dtypes that VMEM is shared by: of all arrays, and of the result where it is another."""
    first, out = next(iter(specs.values())).dtype, params.get("out_dtype")
    dtypes = [f"{n}:{s.dtype}" for n, s in sorted(specs.items()) if s.dtype != first]
    return " ".join([str(bucket(specs, params)), *dtypes, *([f"out:{out}"] if out not in (None, first) else [])])


_unused: ContextVar[bool] = ContextVar("tuned blocks are not used", default=False)


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Kernels that are called inside choose by their rules."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def blocks(op: str, kind: Any, params: Mapping[str, Any], fits: Callable[[Any], bool], **arrays: Any) -> Any:
    """The tuned blocks for a call, an instance of the dataclass `kind`, or None.

    Args:
      params: of the op, those that blocks depend on: its mask and `out_dtype`.
      fits: whether the call takes such blocks. The largest call of a bucket has sixteen times the elements of the smallest.
    """
    if _unused.get():
        return None
    specs = {n: Spec(a.shape, str(a.dtype)) for n, a in arrays.items() if a is not None}
    out = params.get("out_dtype")
    found = rows().get((op, tensorcore.generation().name, place(specs, {**params, "out_dtype": out and str(jnp.dtype(out))})))
    try:
        made = None if found is None else kind(**found)
    except Exception as problem:  # a row that this version of the kernel does not take
        warnings.warn(f"{TABLE} has no blocks that {op} takes: {problem}", stacklevel=2)
        return None
    return made if made is not None and fits(made) else None
