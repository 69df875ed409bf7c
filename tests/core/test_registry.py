"""Which kernel is chosen for a call, and what is said of the others."""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from kpt import strategy
from kpt.errors import KernelError, ValidationError
from kpt.hardware import hardware_profile
from kpt.kernels import KernelRegistry, KernelSpec, registry
from kpt.kernels.builtin import ACTIVATIONS
from kpt.kernels.spec import elsewhere, unmet
from kpt.ops.base import REQUIRED, Cost, Op, Spec
from kpt.ops.mask import Bias, Causal, Lengths, Mask, Window


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str = "test CPU"
    platform: str = "cpu"
    architecture: str = "x86-64"
    peak_flops: dict = dataclasses.field(default_factory=lambda: {"float32": 1e11, "bfloat16": 1e11})
    memory_bandwidth: float = 2e10


CPU = Chip()
UNKNOWN = Chip(name="odd chip", peak_flops={})
H100 = Chip("H100", "cuda", "sm90")

BASE = KernelSpec(
    name="scale.fast",
    op="scale",
    version=1,
    provider="xla",
    framework="jax",
    platforms=("cpu",),
    dtypes=("float32",),
    loader=f"{__name__}:double",
    cost=lambda specs, params: Cost(flops=1e6, bytes=1e6),
)
SHAPES = {"x": (8, 80)}
OPS = ("attention", "cross_entropy", "glu", "layer_norm", "linear_act", "linear_cross_entropy", "matmul",
       "ragged_matmul", "rms_norm", "rope")  # fmt: skip


def with_(**changes):
    return dataclasses.replace(BASE, **changes)


def not_a_multiple(specs, params):
    width = specs["x"].shape[-1]
    return f"width {width} is not a multiple of 64" if width % 64 else None


def raises(specs, params):
    raise ZeroDivisionError("oops")


MASKED = {"masks": frozenset({"causal", "bias"}), "fills": frozenset({"finite"})}
causal = Mask((Causal(),), fill=-1e9)
REFUSED = [
    # changes of the kernel, of the call, words in the reason
    ({"platforms": ("cuda", "tpu")}, {}, "runs on cuda or tpu, and test CPU is cpu"),
    ({"platforms": ("cuda",), "architectures": ("sm100",)}, {"hardware": H100}, "built for sm100, and H100 is sm90"),
    ({"level": "aggressive"}, {}, "level='aggressive'"),
    ({"level": "balanced"}, {"level": "conservative"}, "level='balanced'"),
    ({}, {"dtype": "bfloat16"}, "the arrays are bfloat16"),
    (MASKED, {"params": {"mask": causal & Mask((Window(3, 0), Lengths()))}}, "lengths and window masks"),
    (MASKED, {"params": {"mask": Mask((Causal(),))}}, "infinite fill"),
    (MASKED, {"params": {"mask": dataclasses.replace(causal, additive=True)}}, "adds to them"),
    ({"masks": frozenset({"causal"}), "fills": frozenset({"-inf"})}, {"params": {"mask": causal}}, "finite fill"),
    ({"arrays": frozenset({"x"})}, {"shapes": {"x": (4,), "scale": (1,)}}, "does not take scale"),
    ({"params": {"act": ("relu", "silu")}}, {"params": {"act": "gelu"}}, "'relu', 'silu', and this is 'gelu'"),
    ({"requires": ("numpy>=99",)}, {}, "needs numpy>=99, and numpy"),
    ({"requires": ("no-such-package-here",)}, {}, "not installed"),
    ({"accepts": not_a_multiple}, {}, "80 is not a multiple of 64"),
    ({"accepts": f"{__name__}:not_a_multiple"}, {}, "80 is not a multiple of 64"),
    ({"accepts": raises}, {}, "ZeroDivisionError"),
    ({"accepts": "no_such_module:f"}, {}, "no_such_module"),
]  # fmt: skip

ACCEPTED = [
    ({}, {}),
    ({"platforms": ("cuda",), "architectures": ("sm90",)}, {"hardware": H100}),
    ({"level": "aggressive"}, {"level": "aggressive"}),
    (MASKED, {"params": {"mask": causal}}),
    (MASKED, {"params": {"mask": Mask((Bias(),))}}),
    (MASKED, {"params": {"mask": Mask()}}),
    ({"params": {"activation": ("relu",)}}, {"params": {"activation": "relu", "other": 3}}),
    ({"requires": ("numpy>=1.20,<99",)}, {}),
    ({"accepts": not_a_multiple}, {"shapes": {"x": (8, 128)}}),
    ({"arrays": frozenset({"x", "scale"})}, {"shapes": {"x": Spec((4,), "float32"), "scale": (1,)}}),
]


