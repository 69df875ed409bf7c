"""Kernels that say, by failing, under what settings and on which device the process that times them runs."""

from __future__ import annotations

import json
from typing import Any


def of_jax(x: Any, weight: Any = None, **_: Any) -> Any:
    import jax

    on = f"{(device := jax.config.jax_default_device).platform}:{device.id}"  # a device's own text is another in older versions
    raise ValueError(json.dumps([jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64, on, jax.local_device_count()]))


def of_torch(x: Any, weight: Any = None, **_: Any) -> Any:
    import torch

    told = [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    told += [torch.get_deterministic_debug_mode(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.flash_sdp_enabled()]
    raise ValueError(json.dumps([*told, torch.get_num_threads()]))
