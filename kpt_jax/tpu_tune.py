"""Searches block sizes of the TPU kernels: by compiling and reading schedules, with no TPU, or by measuring on the one that is here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

import kpt
from kpt.errors import HardwareError, KernelError, KptError
from kpt.kernels.spec import unmet
from kpt.tpu import Generation
from kpt_jax.bench_ops import BENCHES
from kpt_jax.tpu import Compiled, Program, compile_programs, compiler_version, measure
from kpt_jax.tpu_programs import blocks_class, default_blocks, make, program, specs_of
from pallas_kernels import tuned
from pallas_kernels.tensorcore import DEVICE_KINDS, DTYPES, LANES

WORTH = 0.99
"""Blocks replace others that take more than this share of their time."""
Sizes = dict[str, int]
Evaluate = Callable[[Sequence[Sizes | None]], Sequence[float | None]]
"""The cost of each blocks, None where they cannot be; for None, that of the kernel's own rule."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One search.

    Attributes:
      bench, dims, dtype, generation: what was searched for.
      default, best: blocks: what the kernel's rule starts from (it cuts them for each of its products to what VMEM holds), and what the
        search found better; the same where it found nothing.
      method: "schedule" or "clock".
      default_cost, cost: cycles by schedule, or seconds by the clock: of the rule as it is called, whose products may each have other
        blocks than `default`, and of `best`.
      tried, failed: how many blocks were, and how many of them the kernel or the compiler refused.
      finished: False where the budget ended the search.
    """

    bench: str
    dims: tuple[int, ...]
    dtype: str
    generation: str
    method: str
    default: Sizes
    default_cost: float
    best: Sizes
    cost: float
    tried: int
    failed: int
    finished: bool


def halved(size: int, multiple: int) -> int:
    """Half of a multiple, rounded up to one."""
    return -(-size // (2 * multiple)) * multiple


def neighbours(sizes: Sizes, extents: Mapping[str, int], multiple: int) -> list[Sizes]:
    """Each size doubled, unless it covers its axis as it is, and halved."""
    doubled = [{**sizes, n: size * 2} for n, size in sizes.items() if size < extents.get(n, size + 1)]
    return doubled + [{**sizes, n: halved(size, multiple)} for n, size in sizes.items() if size > multiple]


def clipped(sizes: Sizes, extents: Mapping[str, int], multiple: int = 8) -> Sizes:
    """Halved as long as they cover their axes, down to 128."""

    def clip(size: int, extent: int) -> int:
        while size > (half := halved(size, multiple)) >= max(extent, LANES):
            size = half
        return size

    return {n: clip(size, extents.get(n, size)) for n, size in sizes.items()}


def search(
    start: Sizes,
    evaluate: Evaluate,
    *,
    extents: Mapping[str, int] = MappingProxyType({}),
    multiple: int = 8,
    more: Callable[[], bool] = lambda: True,
) -> tuple[Sizes, float, float, int, int, bool]:
    """Walks to better neighbours until there is none, from the first of `start`, halved where it is largest, that can be.

    Neighbours that cost the same are walked through: what is better may lie behind them. No sizes are tried twice.

    Args:
      extents: of the axes that the sizes cut, by name, as far as they are known. Larger sizes are all the same.
      multiple: what all sizes are multiples of.
      more: whether there is time for another round.

    Returns:
      The best sizes, their cost, that of the rule, how many were tried, how many failed, and whether the walk came to its end. Where
      nothing is better than the rule, `start` and the rule's cost.

    Raises:
      KptError: the rule itself cannot be, or nothing that is smaller than the start.
    """
    costs: dict[tuple[int, ...], float | None] = {}

    def key(sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes.values())

    (rule,) = evaluate([None])
    best = clipped(start, extents, multiple)
    while rule is not None:
        (costs[key(best)],) = evaluate([best])
        largest = max(best, key=lambda n: best[n])
        if costs[key(best)] is not None or best[largest] <= multiple:
            break
        best = {**best, largest: halved(best[largest], multiple)}
    if rule is None or costs[key(best)] is None:
        raise KptError(f"Blocks were to be tuned from {start}", "The kernel cannot be had with these",
                       "Name another shape or generation; `kpt tpu schedule --op NAME --shape SHAPE` shows this one alone")  # fmt: skip
    cost, edge = costs[key(best)], [best]
    assert cost is not None
    while True:
        new = list({key(n): n for here in edge for n in neighbours(here, extents, multiple) if key(n) not in costs}.values())
        if not new or not more():
            break
        costs.update(zip(map(key, new), evaluate(new), strict=True))
        found = min(new, key=lambda n: costs[key(n)] or float("inf"))
        if (least := costs[key(found)] or float("inf")) < WORTH * cost:
            best, cost, edge = found, least, [found]
        else:
            edge = [n for n in new if costs[key(n)] == cost]
    if cost >= WORTH * rule:
        best, cost = start, rule
    return best, cost, rule, len(costs), sum(c is None for c in costs.values()), not new


_COVERS = {
    "attention": {"q": "rows", "kv": "S", "q_bwd": "rows", "kv_bwd": "S"},
    "rms_norm": {"rows": "ROWS"},
    "layer_norm": {"rows": "ROWS"},
    "cross_entropy": {"rows": "ROWS", "classes": "CLASSES"},
    "linear_cross_entropy": {"rows": "TOKENS", "classes": "CLASSES"},
    "rope": {"positions": "T"},
    "ragged_matmul": {"m": "M", "n": "K N", "k": "K N"},
    # The same blocks are those of both gradients, in which axes change places.
    **dict.fromkeys(("matmul", "linear_act", "glu"), {"m": "M K", "n": "K N", "k": "M K N"}),
}
"""Which axes of a benchmark's shape a block of an op may cut."""