def choose(kernels, call=None):
    given = {"hardware": CPU, "dtype": "float32", "shapes": SHAPES} | (call or {})
    return KernelRegistry(kernels).select("scale", **given)


@pytest.mark.parametrize(("kernel", "call", "words"), REFUSED)
def test_a_kernel_that_cannot_is_refused_with_the_reason(kernel, call, words):
    found = choose([with_(**kernel)], call)
    assert found.choice.provider == "original"
    assert found.why == "no kernel accepts this call"
    assert words in found.reasons["scale.fast"]


def test_which_kernels_are_for_other_hardware_is_no_matter_of_words():
    kernels = [with_(name="scale.tpu", platforms=("tpu",)), with_(name="scale.chip", platforms=("cuda",), architectures=("sm100",)),
               with_(name="scale.cores", platforms=("cuda",), accepts=lambda specs, params: "runs on one core, and H100 is two"),
               with_(name="scale.cuda", platforms=("cuda",), dtypes=("int8",))]  # fmt: skip
    found = choose(kernels, {"hardware": H100})
    assert elsewhere(found.reasons) == ("scale.chip", "scale.tpu") and len(found.reasons) == 4


def test_a_kernel_of_the_other_framework_is_no_candidate():
    found = choose([with_(framework="torch")])
    assert (found.choice.provider, dict(found.reasons)) == ("original", {})


@pytest.mark.parametrize(("kernel", "call"), ACCEPTED)
def test_a_kernel_that_can_is_chosen(kernel, call):
    assert choose([with_(**kernel)], call).choice.name == "scale.fast"


MEASURED = [
    # measurements, choice, words in why
    ({"original": 1.0, "scale.fast": 0.5, "scale.other": 0.4}, "scale.other", "2.50 times as fast"),
    ({"original": 1.0, "scale.fast": 0.5}, "scale.fast", "2.00 times"),
    ({"original": 1.0, "scale.fast": 1.2}, "original", "by more than the noise"),
    ({"original": (1.0, 0.1), "scale.fast": (0.85, 0.1)}, "original", "by more than the noise"),
    ({"original": (1.0, 0.1), "scale.fast": (0.75, 0.1)}, "scale.fast", "1.33 times"),
    ({"original": 1.0, "scale.fast": 0.5, "scale.other": 0.5}, "scale.fast", "2.00 times"),
    ({"original": 1.0, "scale.cuda": 0.1}, "original", "none was measured"),
    ({"original": 1.0}, "original", "none was measured"),
]


@pytest.mark.parametrize(("measurements", "name", "words"), MEASURED)
def test_measurements_decide_in_any_order_of_registration(measurements, name, words):
    kernels = [BASE, with_(name="scale.other"), with_(name="scale.cuda", platforms=("cuda",))]
    for order in itertools.permutations(kernels):
        found = choose(order, {"measurements": measurements})
        assert found.choice.name == name
        assert words in found.why
        assert found.measured
        assert set(found.reasons) == {"original", *(k.name for k in kernels)} - {name}
        assert found.time_original == 1.0


def work(flops, moved):
    return lambda specs, params: Cost(flops, moved)


def test_estimates_rank_kernels_by_roofline_and_efficiency():
    kernels = [
        with_(name="scale.a", cost=work(1e6, 1e9)),  # 50 ms of traffic at full bandwidth
        with_(name="scale.b", cost=work(1e10, 1e6)),  # 100 ms of arithmetic at peak
        with_(name="scale.c", cost=work(1e6, 1e9), efficiency=0.9),
    ]
    found = choose(kernels)
    assert found.choice.name == "scale.c"
    assert found.time == pytest.approx(1e9 / 2e10 / 0.9)
    assert "estimated 100 ms against 55.6 ms" in found.reasons["scale.a"]
    assert "estimated 200 ms" in found.reasons["scale.b"]
    assert not found.measured
    # Without figures for the chip, efficiency and name decide, and the words say that nothing is known.
    found = choose(kernels, {"hardware": UNKNOWN})
    assert found.choice.name == "scale.c"
    assert "neither measured nor estimated" in found.why


