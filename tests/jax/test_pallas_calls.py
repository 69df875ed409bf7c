"""What a program says of its Pallas calls before anything is compiled, and the compiler's messages in short."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kpt
from kpt.errors import OpError
from kpt_jax.compiler_words import in_short
from kpt_jax.pallas_calls import PallasCall, pallas_calls, times_of


def double(x, interpret=False, name="double"):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=interpret, name=name)(x)


def repeated(f, length, **how):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=length, **how)[0]


CALLS = {
    "once": (double, [1]),
    "scan": (repeated(double, 12), [12]),
    "nested": (lambda x: jax.lax.fori_loop(0, 5, lambda _, c: repeated(double, 12)(c), x), [60]),
    "unrolled": (repeated(double, 12, unroll=3), [4, 4, 4]),
    "unrolled with a rest": (repeated(double, 10, unroll=3), [None, None, None]),
    "while": (lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 5, double, x), [None]),
    "branch": (lambda x: jax.lax.cond(x[0, 0] > 0, double, jnp.sin, x), [None]),
    "remat and jit": (jax.checkpoint(jax.jit(double)), [1]),
}


@pytest.mark.parametrize("case", CALLS)
def test_trips_of_the_loops_around_a_call(case):
    fn, times = CALLS[case]
    jaxpr = jax.make_jaxpr(fn)(jnp.ones((8, 128))).jaxpr
    assert list(pallas_calls(jaxpr)) == [PallasCall("double", False, n) for n in times]


def test_a_kernel_on_a_mesh_of_cores_is_a_call():
    if not hasattr(pltpu, "TensorCoreMesh"):
        pytest.skip("this jax has no pltpu.TensorCoreMesh")

    def meshed(x):
        @pl.kernel(out_type=x, mesh=pltpu.TensorCoreMesh(axis_name="core", num_cores=2), name="meshed")
        def copied(x_ref, out_ref):
            pltpu.sync_copy(x_ref, out_ref)

        return copied(x)

    about = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=about)):
        jaxpr = jax.make_jaxpr(repeated(meshed, 3))(jnp.ones((8, 128))).jaxpr
    assert list(pallas_calls(jaxpr)) == [PallasCall("meshed", False, 3, cores=2)]


def test_a_call_without_a_name_has_its_functions():
    (found,) = pallas_calls(jax.make_jaxpr(lambda x: double(x, name=None))(jnp.ones((8, 128))).jaxpr)
    assert found.name == "kernel"


@pytest.mark.parametrize("interpret, told", [(False, False), (True, True), (pltpu.InterpretParams(), True)])
def test_a_call_in_interpret_mode_is_told(interpret, told):
    (found,) = pallas_calls(jax.make_jaxpr(lambda x: double(x, interpret))(jnp.ones((8, 128))).jaxpr)
    assert found.interpreted == told


def test_compiled_kernels_are_those_of_their_calls():
    calls = [PallasCall("attention", False, 12), PallasCall("attention_bwd", False, 6), PallasCall("norm", False, 2), PallasCall("norm", False, 3)]
    assert times_of(["jvp_attention_.1", "transpose_jvp_attention_bwd__.1", "norm.1", "norm.2"], calls) == [12, 6, None, None]
    assert times_of(["norm.1", "norm.2"], [PallasCall("norm", False, 2)] * 2) == [2, 2]
    assert times_of(["norm.1"], [PallasCall("norm", False, 2)] * 2) == [None]  # the compiler merged two, or kept one
    assert times_of(["norm.1"], []) == [None]
    # A kernel without a name has that of the function around it: it is what no name is left for.
    assert times_of(["both.1", "norm.1"], [PallasCall("kernel", False, 4), PallasCall("norm", False, 2)]) == [4, 2]


ARRAY = "RESOURCE_EXHAUSTED: Allocation (size=300) would exceed memory (size=200) :: #allocation3 [shape = 'u8[300]{0}', space=vmem, tag = 'input window allocation for operator input 0. The window'] :: twice.1"
SCOPED = "CompileTimeScopedVmemOom: Ran out of memory in memory space vmem while allocating on stack for %scoped.1 = f32[8]. Scoped allocation with size 64.00M and limit 16.00M exceeded scoped vmem limit by 48.00M. It should"
PROGRAM = "Ran out of memory in memory space vmem. Used 256.00M of 128.00M vmem. Exceeded vmem capacity by 128.00M. 1. Size: 128.00M Tag: input window allocation for operator input 0. XLA label: scoped.1 = custom-call(x)"
SMEM = "Ran out of memory in memory space smem. Used 3.80M of 1.00M smem. Exceeded smem capacity by 2.80M."
HBM = "Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm. Exceeded hbm capacity by 1.75G."


@pytest.mark.parametrize("words, says, advises", [
    (ARRAY, "Kernel twice.1 takes 100 bytes more of VMEM than there are for it: 300 of 200 (0.0 of 0.0 MiB); the largest is the input window allocation for operator input 0", "smaller blocks"),
    (SCOPED, "Kernel scoped.1 takes about 50,331,648 bytes more of VMEM than there are for it: 67,108,864 of 16,777,216 (64.0 of 16.0 MiB), the limit that a kernel has, not the chip's", "vmem_limit_bytes"),
    (SMEM, "The program takes about 2,936,013 bytes more of SMEM", "larger blocks"),
    (PROGRAM, "Kernel scoped.1 takes about 134,217,728 bytes more of VMEM", "smaller blocks"),
    (HBM, "The program takes about 1,879,048,192 bytes more of HBM", "smaller arrays"),
    ("INTERNAL: Mosaic failed", "INTERNAL: Mosaic failed", ""),
])  # fmt: skip
def test_what_does_not_fit_is_said_with_the_bytes(words, says, advises):
    said, advice = in_short(words)
    assert said.startswith(says) and advises in advice
    assert ("RESOURCE_EXHAUSTED" in said) == ("RESOURCE_EXHAUSTED" in words)  # kpt_jax.bench_tpu_tables asks for it


X = jnp.ones((16, 128))


@pytest.mark.parametrize("name, arrays, says", [
    ("rms_norm.pallas_tpu", {"x": X, "weight": jnp.ones(64)}, "weight"),
    ("matmul.pallas_tpu", {"a": X, "b": X}, "b"),
    ("cross_entropy.pallas_tpu", {"logits": X, "labels": jnp.zeros(8, int)}, "labels"),
    ("matmul.xla", {"a": X, "b": X}, "b"),
])  # fmt: skip
def test_a_kernel_called_by_hand_checks_its_shapes(name, arrays, says):
    with pytest.raises(OpError, match=rf"was given {says}\["):
        kpt.registry.load(name)(**arrays)
    assert kpt.registry.load(name) is kpt.registry.load(name)  # jax keeps what it compiled by function


@pytest.mark.parametrize("name, given, says", [
    ("rms_norm.xla", {"x": X, "epz": 1e-5}, "given epz.*mean eps"), ("rms_norm.xla", {"x": X, "wieght": X[0]}, "given wieght.*mean weight"),
    ("rms_norm.pallas_tpu", {"x": X, "block": None}, "given block.*mean blocks"), ("matmul.xla", {"a": X}, "called without b"),
])  # fmt: skip
def test_a_kernel_called_by_hand_checks_its_names(name, given, says):
    with pytest.raises(OpError, match=says):
        kpt.registry.load(name)(**given)
