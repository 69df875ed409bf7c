"""Sharded arrays through optimized functions: same numbers, same shardings, no tensor gathered that need not be."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("sharded_program.py")
CASES = {
    "attention over batch": "attention",
    "attention over batch and heads": "attention",
    "attention over sequence": "attention",
    "long attention over sequence": "attention",
    "attention in shard_map": "attention",
    "norm over batch and sequence": "rms_norm",
    "norm over features": "rms_norm",
    "mlp over batch": "linear_act",
    "mlp over columns and rows": "linear_act",
    "loss over batch and sequence": "cross_entropy",
}


@pytest.fixture(scope="module")
def outcomes():
    root = PROGRAM.parents[2]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "KPT_CERTIFY": "off",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, str(PROGRAM)], env=env, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"after {[x['case'] for x in lines]}: {done.stderr[-3000:]}"
    return {x["case"]: x for x in lines}


@pytest.mark.parametrize(("case", "op"), CASES.items(), ids=CASES)
def test_sharded(outcomes, case, op):
    """The program has compared the numbers."""
    found = outcomes[case]
    assert found["ops"] == [op]
    assert found["same sharding"]
    if found["no gather expected"]:
        plain, swapped, plain_backward, swapped_backward = found["gathered"]
        assert swapped <= plain and swapped_backward <= plain_backward, found
