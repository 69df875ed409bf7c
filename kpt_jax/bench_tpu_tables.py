"""The tables of docs/benchmarks about TPUs, from the JSON beside them.

    python -m kpt_jax.bench_tpu_tables docs/benchmarks [--compile]

Writes what stands between `<!-- NAME -->` and `<!-- end -->` in tpu-static.md and tpu-kernels.md. With --compile, every op's kernels are
compiled for every generation first, in bfloat16, forward and backward (tpu-compile.json; `kpt tpu compile` does more, and writes nothing).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "v7x")
OPS = ("attention_causal", "layer_norm", "rms_norm", "cross_entropy", "linear_cross_entropy", "rope", "linear_act", "glu", "matmul",
       "ragged_matmul")  # fmt: skip
"""One benchmark of each."""
Row = Mapping[str, Any]


def trust(rows: Sequence[Row]) -> list[str]:
    """`bench_tpu`'s."""
    lines = ["| what | TPU | scheduled | published | error | bound |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['what']} | {r['generation']} | {r['error'][:60]} | {1e3 * r['published']:.3f} ms | | |")
            continue
        bound = max(r["schedules"], key=lambda s: s["seconds"])["bound"]
        lines.append(f"| {r['what']} | {r['generation']} | {1e3 * r['scheduled']:.3f} ms | {1e3 * r['published']:.3f} ms "
                     f"| {r['off']:+.0%} | {bound} |")  # fmt: skip
    return lines


def peers(rows: Sequence[Row]) -> list[str]:
    """`bench_tpu_peers`' of one generation."""
    lines = ["| | kpt | MXU | around it | peers | plain code by XLA |", "|---|---|---|---|---|---|"]
    for (bench, dims), found in _grouped(rows, "bench", "dims").items():
        ours = next(r for r in found if r["provider"] == "kpt")
        plain = next((r for r in found if r["provider"] == "xla"), None)
        others = "; ".join(f"{r['provider']} {_passes(r)}" for r in found if r["provider"] not in ("kpt", "xla"))
        mxu = f"{ours.get('forward_mxu', 0):.0%}" if ours.get("forward_mxu") else ""
        around = _mib(ours.get("around"))
        lines.append(f"| {bench} {'×'.join(map(str, dims))} | {_passes(ours)} | {mxu} | {around} | {others} | {_plain(plain)} |")
    return lines


def _mib(found: float | None) -> str:
    return "" if found is None else f"{found / 2**20:,.0f} MiB"


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """kpt's time over that of each peer, pass by pass, of those that can be scheduled."""
    told = {}
    for (bench, dims), found in _grouped(rows, "bench", "dims").items():
        ours = next(r for r in found if r["provider"] == "kpt")
        for r in found:
            if r["provider"] in ("kpt", "xla") or "error" in r:
                continue
            for part in ("forward", "backward"):
                if peers_ms := r[f"{part}_ms"]:
                    ratio = float("inf") if "error" in ours else ours[f"{part}_ms"] / peers_ms
                    told[f"{bench} {'×'.join(map(str, dims))} {part} to {r['provider']}"] = ratio
    return told


def score(rows: Sequence[Row]) -> str:
    """In how many passes kpt needs fewer cycles than a peer, and where it does not; a tie counts against it."""
    found = ratios(rows)
    lost = {n: f"{n} by {r - 1:.1%}" for n, r in found.items() if r > 1 + 1e-4}
    ties = sum(r >= 1 - 1e-6 for r in found.values()) - len(lost)
    won = len(found) - len(lost) - ties
    return (f"kpt needs fewer cycles in {won} of {len(found)} passes of peers ({won / len(found):.0%}) and as many in {ties}. "
            f"It loses {'; '.join(lost.values()) or 'none'}.")  # fmt: skip


