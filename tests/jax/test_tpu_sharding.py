"""TPU kernels under `shard_map` on eight simulated devices."""

from __future__ import annotations

import pytest

from kpt.ops import OPS
from tests.jax.test_sharding import lines_of
from tests.jax.tpu import needs_pallas_tpu


@needs_pallas_tpu
@pytest.mark.slow
def test_every_kernel_on_eight_devices():
    """The program holds results and gradients to float64."""
    assert set(lines_of("tpu_shard_program.py", "off")) == set(OPS)
