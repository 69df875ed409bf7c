"""Attention by PyTorch's fused one, on a GPU: cotangents in any layout, one call after the other."""

from __future__ import annotations

import pytest
import torch

from kpt.ops.mask import Causal, Mask
from kpt_torch.kernels.attention import attention
from tests.torch import sdpa_layouts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("order", [("BNTH", "BTNH", "BNTH"), ("BTNH", "BNTH", "BTNH")], ids="-".join)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("times", [197, 2048])
def test_gradients_are_right_whatever_the_layout_of_the_cotangent_before(times, causal, order):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    arrays = [torch.randn(2, 32, times, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    want = sdpa_layouts.exact(*arrays, causal)
    for layout in order:
        q, k, v = (t.clone().requires_grad_() for t in arrays[:3])
        out = attention(q=q.transpose(1, 2), k=k.transpose(1, 2), v=v.transpose(1, 2), mask=Mask((Causal(0),) if causal else ()))
        found = torch.autograd.grad(out, [q, k, v], sdpa_layouts.laid(arrays[3], layout).transpose(1, 2))
        assert max(float((a.double() - w).norm() / w.norm()) for a, w in zip(found, want, strict=True)) < sdpa_layouts.WRONG
