"""Never slower, as a fact: `kpt.auto_optimize` case by case, and what it kept measured again. Both front ends' `bench_auto` run it."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kpt
from kpt.tuning.rounds import gain

SLOWER = 0.02
Case = tuple[str, Callable[..., Any], Sequence[Any]]
"""A name, a function or model, and its inputs."""
Again = Callable[[Callable[..., Any], Callable[..., Any], Sequence[Any]], tuple[Sequence[float], Sequence[float]]]
"""`again(original, kept, inputs)`: seconds of both by rounds, gradients with them where `auto_optimize` measures these."""


def row(case: Case, again: Again, budget: str) -> dict[str, Any]:
    """A case is slower if its second measurement says so by more than `SLOWER`, the noise of the ratio taken off."""
    name, fn, inputs = case
    start = time.perf_counter()
    result = kpt.auto_optimize(fn, *inputs, budget=budget)
    taken = time.perf_counter() - start
    before, after = again(fn, result.fn, inputs)
    log, noise = gain(before, after)
    return {
        "case": name, "kept": result.report.kept, "kernels": sorted({s.kernel for s in result.plan.sites}),
        "speedup": result.report.measured_speedup, "again": math.exp(log), "noise": noise,
        "slower": log + 2 * noise < math.log(1 - SLOWER), "seconds": taken,
        "milliseconds": 1e3 * sorted(before)[len(before) // 2], "notes": list(result.plan.notes),
    }  # fmt: skip


def run(doc: str | None, command: str, cases: Iterable[Case], again: Again, about: Mapping[str, Any]) -> None:
    """The command line: a table as cases come, and JSON, written anew after each: what is in the file already is not measured again."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10s", help="for timing the kernels of a case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    told = {"kind": "kpt.auto", "command": f"{command} --budget {args.budget}", **about}
    rows: list[dict[str, Any]] = _found(args.json, told)
    print(f"{'case':52}{'original ms':>12}{'measured':>10}{'again':>8}{'noise':>7}{'tuning s':>9}  kept")
    for case in cases:
        if args.only not in case[0] or case[0] in {r["case"] for r in rows}:
            continue
        try:
            rows.append(row(case, again, args.budget))
        except Exception as problem:  # one case that cannot be had is a row, and not the end
            rows.append({"case": case[0], "error": f"{type(problem).__name__}: {str(problem)[:300]}"})
        if args.json:
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
            part.replace(args.json)
        if "error" in (r := rows[-1]):
            print(f"{case[0]:52}{r['error'][:80]}", flush=True)
            continue
        print(f"{case[0]:52}{r['milliseconds']:12.3f}{r['speedup']:9.2f}x{r['again']:7.2f}x{r['noise']:7.1%}{r['seconds']:9.1f}  "
              f"{', '.join(r['kernels']) if r['kept'] else 'the original'}{'  SLOWER' if r['slower'] else ''}", flush=True)  # fmt: skip
    print(f"{sum(r.get('slower', False) for r in rows)} of {len(rows)} slower than the original by more than {SLOWER:.0%}")


def _found(path: Path | None, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run that was ended, if it was the same command in the same place."""
    if path is None or not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    return list(data["rows"]) if {n: data.get(n) for n in told} == dict(told) else []
