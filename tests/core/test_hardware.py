"""The figures of the chips: plausible, sourced, found by name, carried through JSON, and turned into time bounds."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpt.errors import HardwareError
from kpt.hardware import (
    ALIASES,
    CACHES,
    DTYPES,
    PLATFORMS,
    PROFILES,
    HardwareProfile,
    Roofline,
    hardware_profile,
    time_bound,
)
from kpt.ops.base import Cost

GIB = 1 << 30
ALL = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
ACCELERATORS = [p for p in PROFILES.values() if p.platform != "cpu"]
NAMES = [
    "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7x", "t4", "a100-sxm-40gb", "a100-sxm-80gb", "a100-pcie-40gb",
    "a100-pcie-80gb", "l4", "l40s", "rtx-4090", "rtx-5090", "h100-sxm", "h100-pcie", "h100-nvl", "h200", "b200",
    "b300", "mi210", "mi250x", "mi300x", "mi325x", "mi355x", "max-1550", "max-1100", "arc-b580", "cpu",
]  # fmt: skip


def figures(profile):
    """Every figure of a profile, by the name that `sources` uses."""
    scalars = ("cores", "memory_bytes", "memory_bandwidth", "interconnect")
    found = {name: getattr(profile, name) for name in scalars if getattr(profile, name) is not None}
    return {**profile.peak_flops, **profile.caches, **found}


def test_the_table_has_every_chip():
    assert list(PROFILES) == NAMES


@ALL
def test_every_figure_has_a_source_and_every_source_a_figure(profile):
    assert set(profile.sources) == set(figures(profile))
    assert all(re.search(r"https://|jax/|estimate", source) for source in profile.sources.values())
    assert set(profile.unverified) <= set(profile.sources)


@ALL
def test_names_come_from_the_vocabularies(profile):
    assert profile.name == profile.name.lower()
    assert profile.platform in PLATFORMS
    assert set(profile.peak_flops) <= set(DTYPES)
    assert set(profile.caches) <= set(CACHES)
    spelled = {"tpu": r"tpu-v\d\w?", "cuda": r"sm\d{2,3}", "rocm": r"gfx\w{3}", "xpu": r"pvc|bmg", "cpu": r"generic"}
    assert re.fullmatch(spelled[profile.platform], profile.architecture)


@ALL
def test_figures_are_positive_and_whole_where_they_count_things(profile):
    assert all(value > 0 and math.isfinite(value) for value in figures(profile).values())
    counts = (profile.cores, profile.memory_bytes, profile.devices, *profile.caches.values())
    assert all(isinstance(value, int) for value in counts)
    assert profile.cores % profile.devices == 0


@ALL
def test_a_narrower_dtype_is_never_slower(profile):
    rates = [profile.peak_flops[dtype] for dtype in DTYPES[:6] if dtype in profile.peak_flops]
    assert rates == sorted(rates)
    integers = [profile.peak_flops[dtype] for dtype in ("int8", "int4") if dtype in profile.peak_flops]
    assert integers == sorted(integers)
    if "bfloat16" in profile.peak_flops:
        assert profile.peak_flops.get("float16", profile.peak_flops["bfloat16"]) == profile.peak_flops["bfloat16"]


# Matrix units double their rate, or keep it, with every halving of the width. GeForce cards halve it again where they
# accumulate in float32, so their int8 is four times their bfloat16. The tolerance is the rounding of data sheets.
RATIOS = [
    ("tf32", "bfloat16", (2,)),
    ("bfloat16", "float8", (1, 2)),
    ("bfloat16", "int8", (1, 2, 4)),
    ("float16", "int8", (1, 2, 4)),
    ("int8", "int4", (2,)),
]
STEPS = [(p, *row) for p in ACCELERATORS for row in RATIOS if {row[0], row[1]} <= set(p.peak_flops)]


@pytest.mark.parametrize(("profile", "wide", "narrow", "ratios"), STEPS, ids=lambda x: getattr(x, "name", None))
def test_rates_of_matrix_units_are_powers_of_two_apart(profile, wide, narrow, ratios):
    ratio = profile.peak_flops[narrow] / profile.peak_flops[wide]
    assert any(ratio == pytest.approx(expected, rel=0.02) for expected in ratios)


@pytest.mark.parametrize("profile", ACCELERATORS, ids=lambda p: p.name)
def test_an_accelerator_is_between_a_desktop_gpu_and_a_b300(profile):
    half = "bfloat16" if "bfloat16" in profile.peak_flops else "float16"
    assert 100 <= profile.ridge(half) <= 600
    assert 10 * GIB < profile.memory_bytes <= 288 * GIB
    assert 300e9 <= profile.memory_bandwidth <= 8000e9
    if profile.interconnect is not None:
        assert 30e9 <= profile.interconnect <= profile.memory_bandwidth
    if "shared_block" in profile.caches:
        assert profile.caches["shared_block"] <= profile.caches["shared"]
    assert ("vmem" in profile.caches) == (profile.platform == "tpu")
    assert ("shared" in profile.caches) == (profile.platform != "tpu")


# FLOP per byte at bfloat16, as the public discussions of these chips have them.
@pytest.mark.parametrize(
    ("name", "ridge"),
    [("tpu-v5e", 240), ("tpu-v5p", 166), ("tpu-v6e", 560), ("tpu-v7x", 313), ("h100-sxm", 295), ("h200", 206)],
)
def test_ridge_points_are_the_known_ones(name, ridge):
    assert hardware_profile(name).ridge("bfloat16") == pytest.approx(ridge, rel=0.005)


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("h100-sxm", "bfloat16", 989.4),
        ("h100-sxm", "float8", 1978.9),
        ("h100-sxm", "float32", 66.9),
        ("h100-pcie", "bfloat16", 757),
        ("a100-sxm-40gb", "float32", 19.5),
        ("mi210", "bfloat16", 181),
        ("mi250x", "bfloat16", 383),
        ("mi300x", "bfloat16", 1307),
        ("mi300x", "tf32", 654),
        ("mi300x", "float32", 163.4),
        ("mi355x", "float8", 5033),
        ("max-1550", "bfloat16", 839),
        ("max-1100", "int8", 711),
        ("arc-b580", "bfloat16", 117),
    ],
)
def test_cores_times_clock_gives_what_the_data_sheet_prints(name, dtype, teraflops):
    assert hardware_profile(name).peak_flops[dtype] / 1e12 == pytest.approx(teraflops, rel=0.005)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        *((name, name) for name in NAMES),
        *ALIASES.items(),
        ("H100", "h100-sxm"),
        ("TPU v5e", "tpu-v5e"),
        ("RTX_4090", "rtx-4090"),
        (" mi300x ", "mi300x"),
    ],
)
def test_a_profile_is_found_by_name_and_alias(asked, name):
    assert hardware_profile(asked).name == name


@pytest.mark.parametrize(
    ("asked", "suggested"),
    [
        ("h1000", "h100-sxm (h100)"),
        ("tpu-v5", "tpu-v5e (v5e)"),
        ("mi300", "mi300x"),
        ("a10", "a100-sxm-80gb (a100)"),
        ("rtx-409", "rtx-4090 (4090)"),
    ],
)
def test_a_near_miss_is_told_what_it_may_have_meant(asked, suggested):
    with pytest.raises(HardwareError) as e:
        hardware_profile(asked)
    assert repr(asked) in e.value.asked
    assert suggested in e.value.possible.removeprefix("Near it are ").split(", ")


@pytest.mark.parametrize("asked", ["", "xyzzy", "\0", "☃"])
def test_a_name_like_no_other_is_told_all_of_them(asked):
    with pytest.raises(HardwareError) as e:
        hardware_profile(asked)
    assert all(name in e.value.possible for name in NAMES)


@ALL
def test_json_carries_a_profile_whole(profile):
    again = HardwareProfile.from_json(profile.to_json())
    assert again == profile
    assert hash(again) == hash(profile)
    assert again.unverified == profile.unverified


BASE = json.loads(hardware_profile("l4").to_json())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({k: v for k, v in BASE.items() if k not in ("cores", "name")}), "lacks name, cores"),
        (json.dumps(BASE | {"colour": "green"}), "unknown fields colour"),
        *(
            (json.dumps(BASE | {field: value}), f"wrong type are {field}")
            for field, value in [
                ("name", ""), ("model", 5), ("platform", "abacus"), ("architecture", None), ("cores", 1.5),
                ("cores", 0), ("devices", None), ("devices", True), ("memory_bytes", "24 GB"),
                ("memory_bandwidth", -1.0), ("interconnect", [1]), ("peak_flops", {"float7": 1.0}),
                ("peak_flops", {"float32": 0}), ("peak_flops", [1]), ("caches", {"l9": 5}), ("sources", {"l2": 5}),
                ("sources", []), ("notes", "text"), ("notes", [5]),
            ]
        ),
    ],
)  # fmt: skip
def test_json_that_is_no_profile_is_refused_with_the_reason(text, reason):
    with pytest.raises(HardwareError, match=re.escape(reason)):
        HardwareProfile.from_json(text)


def test_a_chip_of_ones_own_needs_only_what_is_known_of_it():
    mine = HardwareProfile.from_json(
        '{"name": "mine", "model": "Mine", "platform": "cuda", "architecture": "sm90", "cores": null,'
        ' "peak_flops": {}, "memory_bytes": null, "memory_bandwidth": null}'
    )
    assert (mine.peak("bfloat16"), mine.ridge("bfloat16"), mine.per_device()) == (None, None, mine)
    with pytest.raises(HardwareError, match="no dtype"):
        time_bound(Cost(1, 1), mine, "float32")
    with pytest.raises(HardwareError, match="bandwidth is not known"):
        time_bound(Cost(1, 1), dataclasses.replace(mine, peak_flops={"float32": 1.0}), "float32")


@pytest.mark.parametrize(
    ("name", "dtype", "runs_as"),
    [
        ("h100-sxm", "float8_e4m3fn", "float8"),
        ("h100-sxm", "uint8", "int8"),
        ("h100-sxm", "int4", "int8"),
        ("a100", "float8_e5m2", "bfloat16"),
        ("t4", "bfloat16", "float32"),
        ("tpu-v5e", "float16", "float32"),
        ("tpu-v7x", "int8", "bfloat16"),
        ("mi355x", "tf32", "float32"),
    ],
)
def test_a_dtype_without_native_rate_runs_as_the_next_wider_one(name, dtype, runs_as):
    profile = hardware_profile(name)
    assert profile.peak(dtype) == profile.peak_flops[runs_as]


def test_no_accelerator_claims_a_rate_for_a_dtype_it_does_not_have():
    assert hardware_profile("h100").peak("complex64") is None
    with pytest.raises(HardwareError, match="complex64"):
        time_bound(Cost(1, 1), hardware_profile("h100"), "complex64")


@ALL
def test_the_devices_of_a_chip_add_up_to_it(profile):
    one = profile.per_device()
    assert one.devices == 1
    assert one.per_device() is one
    for name in ("cores", "memory_bytes", "memory_bandwidth", "interconnect"):
        whole = getattr(profile, name)
        assert whole is None or getattr(one, name) * profile.devices == whole
    assert one.ridge("float32") == pytest.approx(profile.ridge("float32"))


# An 8192^3 matrix product in bfloat16 is bound by arithmetic everywhere, a vector addition by memory.
@ALL
def test_a_large_product_is_bound_by_compute_and_a_vector_sum_by_memory(profile):
    n = 8192
    product = time_bound(Cost(2.0 * n**3, 3.0 * 2 * n**2), profile, "bfloat16")
    total = time_bound(Cost(float(n), 12.0 * n), profile, "float32")
    assert (product.bound, total.bound) == ("compute", "memory")


def test_the_time_bound_by_hand():
    v5e = hardware_profile("tpu-v5e")
    bound = time_bound(Cost(flops=197e12, bytes=8.19e9), v5e, "bfloat16")
    assert bound == Roofline(seconds=1.0, compute_seconds=1.0, memory_seconds=0.01, bound="compute")
    # One of the two TensorCores of a TPU7x has half of the chip.
    core = time_bound(Cost(flops=1153.5e12, bytes=0), hardware_profile("v7x"), "bfloat16")
    assert core.seconds == pytest.approx(1.0)


@given(
    profile=st.sampled_from([*PROFILES.values()]),
    dtype=st.sampled_from(("float32", "bfloat16", "float16", "int8")),
    flops=st.floats(0, 1e20),
    moved=st.floats(0, 1e15),
)
def test_a_time_bound_grows_with_the_work_and_is_its_larger_half(profile, dtype, flops, moved):
    bound = time_bound(Cost(flops, moved), profile, dtype)
    assert bound.seconds == max(bound.compute_seconds, bound.memory_seconds)
    assert bound.seconds == {"compute": bound.compute_seconds, "memory": bound.memory_seconds}[bound.bound]
    more = time_bound(Cost(2 * flops, 2 * moved), profile, dtype)
    assert more.seconds == pytest.approx(2 * bound.seconds)


def test_the_chips_are_known_without_numpy():
    code = "import sys, kpt.hardware; kpt.hardware.detect_hardware(); print('numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "False"), found.stderr
