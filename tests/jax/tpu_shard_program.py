"""Run by test_tpu_sharding.py in a process of its own: TPU kernels inside `shard_map` on eight simulated devices, interpreted.

An op's first axis (ragged_matmul's columns) is divided over the devices, weights are on all of them. Held to the op's float64 reference on the whole arrays,
results and gradients; those of weights are sums over devices, which jax makes. Prints one JSON line a case.
"""

from __future__ import annotations

import json

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kpt.ops.mask import Causal, Lengths, Mask
from tests.jax.certified import certify, specs_of
from tests.jax.tpu import interpreted, kernel

N = 8
MASK = Mask((Causal(), Lengths()), -1e30)
ALL, COLUMNS = P(), P(None, None, "i")
# arrays, parameters, where arrays are that are not divided over their first axis, and where the result is
CASES = {
    "attention": (specs_of("float32", q=(N, 24, 2, 16), k=(N, 24, 1, 16), v=(N, 24, 1, 16), kv_lengths=((N,), "int32")), {"mask": MASK}, {}),
    "rms_norm": (specs_of("bfloat16", x=(2 * N, 128), weight=(128,)), {}, {"weight": ALL}),
    "layer_norm": (specs_of("float32", x=(3 * N, 128), weight=(128,), bias=(128,)), {}, {"weight": ALL, "bias": ALL}),
    "linear_act": (specs_of("float32", x=(2 * N, 40), w=(40, 24), b=(24,)), {"activation": "silu"}, {"w": ALL, "b": ALL}),
    "glu": (specs_of("float32", x=(2 * N, 40), w_gate=(40, 24), w_up=(40, 24)), {}, {"w_gate": ALL, "w_up": ALL}),
    "rope": (specs_of("float32", x=(N, 16, 2, 128), cos=(N, 16, 128), sin=(N, 16, 128)), {}, {}),
    "cross_entropy": (specs_of("float32", logits=(2 * N, 200), labels=((2 * N,), "int32")), {}, {}),
    "linear_cross_entropy": (specs_of("float32", x=(2 * N, 40), w=(40, 200), labels=((2 * N,), "int32")), {}, {"w": ALL}),
    "matmul": (specs_of("float32", a=(2 * N, 40), b=(40, 24)), {}, {"b": ALL}),
    "ragged_matmul": (specs_of("float32", x=(30, 40), w=(3, 40, 2 * N), group_sizes=((3,), "int32")), {},
                      {"x": ALL, "w": COLUMNS, "group_sizes": ALL, "out": P(None, "i")}),
}  # fmt: skip


def run(mesh: Mesh, name: str) -> None:
    specs, params, elsewhere = CASES[name]
    places = {n: elsewhere.get(n, P("i")) for n in specs}

    def sharded(**call):
        mapped = jax.shard_map(
            lambda arrays: kernel(name)(**arrays, **params), mesh=mesh, in_specs=(places,), out_specs=elsewhere.get("out", P("i"))
        )
        return mapped({n: call[n] for n in specs})

    with interpreted():
        certify(name, specs, params, fn=sharded, seeds=(0,))


if __name__ == "__main__":
    eight = Mesh(np.array(jax.devices()), ("i",))
    assert eight.size == N
    for case in CASES:
        run(eight, case)
        print(json.dumps({"case": case}), flush=True)