def test_equal_estimates_go_to_the_first_name():
    assert choose([with_(name="scale.z"), with_(name="scale.a")]).choice.name == "scale.a"


def test_every_level_is_known():
    with pytest.raises(KernelError, match="conservative, balanced, aggressive"):
        choose([BASE], {"level": "reckless"})


REGISTRATIONS = [
    # first, second, words of the error
    (BASE, BASE, "already"),
    (BASE, with_(dtypes=("float32", "bfloat16")), "Raise the version to 2"),
    (BASE, with_(masks=frozenset({"causal"})), "Raise the version to 2"),
    (BASE, with_(params={"activation": ("relu",)}), "Raise the version to 2"),
    (BASE, with_(arrays=frozenset({"x"})), "Raise the version to 2"),
    (with_(version=3), with_(version=2), "version 3"),
    (BASE, with_(name="original"), "always a candidate"),
    (BASE, with_(provider="original"), "always a candidate"),
]


@pytest.mark.parametrize(("first", "second", "words"), REGISTRATIONS)
def test_a_name_and_version_mean_one_kernel(first, second, words):
    found = KernelRegistry([first])
    with pytest.raises(KernelError, match=words):
        found.register(second)
    assert found.get(first.name) == first


def test_a_higher_version_replaces_the_lower():
    found = KernelRegistry([BASE, with_(version=2, dtypes=("bfloat16",))])
    assert found.kernels() == (with_(version=2, dtypes=("bfloat16",)),)


MALFORMED = [
    {"version": 0},
    {"version": True},
    {"framework": "numpy"},
    {"level": "reckless"},
    {"platforms": ()},
    {"loader": "module.function"},
    {"efficiency": 0.0},
    {"fills": frozenset({"zero"})},
    {"requires": ("jax~=1",)},
    {"name": ""},
]


@pytest.mark.parametrize("changes", MALFORMED)
def test_a_malformed_description_is_an_error(changes):
    with pytest.raises(KernelError):
        with_(**changes)


VERSIONS = [
    # installed, requirement, met
    ("0.11.2", "pkg", True),
    ("0.11.2", "pkg>=0.11.1", True),
    ("0.7.2", "pkg>=0.11.1", False),
    ("0.13", "pkg>=0.7.2,<0.13", False),
    ("2.11.0+cu130", "pkg>=2.9", True),
    ("2.9", "pkg==2.9.0", True),
    ("1.0", "pkg != 1", False),
    ("1.0.1", "pkg>1", True),
    ("1.0.0", "pkg<=1", True),
]


@pytest.mark.parametrize(("installed", "requirement", "met"), VERSIONS)
def test_requirements_read_versions_as_numbers(monkeypatch, installed, requirement, met):
    monkeypatch.setattr("kpt.kernels.spec._installed", {"pkg": installed}.get)
    assert (unmet(requirement) is None) is met


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str
    value: str
    load: object


def fail():
    raise RuntimeError("needs a newer libfoo")


ENTRIES = [
    (lambda: BASE, ["scale.fast"], None),
    (lambda: [BASE, with_(name="scale.other")], ["scale.fast", "scale.other"], None),
    (fail, [], "libfoo"),
    (lambda: [BASE, BASE], ["scale.fast"], "already"),
    (lambda: [42], [], "no KernelSpec"),
    (lambda: 42, [], "TypeError"),
]


@pytest.mark.parametrize(("load", "names", "problem"), ENTRIES)
def test_third_parties_join_by_entry_point_and_break_only_themselves(monkeypatch, caplog, load, names, problem):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry("theirs", "mod:kernels", load)])
    found = KernelRegistry([with_(name="scale.ours")], entry_points="kpt.kernels")
    assert [k.name for k in found.kernels("scale")] == sorted(["scale.ours", *names])
    assert problem is None or problem in found.broken["theirs"]
    assert problem is None or "theirs" in caplog.text
    assert bool(found.broken) == (problem is not None)


def test_an_unknown_or_broken_kernel_says_what_to_do():
    with pytest.raises(KernelError, match="Near it are scale.fast"):
        KernelRegistry([BASE]).get("scale.slow")
    with pytest.raises(KernelError, match="no_such_module"):
        KernelRegistry([with_(loader="no_such_module:f")]).load("scale.fast")
    assert KernelRegistry([with_(loader="math:hypot")]).load("scale.fast") is math.hypot


