"""Gradients of PyTorch's fused attention where the layout of cotangents changes between calls: `python -m tests.torch.sdpa_layouts`, on a GPU.

Relative L2 errors of dq, dk, dv against float64, for a cotangent whose heads lie outside of its positions (BNTH) and one whose heads lie
inside (BTNH), one call after the other in one process, in either order. What stands in docs/benchmarks/sdpa-layouts-h200.txt is what it printed.
"""

from __future__ import annotations

import contextlib
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
WRONG = 0.02


def exact(q, k, v, cotangent, causal):
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), float("-inf"))
    return torch.autograd.grad(scores.softmax(-1) @ v, [q, k, v], cotangent.double())


def laid(t, layout):
    return t if layout == "BNTH" else t.transpose(1, 2).contiguous().transpose(1, 2)


def errors(arrays, want, layout, of_cotangent, causal, masked, backend):
    q, k, v = (laid(t, layout).clone().detach().requires_grad_() for t in arrays[:3])
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    mask = (mask.tril() if causal else mask)[None, None].expand(len(q), 1, *mask.shape) if masked else None
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and not masked)
        found = torch.autograd.grad(y, [q, k, v], laid(arrays[3], of_cotangent))
    return [float((a.double() - w).norm() / w.norm()) for a, w in zip(found, want, strict=True)]


def main():
    torch.manual_seed(0)
    for times in (197, 2048):
        arrays = [torch.randn(2, 32, times, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for causal in (False, True):
            want = exact(*arrays, causal)
            for order, layout, masked, name in itertools.product((("BNTH", "BTNH"), ("BTNH", "BNTH")), ("BTNH", "BNTH"), (False, True), BACKENDS):
                told = []
                for of_cotangent in order:
                    try:
                        found = errors(arrays, want, layout, of_cotangent, causal, masked, BACKENDS[name])
                        told.append(f"dO {of_cotangent}: {' '.join(f'{e:.1e}' for e in found)}{' WRONG' if max(found) > WRONG else ''}")
                    except RuntimeError as problem:
                        told.append(type(problem).__name__)
                print(times, "causal" if causal else "full", "q", layout, "mask" if masked else "no mask", name, "|", "; ".join(told), flush=True)
    print("torch", torch.__version__, "cuDNN", torch.backends.cudnn.version(), torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
