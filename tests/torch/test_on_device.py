"""What proofs do with tensors is what `kpt.validation` does with NumPy arrays. The CPU is the device here."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from kpt.ops.base import Spec
from kpt.validation import metrics
from kpt_torch import on_device
from kpt_torch.capture import to_numpy
from kpt_torch.on_device import OnDevice

ROOM = OnDevice(torch.device("cpu"))


def pair(dtype: torch.dtype, size: int, seed: int, special: bool) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, (size,), generator=g).to(dtype), torch.randint(0, 2, (size,), generator=g).to(dtype)
    r = torch.randn(size, generator=g, dtype=torch.float64) * torch.exp(torch.randn(size, generator=g, dtype=torch.float64) * 20)
    a = (r * (1 + 0.01 * torch.randn(size, generator=g, dtype=torch.float64))).to(dtype)
    r = r.to(dtype) if seed % 2 else r
    if special:
        for value in (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-42, 65504.0, -1e39):
            for t in (a, r):
                if math.isfinite(value) and abs(value) > torch.finfo(t.dtype).max:
                    continue
                t[torch.randint(0, size, (max(1, size // 40),), generator=g)] = value
    return a, r


def close(found, exact) -> None:
    for field in dataclasses.fields(exact):
        x, y = getattr(found, field.name), getattr(exact, field.name)
        if field.name == "percentiles":
            assert x.keys() == y.keys() and all(math.isclose(x[n], y[n], rel_tol=1e-12) for n in y), (x, y)
        else:
            assert x == y or math.isclose(x, y, rel_tol=1e-12), (field.name, x, y)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool])
def test_figures_are_those_of_numpy(dtype, special, monkeypatch):
    monkeypatch.setattr(on_device, "_BLOCK", 300)
    for size in (1, 2, 299, 300, 301, 1000):
        for seed in range(6):
            a, r = pair(dtype, size, seed, special)
            close(on_device.figures(a.reshape(-1, 1), r.reshape(-1, 1)), metrics(to_numpy(a), to_numpy(r)))


def test_nothing_finite_and_nothing_at_all():
    for a, r in ((torch.full((3,), math.nan), torch.full((3,), math.inf)), (torch.ones(0), torch.ones(0)), (torch.zeros(4), torch.zeros(4))):
        close(ROOM.metrics(a, r), metrics(to_numpy(a), to_numpy(r)))
        if a.numel():
            close(on_device.figures(a, r), metrics(to_numpy(a), to_numpy(r)))


def test_shapes_that_differ_are_an_error():
    from kpt.errors import ValidationError

    with pytest.raises(ValidationError, match="shape"):
        ROOM.metrics(torch.ones(3), torch.ones(4))


def test_percentiles_of_many_elements(monkeypatch):
    monkeypatch.setattr(on_device, "KEPT", 1000)
    monkeypatch.setattr(on_device, "_BLOCK", 7001)
    r = torch.zeros(50_000)
    a = torch.linspace(0, 1, 50_000)
    found = on_device.figures(a, r).percentiles
    assert found == pytest.approx({"50": 0.5, "90": 0.9, "99": 0.99, "99.9": 0.999}, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_a_digest_is_of_values_and_their_places(dtype, monkeypatch):
    monkeypatch.setattr(on_device, "_BLOCK", 50)
    x = (torch.arange(200) % 7 % 2).to(dtype).reshape(10, 20)
    digest = ROOM.digest(x)
    assert digest == ROOM.digest(x.clone()) and len(digest) == 32
    assert digest == ROOM.digest(x.t().contiguous().t())
    seen = {digest}
    for i in range(200):
        other = x.clone()
        other.view(-1)[i] = 1 - other.view(-1)[i].to(torch.uint8)
        seen.add(ROOM.digest(other))
    assert len(seen) == 201
    swapped = x.clone()
    swapped[0, 0], swapped[9, 1] = x[9, 1], x[0, 0]
    assert (ROOM.digest(swapped) == digest) == bool(x[0, 0] == x[9, 1])


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, -math.inf), (2.0, 4.0)])
def test_masks_of_wide_numbers_have_digests_of_their_own(values):
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 2, (4000, 32), generator=generator)
    made = torch.tensor(values, dtype=torch.float64)[picks]
    assert len({ROOM.digest(m) for m in made}) == len({tuple(p.tolist()) for p in picks})


def test_a_digest_of_any_tensor():
    x = torch.randn(6, dtype=torch.complex128)
    assert ROOM.digest(x.conj()) == ROOM.digest(x.conj().resolve_conj()) != ROOM.digest(x)
    assert ROOM.digest(x.conj().imag) == ROOM.digest(-x.imag)


def test_a_draw_is_of_its_seed_mean_and_deviation():
    spec = Spec((64, 500), "bfloat16")
    x = ROOM.normal(7, spec, 1.0, 0.25)
    assert x.dtype == torch.bfloat16 and torch.equal(x, ROOM.normal(7, spec, 1.0, 0.25)) and not torch.equal(x, ROOM.normal(8, spec, 1.0, 0.25))
    assert float(x.float().mean()) == pytest.approx(1, abs=0.01) and float(x.float().std()) == pytest.approx(0.25, rel=0.02)


def test_put_and_get_are_inverse():
    import ml_dtypes

    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert ROOM.get(ROOM.put(x)).dtype == x.dtype and (ROOM.get(ROOM.put(x)) == x).all()
