"""kpt's TPU kernels beside other people's and XLA's, all scheduled by the TPU's own compiler with no TPU here.

    python -m kpt_jax.bench_tpu_peers [--gen v5e,v6e] [--json docs/benchmarks/tpu-peers.json]

Each peer is taken at the best of several block sizes, searched anew for every shape of a product, and for every length and head dim of
attention: at the first row that has them. XLA's time is its own estimate, and none where it does not know some operation. Results are
cached: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from kpt.tpu import Generation, Schedule, generation
from kpt_jax.bench_ops import BENCHES
from kpt_jax.tpu import Compiled, compile_programs
from kpt_jax.tpu_programs import MOE, OURS, XLA, installed_peers, program

ROWS: tuple[tuple[str, tuple[int, ...], str], ...] = (
    ("attention_causal", (4, 4096, 16, 16, 128), "both"),
    ("matmul", (4096, 4096, 4096), "forward"),
    ("matmul", (8192, 8192, 8192), "forward"),
    ("ragged_matmul", MOE, "both"),
    ("attention", (4, 4096, 16, 16, 128), "both"),
    ("attention_causal", (4, 4096, 32, 8, 128), "both"),
    ("attention", (4, 4096, 32, 8, 128), "both"),
    ("attention_causal", (1, 16384, 16, 16, 128), "both"),
    ("attention", (1, 16384, 16, 16, 128), "both"),
    ("attention_causal", (4, 4096, 32, 32, 64), "both"),
    ("attention", (4, 4096, 32, 32, 64), "both"),
    ("linear_cross_entropy", (8192, 4096, 128256), "both"),
    ("layer_norm", (16384, 4096), "both"),
    ("rms_norm", (16384, 4096), "both"),
    ("glu", (8192, 4096, 14336), "both"),
    ("linear_act", (8192, 4096, 16384), "both"),
    ("cross_entropy", (8192, 128256), "both"),
    ("rope", (4, 4096, 32, 128), "both"),
)
_BACKWARD = re.compile("transpose|bwd|dkv|_dq|tgmm")


def compare(on: Generation, rows: Any = ROWS, say: Any = print) -> list[dict[str, Any]]:
    """One result for each row and provider."""
    best: dict[Any, dict[str, Any] | None] = {}
    found = []
    for name, dims, passes in rows:
        peers = installed_peers(name)
        for peer, its in peers.items():
            if (place := (peer, *_alike(name, dims))) not in best:
                settings = list(its.settings())
                tried = compile_programs([program(name, dims, passes=passes, provider=peer, blocks=b) for b in settings], [on])
                works = [(m.cycles, b) for m, b in zip(tried, settings, strict=True) if m.error is None]
                best[place] = min(works, key=lambda w: w[0])[1] if works else None
        providers = [(OURS, None), *((p, best[p, *_alike(name, dims)]) for p in peers)]
        programs = [program(name, dims, passes=passes, provider=p, blocks=b) for p, b in providers if p == OURS or b is not None]
        plain = program(name, dims, passes=passes, provider=XLA)
        for made in (*compile_programs(programs, [on]), *compile_programs([plain], [on], schedules=False)):
            found.append(_result(made, name, dims, passes))
            say(json.dumps(found[-1]))
        for p, b in providers:
            if p != OURS and b is None:
                nothing = {"provider": p, "generation": on.name, "error": "no blocks work"}
                found.append({"bench": name, "dims": dims, "passes": passes, **nothing})
                say(json.dumps(found[-1]))
    return found


def of_pass(made: Compiled, name: str) -> list[Schedule]:
    """The kernels of the "forward" or the "backward" pass, told by the names that they are given."""
    return [s for s in made.schedules if bool(_BACKWARD.search(s.kernel)) == (name == "backward")]


def short(error: str | None) -> str:
    """An error as a row keeps it: its beginning, and files without their folders, which are this machine's."""
    return re.sub(r"/\S+/", "", error or "")[:300]


def _alike(name: str, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """What rows have in common that share a peer's best blocks."""
    op = BENCHES[name].op
    return (op, dims[1], dims[-1]) if op == "attention" else (op, *dims)


def _result(made: Compiled, name: str, dims: tuple[int, ...], passes: str) -> dict[str, Any]:
    provider = made.program.given["provider"]
    said = {"bench": name, "dims": dims, "passes": passes, "provider": provider, "generation": made.generation}
    if made.error is not None:
        return said | {"error": short(made.error)}
    if provider == XLA:
        ms = None if made.estimated is None else 1e3 * made.estimated
        return said | {"ms": ms, "temporaries": made.temporaries, "accessed": made.accessed}
    forward, backward = of_pass(made, "forward"), of_pass(made, "backward")
    return said | {
        "blocks": made.program.given["blocks"],
        "ms": 1e3 * made.seconds,
        "forward_ms": 1e3 * sum(s.seconds for s in forward),
        "backward_ms": 1e3 * sum(s.seconds for s in backward),
        "mxu": sum(s.occupancy["MXU"] * s.cycles for s in made.schedules) / max(1.0, made.cycles),
        "forward_mxu": sum(s.occupancy["MXU"] * s.cycles for s in forward) / max(1.0, sum(s.cycles for s in forward)),
        "bounds": [s.bound for s in made.schedules],
        "read": sum(s.read for s in made.schedules),
        "written": sum(s.written for s in made.schedules),
        "vmem": max(s.vmem for s in made.schedules),
        "temporaries": made.temporaries,
        "around": made.around,
        "unknown": sum(s.unknown for s in made.schedules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gen", default="v5e,v6e,v5p,v7x")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [r for name in args.gen.split(",") for r in compare(generation(name), say=lambda line: print(line, flush=True))]
    if args.json:
        versions = {n: metadata.version(n) for n in ("jax", "libtpu", "tokamax") if importlib.util.find_spec(n)}
        told = {"command": f"python -m kpt_jax.bench_tpu_peers --gen {args.gen} --json {args.json}", **versions, "rows": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
