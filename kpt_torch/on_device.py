"""What a proof does with tensors, on the device that they are on: see `kpt.strategy.arrays.Arrays`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from kpt.ops.base import Spec
from kpt.validation import MARK, ErrorMetrics
from kpt.validation.metrics import KEPT, PERCENTILES, metrics
from kpt_torch.capture import from_numpy, to_numpy
from kpt_torch.library import torch_dtype

_BLOCK = 1 << 22
"""Elements that are compared at a time, in float64: 32 MiB for each array on the way."""
_HASHED = -7046029254386353131  # 2**64 divided by the golden ratio, odd, as a signed number


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """Proofs on tensors of one device."""

    device: torch.device

    def put(self, array: np.ndarray) -> torch.Tensor:
        return from_numpy(array, self.device)

    def get(self, array: torch.Tensor) -> np.ndarray:
        return to_numpy(array)

    def normal(self, seed: int, spec: Spec, mean: float, deviation: float) -> torch.Tensor:
        dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(spec.shape, generator=generator, device=self.device, dtype=dtype)
        return drawn.mul_(deviation).add_(mean).to(torch_dtype(spec.dtype))

    def nudged(self, array: torch.Tensor, seed: int, step: float) -> torch.Tensor:
        """As `kpt.validation.conditioning.nudged`."""
        wide = array.detach().to(torch.float64 if array.dtype == torch.float64 else torch.float32)
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.rand(wide.shape, generator=generator, device=self.device, dtype=wide.dtype).mul_(2).sub_(1)
        return torch.where(wide.abs() < MARK, wide * drawn.mul_(step).add_(1), wide).to(array.dtype)

    def metrics(self, actual: torch.Tensor, reference: torch.Tensor) -> ErrorMetrics:
        """By NumPy on a CPU, where its blocks stay in the caches, where float64 may be missing, and of what is rare."""
        rare = actual.shape != reference.shape or actual.dtype == torch.float64 or actual.numel() == 0
        if self.device.type != "cuda" or rare or actual.is_complex() or reference.is_complex():
            return metrics(to_numpy(actual), to_numpy(reference))
        return figures(actual, reference)

    def digest(self, array: torch.Tensor) -> str:
        """Of all elements' bits a mixed one, times an odd number of its place's own, mixed again, and their sum modulo 2**64; twice."""
        flat = array.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
        found = [0, 0]
        for i in range(0, bits.numel(), _BLOCK):
            block = bits[i : i + _BLOCK].long()
            place = torch.arange(i, i + block.numel(), device=block.device) * _HASHED
            for turn in range(2):
                place = _mixed(place) * _HASHED | 1
                found[turn] += int((_mixed(_mixed(block) * place) * _HASHED).sum())
        return "".join(f"{n % (1 << 64):016x}" for n in found)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """The upper half of 64 bits in the lower one, too: products carry upwards alone."""
    return bits ^ ((bits >> 32) & 0xFFFFFFFF)


def figures(actual: torch.Tensor, reference: torch.Tensor) -> ErrorMetrics:
    """Those of `kpt.validation.metrics`, computed where the tensors are; percentiles of a large tensor are of other elements."""
    a, r = actual.detach().reshape(-1), reference.detach().reshape(-1)
    every = math.ceil(a.numel() / KEPT)
    parts = [_part(a[i : i + _BLOCK], r[i : i + _BLOCK], -i % every, every) for i in range(0, a.numel(), _BLOCK)]
    told = torch.stack([p for p, _ in parts]).tolist()
    errors = torch.cat([e for _, e in parts]).cpu().numpy()
    errors = errors[errors >= 0]
    mismatch = int(sum(f[6] for f in told))
    if not errors.size and not any(f[7] for f in told):
        nothing = dict.fromkeys(PERCENTILES, 0.0)
        return ErrorMetrics(a.numel(), 0.0, 0.0, 0.0, 0.0, nothing, 0.0, 0.0, 0.0, mismatch)
    largest = [max(f[i] for f in told) for i in range(4)]
    abs_l2, reference_l2 = (math.hypot(*(f[i] for f in told)) for i in (4, 5))
    percentiles = np.percentile(errors, [float(p) for p in PERCENTILES]) if errors.size else [largest[0]] * len(PERCENTILES)
    return ErrorMetrics(
        size=a.numel(),
        max_abs=largest[0],
        max_rel=largest[1],
        rel_l2=abs_l2 / reference_l2 if reference_l2 else (math.inf if abs_l2 else 0.0),
        max_ulp=largest[2],
        percentiles=dict(zip(PERCENTILES, map(float, percentiles), strict=True)),
        abs_l2=abs_l2,
        reference_l2=reference_l2,
        reference_max=largest[3],
        nonfinite_mismatch=mismatch,
    )


def _part(actual: torch.Tensor, reference: torch.Tensor, start: int, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one block: largest |a - r|, relative, in ulps, and |r|; the norms of the error and of r; mismatches; whether any is finite. And
    one error in so many, -1 where there is none."""
    dtype = actual.dtype
    a, r = actual.double(), reference.double()
    finite = a.isfinite() & r.isfinite()
    stored = r.to(dtype).double() if dtype.is_floating_point else r
    matched = (a.isnan() & r.isnan()) | (~a.isfinite() & ((a == r) | (stored.isinf() & (a == torch.where(r < 0, -math.inf, math.inf)))))
    mismatch = (~(finite | matched)).sum()
    zero = a.new_zeros(())
    error, size = (torch.where(finite, x, zero) for x in ((a - r).abs(), r.abs()))
    relative = torch.where(size > 0, error / size, zero)
    ulps = error / _spacing(size, dtype)
    figures = [error.max(), relative.max(), ulps.max(), size.max(), _norm(error), _norm(size), mismatch.double(), finite.any().double()]
    return torch.stack(figures), torch.where(finite, error, -1.0)[start::every].clone()


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm that neither overflows nor underflows."""
    scale = x.max()
    return torch.where(scale > 0, scale * (x / scale).square().sum().sqrt(), 0.0)


def _spacing(size: torch.Tensor, dtype: torch.dtype) -> Any:
    """Distance between neighbouring numbers of a float narrower than float64, at `size`; 1 for integers."""
    if not dtype.is_floating_point:
        return 1.0
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(size)  # size = f * 2**exponent, f in [0.5, 1)
    least, digits = round(math.log2(info.tiny)), round(-math.log2(info.eps))
    power = torch.clamp(exponent.long(), min=least + 1) - 1 - digits
    return ((power + 1023) << 52).view(torch.float64)  # 2**power, by its bits: narrower floats go down to 2**-149


__all__ = ["OnDevice"]
