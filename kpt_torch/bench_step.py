"""A whole training step of a Llama-class model of transformers: eager, compiled, with Liger's kernels, and through kpt.

    python -m kpt_torch.bench_step [--layers 16] [--only NAME] [--budget 60s] [--json out.json]

Width 2048, 16 heads, MLP of 5632, vocabulary 32000, batch 2, context 4096; bfloat16 autocast over float32 parameters, fused AdamW, SDPA
attention. The contenders run one after the other, each from the same weights on the same batches, the first once more to show the drift
of the machine. `auto_optimize` comes after kpt's others, which choose by what it has measured if they come later. Liger is last, for it
changes transformers' own functions (the rotation of positions among them) for all who come after. The JSON is written anew after each.
Wall time of a step, median and quartiles, over three that nothing waits between, as training runs; peak memory is the allocator's; `losses`
are those of the first steps.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kpt
import kpt_torch
from kpt.auto import Result
from kpt_torch.backend import kpt as kpt_backend

WIDTH, HEADS, HIDDEN, VOCABULARY, BATCH, CONTEXT = 2048, 16, 5632, 32000, 2, 4096
WARM, SAMPLES, UNAWAITED = 3, 6, 3
Step = Callable[[torch.Tensor], torch.Tensor]


def model(layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made: torch.nn.Module = LlamaForCausalLM(LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS, intermediate_size=HIDDEN,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, attn_implementation="sdpa", use_cache=False,
    ))  # fmt: skip
    return made.train()


def contenders(batch: torch.Tensor, budget: str) -> dict[str, Callable[[Any], Any]]:
    """By name: what is done to the model."""

    def auto(m: Any) -> Result:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return kpt.auto_optimize(m, input_ids=batch, labels=batch, budget=budget)

    def liger(m: Any) -> Any:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=m)
        return m

    found: dict[str, Callable[[Any], Any]] = {
        "eager": lambda m: m,
        "torch.compile": torch.compile,
        "kpt_torch.optimize": kpt_torch.optimize,
        "torch.compile, backend kpt": lambda m: torch.compile(m, backend=kpt_backend),
        "kpt.auto_optimize": auto,
        "eager again": lambda m: m,
    }
    return found | ({"liger": liger} if importlib.util.find_spec("liger_kernel") else {})


def run(change: Callable[[Any], Any], weights: Any, batches: list[torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Trains a copy of `weights`, and measures."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    base = copy.deepcopy(weights).to(device)
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-4, fused=True)
    start = time.perf_counter()
    program = change(base)
    about: dict[str, Any] = {}
    if isinstance(program, Result):
        kernels = collections.Counter(f"{s.op}: {s.kernel}" for s in program.plan.sites)
        about = {"kept": program.report.kept, "measured_speedup": program.report.measured_speedup, "noise": program.report.noise,
                 "tuning_seconds": time.perf_counter() - start, "kernels": kernels, "notes": list(program.plan.notes)}  # fmt: skip
        program = program.fn
        start = time.perf_counter()
        torch.cuda.empty_cache()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = program(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    losses = [step(batches[0])]
    torch.cuda.synchronize(device)
    first = time.perf_counter() - start
    losses += [step(b) for b in batches[1:WARM]]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    taken = []
    for first_of in range(WARM, len(batches), UNAWAITED):
        begin = time.perf_counter()
        losses += [step(b) for b in batches[first_of : first_of + UNAWAITED]]
        torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - begin) / UNAWAITED)
    low, middle, high = (1e3 * t for t in statistics.quantiles(taken, n=4))
    return {"ms": middle, "low": low, "high": high, "peak": torch.cuda.max_memory_allocated(device), "first": first,
            "losses": [float(x) for x in losses[: WARM + 2]]} | about  # fmt: skip


def sites(weights: Any, batch: torch.Tensor, device: torch.device) -> tuple[list[str], float]:
    """The plan's sites, and the seconds that it took."""
    base = copy.deepcopy(weights).to(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        plan = kpt_torch.plan(base, input_ids=batch, labels=batch)
    taken = time.perf_counter() - start
    left = [f"{s.op} left: {s.reason[:300]}" for s in plan.skipped]
    return [*sorted(f"{s.op}: {s.kernel}" for s in plan.sites), *left, *plan.notes], taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--budget", default="60s", help="of auto_optimize")
    args = parser.parse_args()
    device = torch.device("cuda")
    weights = model(args.layers)
    torch.manual_seed(1)
    batches = [torch.randint(0, VOCABULARY, (BATCH, CONTEXT), device=device) for _ in range(WARM + SAMPLES * UNAWAITED)]
    found, taken = sites(weights, batches[0], device)
    print(f"plan: {taken:.1f} s", *found, sep="\n  ", flush=True)
    command = f"python -m kpt_torch.bench_step --layers {args.layers} --budget {args.budget}"
    rows: dict[str, Any] = {}
    about = {"kind": "kpt.torch_step", "command": command, "torch": torch.__version__, "transformers": metadata.version("transformers"),
             "device": torch.cuda.get_device_name(), "plan_seconds": taken, "plan": found, "rows": rows}  # fmt: skip
    for name, change in contenders(batches[0], args.budget).items():
        if args.only not in name:
            continue
        try:
            r = rows[name] = run(change, weights, batches, device)
            print(f"{name:28}{r['ms']:8.1f} ms [{r['low']:.1f}, {r['high']:.1f}]  peak {r['peak'] / 2**30:5.1f} GiB  first step "
                  f"{r['first']:.0f} s  losses {', '.join(f'{x:.4f}' for x in r['losses'])}", flush=True)  # fmt: skip
            if "kept" in r:
                kernels = (f"{count} x {what}" for what, count in sorted(r["kernels"].items()))
                print(f"  {'kept' if r['kept'] else 'the original is kept'}; {r['tuning_seconds']:.0f} s of tuning", *kernels, *r["notes"],
                      sep="\n  ", flush=True)  # fmt: skip
        except Exception as problem:  # a contender that fails is a row, not the end
            rows[name] = {"error": f"{type(problem).__name__}: {str(problem)[:500]}"}
            print(f"{name:28}{rows[name]['error'][:300]}", flush=True)
        if args.json:
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            part.replace(args.json)


if __name__ == "__main__":
    main()
