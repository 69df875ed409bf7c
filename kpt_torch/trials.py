"""Candidates for a call, compiled and timed here: the process that `kpt.tuning.trials` starts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from kpt import ops
from kpt.kernels.spec import resolve
from kpt.strategy.certify import draw
from kpt.tuning.measurements import BOTH
from kpt.tuning.trials import Sample, Trial, serve
from kpt_torch.capture import from_numpy
from kpt_torch.settings import SETTINGS


def ready(trial: Trial, kernel: str) -> Sample:
    """One candidate on random tensors."""
    fn = functools.partial(resolve(trial.kernels[kernel]), **trial.params)
    device = torch.device(trial.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where another package's kernel may launch, whatever its arrays are on
    arrays = arrays_of(trial, device)
    moving = [n for n, a in arrays.items() if n in ops.op(trial.op).learned and a.is_floating_point()]

    def forward() -> Any:
        with torch.no_grad():
            return fn(**arrays)

    if trial.passes != BOTH or not moving:
        return functools.partial(sample, forward, device)
    given: Mapping[str, torch.Tensor] = {n: a.detach().requires_grad_(n in moving) for n, a in arrays.items()}
    out = forward()
    cotangents = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]

    def both() -> Any:
        out = fn(**given)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), [given[n] for n in moving], cotangents, allow_unused=True)

    return functools.partial(sample, both, device)


_held: list[tuple[Trial, dict[str, torch.Tensor]]] = []
"""The tensors of the trial under way, which its candidates share."""


def arrays_of(trial: Trial, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tensors for a call; the same as long as it is the same trial."""
    if not _held or _held[0][0] is not trial:
        _held.clear()
        rng = np.random.default_rng(0)
        made = {}
        for n, s in trial.specs.items():
            if "float" in s.dtype:  # made on the device; weights are scaled so that products stay near one
                scale = s.shape[-2] ** -0.5 if n in ("w", "w_gate", "w_up") else 1.0
                made[n] = (scale * torch.randn(s.shape, device=device)).to(getattr(torch, s.dtype))
            else:
                made[n] = from_numpy(draw(rng, s, n, trial.specs), device)
        _held.append((trial, made))
    return _held[0][1]


def sample(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds a call, over as many calls."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    serve(ready, SETTINGS)