def extents(bench: str, dims: Sequence[int]) -> dict[str, int]:
    """The longest axis that each block cuts in a benchmark's shape."""
    axes = dict(zip(BENCHES[bench].dims.split(), dims, strict=True))
    if BENCHES[bench].op == "attention":  # all query heads of a key head in one block
        axes["rows"] = axes["S"] * axes["N"] // axes["K"]
    return {block: max(axes[a] for a in cut.split()) for block, cut in _COVERS[BENCHES[bench].op].items()}


def measures() -> bool:
    """Whether there is a TPU here, which measures candidates."""
    return jax.default_backend() == "tpu"


def tune(
    bench: str,
    dims: Sequence[int],
    on: Generation,
    *,
    dtype: str = "bfloat16",
    jobs: int | None = None,
    more: Callable[[], bool] = lambda: True,
    done: Callable[[Compiled], None] = lambda _: None,
) -> Tuned:
    """Searches the blocks of one benchmark's kernel, forward and backward together, for one generation.

    On a TPU each candidate is measured instead of compiled for `on`, which is that TPU.

    Raises:
      MissingDependencyError: libtpu is not installed.
      HardwareError: the TPU here is not `on`.
      KptError: the kernel cannot be compiled with its default blocks.
    """
    if dtype not in DTYPES:
        raise KptError(f"Blocks for {dtype} were to be tuned", f"Kernels for TPU compute in {' and '.join(DTYPES)}", "Choose one of them")
    here = measures()
    if not here:
        compiler_version()
    elif (chip := DEVICE_KINDS.get(kind := jax.devices()[0].device_kind)) is None or chip.name != on.profile:
        raise HardwareError(f"Blocks for {on.name} were to be tuned", f"The TPU here, which would measure them, is a {kind}",
                            "Name its generation with --gen, or set JAX_PLATFORMS=cpu to tune by schedules")  # fmt: skip
    multiple = blocks_class(BENCHES[bench].op).MULTIPLE
    start = clipped(default_blocks(bench, dims, dtype, on), extents(bench, dims), multiple)

    def programs(candidates: Sequence[Sizes | None]) -> list[Program]:
        return [program(bench, dims, dtype=dtype, blocks=c or {}) for c in candidates]

    said: list[str] = []

    def by_schedule(candidates: Sequence[Sizes | None]) -> list[float | None]:
        made = compile_programs(programs(candidates), [on], jobs=jobs, done=done)
        said.extend(m.error for m in made if m.error is not None)
        return [m.cycles if m.error is None else None for m in made]

    evaluate = (lambda c: by_clock(programs(c))) if here else by_schedule
    try:
        best, cost, first, tried, failed, finished = search(
            start, evaluate, extents=extents(bench, dims), multiple=multiple, more=more
        )
    except KptError as none:
        raise KptError(none.asked, f"{none.possible}{f': {said[-1]}' if said else ''}", none.advice) from None
    method = "clock" if here else "schedule"
    return Tuned(bench, tuple(dims), dtype, on.name, method, start, first, best, cost, tried, failed, finished)


