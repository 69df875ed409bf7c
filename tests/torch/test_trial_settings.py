"""The process that times kernels runs as the program does: its precision, its threads, its device."""

from __future__ import annotations

import json

import pytest
import torch

from kpt import hardware_profile
from kpt.kernels import registry
from kpt.ops.base import Spec
from kpt.strategy.planner import place_of
from kpt.tuning import settings, trials
from kpt.tuning.measurements import FORWARD
from kpt.tuning.trials import Trial
from kpt_torch import auto, backend
from kpt_torch.settings import SETTINGS

X = {"x": Spec((8, 16), "float32"), "weight": Spec((16,), "float32")}
H100, CPU = hardware_profile("h100-sxm"), hardware_profile("cpu")


@pytest.fixture(autouse=True)
def put_back():
    before = settings.found(SETTINGS)
    yield
    settings.put(SETTINGS, before)


def high():
    torch.set_float32_matmul_precision("high")


def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)


def half():
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def convolutions():
    torch.backends.cudnn.allow_tf32 = False


def no_flash():
    torch.backends.cuda.enable_flash_sdp(False)


@pytest.mark.parametrize(
    ("do", "hardware", "dtype", "apart"),
    [
        (high, H100, "float32", "cuda.matmul.fp32_precision=tf32"),
        (high, CPU, "float32", "mkldnn.matmul.fp32_precision=tf32"),
        (high, H100, "bfloat16", ""),
        (deterministic, H100, "bfloat16", "deterministic_debug_mode=1"),
        (half, H100, "bfloat16", "cuda.matmul.allow_bf16_reduced_precision_reduction=False"),
        (half, H100, "float32", ""),
        (convolutions, H100, "float32", ""),
        (no_flash, H100, "bfloat16", "flash_sdp=False"),
    ],
)
def test_what_keeps_measurements_apart(do, hardware, dtype, apart):
    kernel, specs = registry.get("rms_norm.torch"), {"x": Spec((8, 16), dtype)}
    before = place_of(hardware, ("torch",), SETTINGS).key(kernel, specs, {}, FORWARD).framework
    do()
    after = place_of(hardware, ("torch",), SETTINGS).key(kernel, specs, {}, FORWARD).framework
    assert after == ", ".join(filter(None, (before, apart)))


def test_the_trial_sees_what_is_set():
    for do in (high, deterministic, convolutions, no_flash):
        do()
    torch.set_num_threads(1)
    made = auto.runner(torch.device("cpu"))
    trial = Trial("rms_norm", X, {}, {"of_torch": "tests.settings_kernels:of_torch"}, FORWARD, made.device, made.settings)
    (outcome,) = trials.run([trial], made.module, 120)
    told = json.loads(outcome.dropped["of_torch"].partition("ValueError: ")[2])
    assert told == ["high", "tf32", "tf32", 1, False, False, 1]


@pytest.mark.parametrize(("device", "name", "model"), [("cuda:1", "cuda:1", "NVIDIA L4"), ("cuda", "cuda:0", "NVIDIA H100 80GB HBM3")])
def test_trials_run_on_the_gpu_that_the_arrays_are_on(monkeypatch, device, name, model):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: ("NVIDIA H100 80GB HBM3", "NVIDIA L4")[torch.device(d).index or 0])
    monkeypatch.setattr(backend, "_PROFILES", {})
    monkeypatch.setattr(backend.hardware_room, "detect_hardware", lambda **asking: asked.append(asking) or H100)
    assert auto.runner(torch.device(device)).device == name
    assert asked == [{"platform": "cuda", "model": model}]
