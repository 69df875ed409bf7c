"""What kpt costs the CPU between kernels: `python -m kpt_torch.bench_overhead`.

A Llama of transformers with 16 layers and a width of 64, on a CPU, so that little but Python and the dispatcher takes time: forward and
backward under bfloat16 autocast, the fastest of 40 calls in milliseconds, as written, through kpt, and through kpt with every kernel behind
the dispatcher, as where somebody watches. The three take turns.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch

import kpt_torch
from kpt_torch import library

CALLS = 40


def once(program: Any, ids: torch.Tensor, watched: bool) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    with mock.patch.object(library, "nobody_watches", (lambda tensors: False) if watched else library.nobody_watches):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = program(input_ids=ids, labels=ids).loss
        between = time.perf_counter()
        loss.backward()
        return 1e3 * (between - start), 1e3 * (time.perf_counter() - between)


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128, vocab_size=256,
        max_position_embeddings=64, attn_implementation="sdpa", use_cache=False,
    )).train()  # fmt: skip
    ids = torch.randint(0, 256, (1, 16))
    fast = kpt_torch.optimize(model)
    contenders = {"as written": (model, False), "through kpt": (fast, False), "behind the dispatcher": (fast, True)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(3 + CALLS):
        for name, (program, watched) in contenders.items():
            taken[name].append(once(program, ids, watched))
    for name, times in taken.items():
        forward, backward = (min(passes) for passes in zip(*times[3:], strict=True))
        print(f"{name:24}{forward:6.1f} + {backward:.1f} ms")


if __name__ == "__main__":
    main()