def kernels(programs: Sequence[Row]) -> list[str]:
    """`kpt tpu compile --json`'s."""
    lines = ["| program | kernel | TPU | VMEM MiB | HBM MiB | cycles | ms | MXU | bound | around it |", f"|{'---|' * 10}"]
    for m in sorted(programs, key=lambda m: (m["program"]["label"], GENERATIONS.index(m["generation"]))):
        label = re.sub(r" both$", "", m["program"]["label"])
        if m["error"] is not None:
            lines.append(f"| {label} | | {m['generation']} | {'refused' if m['refused'] else 'failed'}: {m['error'][:80]} | | | | | | |")
        for i, s in enumerate(m["schedules"]):
            cells = (label, s["kernel"], m["generation"], f"{s['vmem'] / 2**20:.1f}", f"{(s['read'] + s['written']) / 2**20:,.0f}",
                     f"{s['cycles']:,.0f}", f"{1e3 * s['seconds']:.3f}", f"{s['occupancy']['MXU']:.0%}", s["bound"],
                     "" if i else _mib(m.get("around")))  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def rope(rows: Sequence[Row]) -> list[str]:
    """`bench_tpu_rope`'s."""
    lines = ["| B×S×H×KV×D | TPU | forward, kpt | plain | both, kpt | plain |", "|---|---|---|---|---|---|"]
    for (dims, gen), found in _grouped(rows, "dims", "generation").items():
        ms = {(r["passes"], r["provider"]): f"{r['ms']:.2f}" if "ms" in r else "(no program)" for r in found}
        cells = (ms["forward", "kpt"], ms["forward", "xla"], ms["both", "kpt"], ms["both", "xla"])
        lines.append(f"| {'×'.join(map(str, dims))} | {gen} | {' | '.join(cells)} |")
    return lines


def _grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        found.setdefault(tuple(tuple(r[n]) if isinstance(r[n], list) else r[n] for n in names), []).append(r)
    return found


def _passes(r: Row) -> str:
    if "error" in r:
        return f"({r['error'][:60].rstrip()})"
    return f"{r['forward_ms']:.2f} + {r['backward_ms']:.2f}" if r["backward_ms"] else f"{r['forward_ms']:.2f}"


def _plain(r: Row | None) -> str:
    if r is None:
        return ""
    if "error" in r:
        return "out of memory" if "RESOURCE_EXHAUSTED" in r["error"] else f"({r['error'][:40]})"
    time = "no estimate" if r["ms"] is None else f"{r['ms']:.2f}"
    return f"{time}, {r['temporaries'] / 2**20:,.0f} MiB"


def written(folder: Path) -> dict[Path, str]:
    """The pages as they should be."""

    def data(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    tables = {"trust": trust(data("tpu-static.json")["rows"]), "kernels": kernels(data("tpu-compile.json"))}
    tables["rope"] = rope(data("tpu-rope.json")["rows"])
    for gen in GENERATIONS:
        if (folder / f"tpu-peers-{gen}.json").exists():
            rows = data(f"tpu-peers-{gen}.json")["rows"]
            tables[f"peers {gen}"] = [*peers(rows), "", score(rows)]
    pages = {}
    for page in (folder / "tpu-static.md", folder / "tpu-kernels.md"):
        text = page.read_text(encoding="utf-8")
        for name, lines in tables.items():
            body = "\n".join(lines)
            before, mark, rest = text.partition(f"<!-- {name} -->\n")
            if mark:
                text = f"{before}{mark}{body}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
        pages[page] = text
    return pages


def compiled() -> list[Row]:
    from kpt.tpu import GENERATIONS as CHIPS
    from kpt_jax.tpu import compile_programs
    from kpt_jax.tpu_programs import cases, program

    found = compile_programs([program(name, dims) for name, dims in cases(()) if name in OPS], list(CHIPS.values()))
    return [{**(told := m.to_json()), "schedules": [s | {"stretches": []} for s in told["schedules"]]} for m in found]


def main() -> None:
    if "--compile" in sys.argv:
        Path(sys.argv[1], "tpu-compile.json").write_text(json.dumps(compiled(), indent=1) + "\n", encoding="utf-8")
    for page, text in written(Path(sys.argv[1])).items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
