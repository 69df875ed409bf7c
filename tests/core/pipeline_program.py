"""A program whose pipeline ends its process at the step that is named, or nowhere. For `test_pipeline.py`."""

from __future__ import annotations

import json
import os
import signal
import sys

import jax.numpy as jnp
import numpy as np

import kpt


def loss(x, w):
    y = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w
    return jnp.mean(y**3)


def batch():
    return jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32), jnp.ones(32)


def main(store: str, dies_at: str) -> None:
    steps = []

    def began(step: str) -> None:
        steps.append(step)
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    made = kpt.ProductionPipeline(loss, batch(), store=store, budget=0).run(began)
    print(json.dumps({"artifact": str(made.folder), "steps": steps, "verdict": made.verdict}))


if __name__ == "__main__":
    main(*sys.argv[1:])