def test_every_op_has_a_kernel_that_runs_everywhere():
    assert sorted({k.op for k in registry.kernels()}) == list(OPS)
    for kernel in registry.kernels():
        if kernel.provider == "xla":
            assert kernel.loader == f"pallas_kernels.{kernel.op}.xla:{kernel.op}"
            assert set(kernel.platforms) == {"cpu", "cuda", "rocm", "tpu", "xpu"}
            assert set(kernel.dtypes) == {"float32", "bfloat16", "float16", "float64"}
    assert len(ACTIVATIONS) == 12


# A small op, so that certification is tested on meaning that stands in full view: y = x * weight, row by row.
SCALE = Op(
    name="scale",
    arrays=("x", "weight"),
    optional=(),
    params={"twice": REQUIRED},
    differentiable=("x", "weight"),
    infer=lambda specs, twice: (specs["x"],),
    reference=lambda x, weight, twice: (x * weight * (1 + twice),),
    reference_vjp=lambda cotangents, x, weight, twice: {
        "x": cotangents[0] * weight * (1 + twice),
        "weight": (cotangents[0] * x * (1 + twice)).sum(0),
    },
    sample=lambda rng, specs, twice: {n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in specs.items()},
    cost=lambda specs, twice: Cost(math.prod(specs["x"].shape), 8 * math.prod(specs["x"].shape)),
)
SPECS = {"x": Spec((64, 80), "float32"), "weight": Spec((80,), "float32")}


def run(kernel, arrays, params):
    return kernel(**arrays, **params)


def run_vjp(kernel, arrays, params, cotangents):
    (g,) = cotangents
    return {
        "x": kernel(x=g, weight=arrays["weight"], **params),
        "weight": kernel(x=g, weight=arrays["x"], **params).sum(0),
    }


KERNELS = [
    # kernel, gradients too, passes, words of the summary
    (lambda x, weight, twice: x * weight * np.float32(1 + twice), True, True, "gradients"),
    (lambda x, weight, twice: x * weight * np.float32(1 + twice), False, True, "within tolerance"),
    (lambda x, weight, twice: x * weight, True, False, "checks failed, first output"),
    (lambda x, weight, twice: x * weight * np.float32(2.02), True, False, "checks failed"),
    (lambda x, weight, twice: (x * weight * np.float32(2))[:-1], False, False, "shape"),
    (lambda x, weight, twice: x * weight + np.float32(np.nan), True, False, "NaN"),
]


@pytest.mark.parametrize(("kernel", "gradients", "passes", "words"), KERNELS)
def test_validate_certifies_forward_and_gradients(monkeypatch, kernel, gradients, passes, words):
    monkeypatch.setattr(sys.modules[__name__], "double", kernel, raising=False)
    call = {"run": run, "run_vjp": run_vjp if gradients else None, "op": SCALE}
    found = KernelRegistry([BASE]).validate("scale.fast", SPECS, {"twice": True}, **call)
    assert found.passed is passes
    assert words in found.summary()
    assert {c.where for c in found.checks} == {"random sample, seed 0", "random sample, seed 1"}
    assert sorted({c.name for c in found.checks if c.gradient}) == (["weight", "x"] if gradients else [])
    json.dumps(found.to_json(), allow_nan=False)


def test_a_wrong_gradient_alone_fails(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "double", KERNELS[0][0], raising=False)

    def dropped_rows(*call):
        return run_vjp(*call) | {"weight": run_vjp(*call)["weight"] * np.float32(1.01)}

    call = {"run": run, "run_vjp": dropped_rows, "op": SCALE}
    found = KernelRegistry([BASE]).validate("scale.fast", SPECS, {"twice": True}, **call)
    assert [c.name for c in found.checks if not c.passed] == ["weight", "weight"]
    with pytest.raises(ValidationError, match="seed"):
        KernelRegistry([BASE]).validate("scale.fast", SPECS, {"twice": True}, seeds=(), **call)


def sample_of(shift, spread):
    """Rows near `shift`, so that what an op computes is what is left after large terms cancel."""

    def sample(rng, specs, **params):
        arrays = {n: rng.standard_normal(s.shape) for n, s in specs.items()}
        arrays[next(iter(specs))] = shift + spread * rng.standard_normal(next(iter(specs.values())).shape)
        return {n: a.astype(np.float32) for n, a in arrays.items()}

    return sample


