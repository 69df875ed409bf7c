"""The PyTorch half of `kpt twin`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kpt.twin import AdamW, Arrays, Tapped, Twin


class Side:
    """See `kpt.twin.Side`."""

    framework = "torch"

    def __init__(self, twin: Twin):
        self._loss, self._settings = twin.torch, twin.optimizer

    def forward(self, weights: Arrays, batch: Arrays, forced: Arrays | None) -> tuple[float, dict[str, Tapped]]:
        taps: dict[str, Tapped] = {}
        given = forced or {}

        def tap(name: str, value: torch.Tensor) -> torch.Tensor:
            taps[name] = Tapped(value.detach().float().cpu().numpy(), str(value.dtype).removeprefix("torch."))
            return _tensor(given[name]).to(value) if name in given else value

        with torch.no_grad():
            loss = self._loss(_tensors(weights), _tensors(batch), tap)
        return float(loss), taps

    def gradients(self, weights: Arrays, batch: Arrays) -> tuple[float, dict[str, np.ndarray]]:
        own = _tensors(weights, leaves=True)
        loss = self._loss(own, _tensors(batch), _through)
        found = torch.autograd.grad(loss, list(own.values()), materialize_grads=True)
        return float(loss.detach()), {n: g.cpu().numpy() for n, g in zip(own, found, strict=True)}

    def updated(self, weights: Arrays, gradients: Arrays) -> dict[str, np.ndarray]:
        own = _tensors(weights, leaves=True)
        for name, weight in own.items():
            weight.grad = _tensor(gradients[name])
        _adamw(own, self._settings).step()
        return {n: w.detach().cpu().numpy() for n, w in own.items()}

    def train(self, weights: Arrays, batch: Callable[[int], Arrays], steps: int, done: Callable[[int], None]) -> list[float]:
        own = _tensors(weights, leaves=True)
        optimizer, losses = _adamw(own, self._settings), []
        for i in range(steps):
            optimizer.zero_grad()
            loss = self._loss(own, _tensors(batch(i)), _through)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            done(i)
        return losses


def _through(name: str, value: torch.Tensor) -> torch.Tensor:
    return value


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))  # a copy: an optimizer changes it in place


def _tensors(arrays: Arrays, leaves: bool = False) -> dict[str, Any]:
    return {n: _tensor(a).requires_grad_(leaves) for n, a in arrays.items()}


def _adamw(weights: dict[str, Any], settings: AdamW) -> torch.optim.AdamW:
    s = settings
    return torch.optim.AdamW(weights.values(), lr=s.learning_rate, betas=(s.b1, s.b2), eps=s.eps, weight_decay=s.weight_decay)
