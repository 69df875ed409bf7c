"""Two processes on gloo train one small model, wrapped in every way of `CASES`: `python -m tests.torch.distributed_program DIRECTORY CASE...`

Writes what the processes saw of each case into `DIRECTORY/<rank>.pt`: {case: {"losses", "gradients", "sites", "notes"}}, or {"error": text}.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kpt_torch
from kpt_torch.backend import Backend
from kpt_torch.backend import kpt as compile_backend

WIDTH, HEADS, VOCAB, RANKS = 32, 4, 48, 2


class Block(nn.Module):
    def __init__(self, recompute: bool):
        super().__init__()
        self.recompute = recompute
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x):
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        q, k, v = (a.unflatten(-1, (HEADS, -1)).transpose(1, 2) for a in self.qkv(n).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        p = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return x + self.out((p @ v).transpose(1, 2).flatten(2))

    def forward(self, x):
        return checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)


class Model(nn.Module):
    def __init__(self, recompute: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(recompute), Block(recompute)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def make(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(2, 16, WIDTH, generator=g), torch.randint(0, VOCAB, (2, 16), generator=g)


def sharded(model: Model) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def in_parallel(model: Model) -> Model:
    """Each product over heads cut by columns, its result whole on both."""
    for block in model.blocks:
        parallelize_module(block, init_device_mesh("cpu", (RANKS,)), {"out": ColwiseParallel(output_layouts=Replicate())})
    return model


def blocks_optimized(model: Any) -> Any:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = kpt_torch.optimize(block)
    return model


def compiled(module: Any, inner: str) -> Any:
    return torch.compile(module, backend=compile_backend, options={"inner": inner})


BUCKETS = 0.005  # megabytes: several for this model
CASES: dict[str, Callable[[], Any]] = {
    "DDP of an optimized module": lambda: DistributedDataParallel(kpt_torch.optimize(make()), bucket_cap_mb=BUCKETS),
    "DDP, optimized": lambda: kpt_torch.optimize(DistributedDataParallel(make(), bucket_cap_mb=BUCKETS)),
    "DDP of a checkpointed module": lambda: DistributedDataParallel(kpt_torch.optimize(make(recompute=True))),
    "DDP, compiled": lambda: compiled(DistributedDataParallel(make()), "eager"),
    "DDP in buckets, compiled": lambda: compiled(DistributedDataParallel(make(), bucket_cap_mb=BUCKETS), "aot_eager"),
    "fully_shard of an optimized module": lambda: sharded(kpt_torch.optimize(make())),
    "fully_shard, optimized": lambda: kpt_torch.optimize(sharded(make())),
    "fully_shard of optimized blocks": lambda: sharded(blocks_optimized(make())),
    "fully_shard, blocks optimized": lambda: blocks_optimized(sharded(make())),
    "fully_shard, compiled": lambda: compiled(sharded(make()), "eager"),
    "tensor parallel, optimized": lambda: kpt_torch.optimize(in_parallel(make())),
}  # fmt: skip
SAME_BATCH = ("tensor parallel, optimized",)


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


def run(case: str, rank: int) -> dict[str, Any]:
    torch._dynamo.reset()
    backends: list[Backend] = []
    made = Backend.__post_init__

    def noted(self: Backend) -> None:
        made(self)
        backends.append(self)

    Backend.__post_init__ = noted  # type: ignore[method-assign]
    try:
        model = CASES[case]()
        given = batch(0 if case in SAME_BATCH else rank)
        losses = []
        for _ in range(2):  # the second time nothing is compiled
            model.zero_grad()
            loss = model(*given)
            loss.backward()
            losses.append(loss.item())
        found = {plain(n): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
        if case == "fully_shard, optimized":  # its methods know what it is
            model.unshard()
            assert not isinstance(model.head.weight, DTensor)
            model.reshard()
        plans = [p for b in backends for p in b.plans]
        return {"losses": losses, "gradients": found, "sites": sorted(s.op for p in plans for s in p.sites),
                "notes": [n for p in plans for n in p.notes]}  # fmt: skip
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        Backend.__post_init__ = made  # type: ignore[method-assign]


def work(rank: int, directory: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096  # type: ignore[misc]  # as small as the others: one megabyte would hold the whole model
    dist.init_process_group("gloo", init_method=f"file://{os.path.join(directory, 'store')}", rank=rank, world_size=RANKS)
    torch.save({case: run(case, rank) for case in cases}, os.path.join(directory, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1], sys.argv[2:]), nprocs=RANKS)