def norm(x, eps=1e-6):
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype)),)


def norm_vjp(cotangents, x, eps=1e-6):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype))
    g = cotangents[0]
    return {"x": r * g - x * r**3 * (g * x).mean(-1, keepdims=True)}


def first_label_loss(logits):
    top = logits.max(-1)
    return (np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[:, 0],)


def first_label_loss_vjp(cotangents, logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    p[:, 0] -= 1
    return {"logits": cotangents[0][:, None] * p}


def op_of(name, array, reference, reference_vjp, outputs, sample):
    return Op(name, (array,), (), {}, (array,), outputs, reference, reference_vjp, sample,
              cost=lambda specs, **params: Cost(4 * math.prod(specs[array].shape), 0))  # fmt: skip


CANCELLING = [
    # op, its array, forward, gradient, outputs, inputs: near rows of one element the gradient all but vanishes
    ("rms_norm", "x", norm, norm_vjp, lambda specs, **p: (specs["x"],), sample_of(3.0, 1.0), (64, 1)),
    ("cross_entropy", "logits", first_label_loss, first_label_loss_vjp,
     lambda specs: (Spec(specs["logits"].shape[:1], "float32"),), sample_of(np.eye(1, 50) * 25, 1.0), (64, 50)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "array", "forward", "backward", "outputs", "sample", "shape"), CANCELLING)
def test_validate_forgives_what_cancels_in_float32_and_nothing_larger(
    monkeypatch, name, array, forward, backward, outputs, sample, shape
):
    op = op_of(name, array, forward, backward, outputs, sample)
    monkeypatch.setattr(sys.modules[__name__], "double", forward, raising=False)

    def certificate(error):
        def gradients(kernel, arrays, params, cotangents):
            found = backward(cotangents, **arrays)[array]
            return {array: (found + np.float32(error)).astype(np.float32)}

        specs = {array: Spec(shape, "float32")}
        return KernelRegistry([BASE]).validate("scale.fast", specs, {}, run=run, run_vjp=gradients, op=op)

    assert certificate(0).passed, certificate(0).summary()
    assert not certificate(1e-3).passed


@pytest.mark.parametrize(("framework", "dims", "measured"), [("jax", (4096, 1024), (1.14 * 1.32) ** 0.5), ("torch", (4096, 1024), 1.19 * (1 + 0.059))])
def test_no_more_is_estimated_of_rms_norm_on_a_cpu_than_was_measured(framework, dims, measured):
    """With gradients (docs/benchmarks/README.md): JAX in two runs, PyTorch within the noise of one."""
    found = registry.select("rms_norm", hardware_profile("cpu"), "float32", {"x": dims, "weight": dims[-1:]}, framework=framework)
    assert 1 < found.time_original / found.time <= measured


def test_selection_imports_no_kernel():
    code = """
import sys, types
from kpt.kernels import registry
from kpt.ops.base import Spec
chip = types.SimpleNamespace(name="c", platform="cpu", architecture="x86-64")
x = Spec((8, 64), "float32")
found = registry.select("rms_norm", chip, "float32", {"x": x})
assert found.choice.name == "rms_norm.xla", found
assert not {"jax", "torch", "pallas_kernels"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_sum_before_a_norm_is_left_to_xla(op):
    x = Spec((64, 256), "float32")
    alone = registry.select(op, CPU, "float32", {"x": x}, params={"eps": 1e-6})
    both = registry.select(op, CPU, "float32", {"x": x, "residual": x}, params={"eps": 1e-6})
    assert alone.choice.name == f"{op}.xla" and both.choice.provider == "original"
    assert "fuses it by itself" in both.reasons[f"{op}.xla"]


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "v7x"])
def test_what_makes_the_logits_three_times_is_not_chosen_by_estimate(generation):
    """Scheduled beside plain code by XLA it takes 1.5 to 2.2 times as long (docs/benchmarks/tpu-static.md)."""
    specs = {"x": Spec((8192, 4096), "bfloat16"), "w": Spec((4096, 128256), "bfloat16"), "labels": Spec((8192,), "int32")}
    chosen, _, _ = strategy.choose("linear_cross_entropy", specs, {}, hardware=hardware_profile(f"tpu-{generation}"), level="balanced")
    assert chosen is None or chosen.name == "linear_cross_entropy.xla"