def by_clock(programs: Sequence[Program], *, clock: Callable[[], float] = time.perf_counter) -> list[float | None]:
    """Seconds of each program on the device that is here, with random arrays; None where the kernel or the compiler refuses it."""
    found: list[float | None] = []
    for p in programs:
        try:
            fn, args = make(**p.given)
            found.append(measure(jax.jit(fn), [_random(a) for a in args], clock=clock))
        except (KernelError, jax.errors.JaxRuntimeError):
            found.append(None)
    return found


def _random(tree: Any) -> Any:
    def fill(a: Any) -> Any:
        if not isinstance(a, jax.ShapeDtypeStruct):
            return a
        if jnp.issubdtype(a.dtype, jnp.floating):
            return jax.random.normal(jax.random.key(0), a.shape, a.dtype)
        return jnp.zeros(a.shape, a.dtype)

    return jax.tree.map(fill, tree)


def row(result: Tuned, on: Generation) -> dict[str, Any]:
    """As the shipped table has it."""
    bench = BENCHES[result.bench]
    unit, costs = ("seconds", (result.cost, result.default_cost)) if result.method == "clock" else (
        "cycles", (round(result.cost), round(result.default_cost)))  # fmt: skip
    return {
        "op": bench.op, "generation": on.profile, "bucket": tuned.place(specs_of(result.bench, result.dims, result.dtype), bench.params),
        "blocks": result.best, "method": result.method, unit: costs[0], f"default_{unit}": costs[1], "dims": list(result.dims),
    }  # fmt: skip


def require_table(path: Path) -> None:
    """Raises:
    KptError: nothing can be written there.
    """
    if not path.resolve().parent.is_dir():
        raise KptError(f"Tuned blocks were to be put into {path}", "Its folder does not exist", "Make it, or name another file")
    _rows(path)


def write(path: Path, result: Tuned, on: Generation, command: str) -> None:
    """Puts better blocks into a table, in place of those for the same bucket; at once or not at all.

    Where the kernel's rule proved best, what the table had is taken out, unless the budget ended the search.
    """
    places = {(r["op"], r["generation"], r["bucket"]): dict(r) for r in _rows(path)}
    new = row(result, on)
    key = new["op"], new["generation"], new["bucket"]
    if result.best != result.default:
        versions = {n: metadata.version(n) for n in ("jax", "libtpu") if unmet(n) is None}
        origin = {"command": command, **versions, "kpt": kpt.__version__, "date": datetime.date.today().isoformat()}
        places[key] = {**new, "origin": origin}
    elif result.finished:
        places.pop(key, None)
    table = {"version": tuned.VERSION, "rows": [places[k] for k in sorted(places)]}
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, suffix=".part", delete=False, encoding="utf-8") as part:
        try:
            json.dump(table, part, indent=1)
            part.write("\n")
            part.close()
            os.replace(part.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part.name)
            raise


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != tuned.VERSION:
            raise ValueError(f"version {table['version']}")
        return list(table["rows"])
    except (ValueError, KeyError, TypeError) as problem:
        raise KptError(f"Tuned blocks were to be added to {path}", f"It is no table of them: {problem}", "Name another file") from None
