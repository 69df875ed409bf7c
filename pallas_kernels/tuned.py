"""The block sizes that `kpt tpu tune` found better than the rules of the kernels, shipped as data with where they come from."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kpt.ops.base import Spec
from kpt.tuning.bucket import bucket
from pallas_kernels import tensorcore

TABLE = Path(__file__).with_name("tuned_tpu.json")
VERSION = 1


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


def blocks(op: str, kind: Any, params: Mapping[str, Any], **arrays: Any) -> Any:
    """The tuned blocks for a call, an instance of the dataclass `kind`, or None."""
    specs = {n: Spec(a.shape, str(a.dtype)) for n, a in arrays.items() if a is not None}
    found = rows().get((op, tensorcore.generation().name, str(bucket(specs, params))))
    try:
        return None if found is None else kind(**found)
    except Exception as problem:  # a row that this version of the kernel does not take
        warnings.warn(f"{TABLE} has no blocks that {op} takes: {problem}", stacklevel=2)
        return None
