"""The process that times kernels runs as the program does: its precision, its dtypes, its device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import pytest

from kpt.kernels import registry
from kpt.ops.base import Spec
from kpt.strategy import planner
from kpt.tuning import settings, trials
from kpt.tuning.measurements import FORWARD
from kpt.tuning.trials import Trial
from kpt_jax import _compat, devices
from kpt_jax.auto import runner
from kpt_jax.settings import SETTINGS

X = {"x": Spec((8, 16), "float32"), "weight": Spec((16,), "float32")}


def seen_in_the_trial(made) -> list:
    trial = Trial("rms_norm", X, {}, {"of_jax": "tests.settings_kernels:of_jax"}, FORWARD, made.device, made.settings)
    (outcome,) = trials.run([trial], made.module, 120)
    return json.loads(outcome.dropped["of_jax"].partition("ValueError: ")[2])


def test_the_trial_sees_what_is_set():
    with jax.default_matmul_precision("tensorfloat32"), _compat.with_64_bits():
        made = runner()
    assert {n: made.settings[n] for n in ("jax_default_matmul_precision", "jax_enable_x64")} == {
        "jax_default_matmul_precision": "tensorfloat32", "jax_enable_x64": True}  # fmt: skip
    precision, wide, device, _ = seen_in_the_trial(made)
    assert (precision, wide) == ("tensorfloat32", True) and device == "cpu:0"


@pytest.mark.parametrize(("precision", "dtype", "apart"), [("tensorfloat32", "float32", True), ("tensorfloat32", "bfloat16", False),
                                                           ("default", "float32", False), ("highest", "float32", True)])  # fmt: skip
def test_precision_of_float32_keeps_measurements_apart(precision, dtype, apart):
    plain = runner().place
    with jax.default_matmul_precision(precision):
        place = runner().place
    kernel, specs = registry.get("matmul.xla"), {"a": Spec((8, 8), dtype), "b": Spec((8, 8), dtype)}
    keys = [p.key(kernel, specs, {}, FORWARD) for p in (plain, place)]
    assert (keys[0] != keys[1]) == apart and (f"precision={precision}" in keys[1].framework) == apart


def test_setting_what_is_set_changes_nothing():
    before = settings.found(SETTINGS)
    settings.put(SETTINGS, before)
    assert settings.found(SETTINGS) == before


TWO_DEVICES = """
import json, jax, jax.numpy as jnp
from kpt_jax import _compat, devices
from kpt_jax.auto import Session, runner
from tests.jax.test_trial_settings import seen_in_the_trial

first, second = jax.local_devices()
array = jax.device_put(jnp.ones(3), second)
assert devices.device_of([jnp.ones(3), array]) is second and devices.device_of([jnp.ones(3)]) is first
with jax.default_device(second):
    assert devices.device_of() is second
made = runner([array])
assert made.device == "cpu:1", made.device
print(json.dumps(seen_in_the_trial(made)))
"""


def test_trials_run_where_the_arrays_are():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
                                "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    *_, device, count = json.loads(ran.stdout.splitlines()[-1])
    assert device == "cpu:1" and count == 2


def test_the_chip_is_that_of_the_arrays_device(monkeypatch):
    """Two GPUs of one host, as jax tells of them."""

    class Gpu:
        platform, process_index = "gpu", 0

        def __init__(self, number, device_kind):
            self.id = self.local_hardware_id = number
            self.device_kind, self.client = device_kind, type("Client", (), {"platform_version": "cuda 12"})

    gpus = [Gpu(0, "NVIDIA H100 80GB HBM3"), Gpu(1, "NVIDIA L4")]
    asked = []
    monkeypatch.setattr(devices.jax, "local_devices", lambda backend=None: gpus)
    monkeypatch.setattr(devices, "_detected", lambda platform, model: asked.append((platform, model)) or planner.kernel_room)
    devices.here()
    monkeypatch.setattr(devices, "device_of", lambda arrays=(): gpus[1])
    devices.here()
    assert asked == [("cuda", "NVIDIA H100 80GB HBM3"), ("cuda", "NVIDIA L4")]
    assert devices.name_of(gpus[1]) == "gpu:1" and devices.device_named("gpu:1") is gpus[1] and devices.device_named("gpu") is gpus[0]
