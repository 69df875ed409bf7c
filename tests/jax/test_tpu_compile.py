"""Kernels compiled for TPUs with the TPU's own compiler, and what their schedules say. No TPU is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from typer.testing import CliRunner

import kpt
from kpt import cli, console
from kpt.tpu import GENERATIONS, generation
from kpt_jax.tpu import CompileError, _lines, compile_programs, compiled_schedules, users_program
from kpt_jax.tpu_programs import cases, program
from pallas_kernels import tuned

pytestmark = pytest.mark.tpu
HERE = "tests.jax.test_tpu_compile"


def heads():
    return (jax.ShapeDtypeStruct((1, 2, 2048, 128), jnp.bfloat16),) * 3


def causal(q, k, v, causal=True):
    return flash_attention(q, k, v, causal=causal, block_sizes=BlockSizes(block_q=256, block_k_major=256, block_k=256, block_b=1))


def full(q, k, v):
    return causal(q, k, v, causal=False)


def array():
    return jax.ShapeDtypeStruct((8192, 8192), jnp.float32)


def too_large(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=x)(x)


def plain(x):
    return x * 2


def small():
    return jax.ShapeDtypeStruct((256, 256), jnp.float32)


def doubled(x, interpret=False):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=interpret, name="doubled")(x)


def interpreted_elsewhere(x):
    return doubled(x, jax.default_backend() != "tpu")


def interpreted(x):
    return doubled(x, True)


def repeated(x):
    return jax.lax.scan(lambda c, _: (doubled(c), None), x, None, length=12)[0]


def faulty(x):
    return x * {}["scale"]


def until(x, n):
    def kernel(n_ref, x_ref, out_ref):
        out_ref[...] = jax.lax.fori_loop(0, n_ref[0], lambda _, total: total + x_ref[...], jnp.zeros_like(x_ref))

    block = pl.BlockSpec((256, 256), lambda i, n: (0, 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(1,), in_specs=[block], out_specs=block)
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid_spec=grid, name="until")(n, x)


def shapes_until():
    return small(), jax.ShapeDtypeStruct((1,), jnp.int32)


def arrays_until():
    return small(), np.array([7], np.int32)


def chatty(x):
    print("no newline", end="")
    return doubled(x)


def tripled(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 3

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="tripled")(x)


def dies(x):
    os.kill(os.getpid(), signal.SIGKILL)


def waits(x):
    Path(os.environ["KPT_TEST_WAITS"]).write_text(f"{os.getpid()} {os.environ['TPU_LOG_DIR']}")
    time.sleep(600)


def from_nothing():
    return doubled(jnp.ones((256, 256)))


def with_a_number(x, scale):
    return doubled(x) * scale, 2.0


def small_and_a_number():
    return small(), 2.0


def steps(n, x, grid_spec):
    def kernel(n_ref, x_ref, out_ref):
        @pl.when(n_ref[pl.program_id(0), pl.program_id(1)] > 0 if n_ref.ndim == 2 else pl.program_id(1) < n_ref[0])
        def _():
            out_ref[...] = jnp.exp(x_ref[...])

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=out, grid_spec=grid_spec, name="steps")(n, x)


def prefetched_rows(n, x):
    block = pl.BlockSpec((256, 128), lambda i, j, n: (j, 0))
    return steps(n, x, pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=n.shape, in_specs=[block], out_specs=block))


def in_scalar_memory(n, x):
    block = pl.BlockSpec((256, 128), lambda i, j: (j, 0))
    return steps(n, x, pl.GridSpec(grid=(1, 16), in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block], out_specs=block))


def three_rows():
    """19 ones, also behind column 128."""
    n = np.zeros((3, 300), np.int32)
    n[0, 5], n[1, 127:130], n[2, 200:215] = 1, 1, 1
    return n, jax.ShapeDtypeStruct((300 * 256, 128), jnp.float32)


def two_numbers():
    return np.array([9, 4], np.int32), jax.ShapeDtypeStruct((4096, 128), jnp.float32)


def unsplit(x):
    block = pl.BlockSpec((256, 2048), lambda i: (i, 0))

    def kernel(x_ref, out_ref):
        out_ref[...] = jax.nn.softmax(x_ref[...].astype(jnp.float32)).astype(out_ref.dtype)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=out, grid=(16,), in_specs=[block], out_specs=block, name="softmax")(x)


def tall():
    return jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation(name):
    (made,) = compiled_schedules("kpt_jax.bench_tpu:large", "kpt_jax.bench_tpu:n4096", generation(name))
    chip_cores = 2 if name == "v5p" else 1
    assert made.cores == chip_cores and made.unknown == 0
    # Three blocks in two buffers each, in bfloat16, and the sum.
    assert made.vmem >= 2 * (2 * (512 * 1024 + 1024 * 1024 + 512 * 1024)) + 4 * 512 * 1024
    assert made.read == 128 // chip_cores * 2 * (512 * 1024 + 1024 * 1024) and made.written == 2 * 4096 * 4096 // chip_cores
    steps = [s for s in made.stretches if s.occupancy["MXU"] > 0.2]
    assert steps and {s.issued for s in steps} == {128 // chip_cores}
    assert name in ("v6e", "v7x") or made.bound == "MXU"  # their MXUs outrun the HBM in these blocks


def test_every_kernel_for_every_generation():
    """The compiler's word on all ops, forward and backward; schedules and other masks are the business of `kpt tpu compile`."""
    programs = [program("attention_causal" if op == "attention" else op, dict(cases((op,)))[op]) for op in kpt.ops.OPS]
    made = compile_programs(programs, list(GENERATIONS.values()), schedules=False)
    assert len(made) == 5 * len(programs)
    assert [f"{m.program.label} on {m.generation}: {m.error}" for m in made if m.error is not None] == []
    assert all(m.code > 0 for m in made)
    matmul = next(m for m in made if m.program.given["name"] == "matmul" and m.generation == "v5e")
    flops = 3 * 2 * np.prod([float(n) for n in matmul.program.given["dims"]])  # forward, and the gradients of both
    assert 0.9 * flops / 197e12 < matmul.estimated < 3 * flops / 197e12
    # A matmul is one kernel. rope's array has another layout in its kernel: written and read before and after, in both passes.
    around = {m.program.given["name"]: m.around for m in made if m.generation == "v5e"}
    assert around["matmul"] < 2**20 and around["rope"] == pytest.approx(8 * 2 * 4 * 4096 * 32 * 128, rel=0.1)


def test_the_first_shape_of_a_kernel_in_float32():
    """All inputs of a token are in VMEM together: 4,096 float32 ones do not fit the 16 MiB of a v4, and the kernel says so itself."""
    programs = [program(op, dims, dtype="float32") for op, dims in cases(("linear_cross_entropy", "glu"))]
    made = compile_programs(programs, [generation("v4"), generation("v7x")], schedules=False)
    unmade = {(m.program.given["name"], m.generation): m for m in made if m.error is not None}
    assert list(unmade) == [("linear_cross_entropy", "v4")]
    assert unmade["linear_cross_entropy", "v4"].refused and "bytes of VMEM" in unmade["linear_cross_entropy", "v4"].error


def test_schedules_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    rope = program("rope", (1, 1024, 8, 128), passes="forward", blocks={"positions": 128})
    (first,) = compile_programs([rope], [generation("v5e")])
    with mock.patch("subprocess.Popen", side_effect=AssertionError("compiled again")):
        (again,) = compile_programs([rope], [generation("v5e")])
    assert again == first and first.schedules[0].vmem > 0
    (kept,) = (tmp_path / "tpu").glob("*.json")
    kept.write_text("{")
    with pytest.warns(UserWarning, match="set aside"):
        assert compile_programs([rope], [generation("v5e")]) == [first]


def test_tuning_finds_better_blocks_and_writes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    table = tmp_path / "table.json"
    command = ["tpu", "tune", "--op", "cross_entropy", "--shape", "1024x4096", "--gen", "v5e", "--write", str(table), "--json"]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == 0, run.output
    (found,) = json.loads(run.stdout)
    assert found["cost"] <= found["default_cost"] and found["tried"] > 2 and found["finished"]
    (row,) = json.loads(table.read_text())["rows"]
    assert row["op"] == "cross_entropy" and row["blocks"] == found["best"] and row["origin"]["libtpu"]
    assert tuned.rows(table)["cross_entropy", "tpu-v5e", row["bucket"]] == found["best"]


def test_blocks_that_a_mask_hides_do_not_count():
    (some,), (every,) = (compiled_schedules(f"{HERE}:{f}", f"{HERE}:heads", generation("v5e")) for f in ("causal", "full"))
    blocks = 2048 // 256
    issued = max(s.issued for s in some.stretches if s.occupancy["MXU"] > 0.3)
    assert issued == 2 * blocks * (blocks + 1) // 2
    assert max(s.issued for s in every.stretches if s.occupancy["MXU"] > 0.3) == 2 * blocks**2
    assert some.cycles < every.cycles


def test_the_compiler_speaks():
    with pytest.raises(CompileError, match="134,217,728 bytes more of VMEM.*smaller blocks") as caught:
        compiled_schedules(f"{HERE}:too_large", f"{HERE}:array", generation("v5e"))
    assert len(str(caught.value)) < 400 and "RESOURCE_EXHAUSTED" in "".join(caught.value.__notes__)
    with pytest.raises(CompileError, match="It takes x"):
        compiled_schedules(f"{HERE}:plain", None, generation("v5e"))


def test_the_code_speaks_with_its_line():
    with pytest.raises(CompileError, match=r"KeyError: 'scale' \(\S*test_tpu_compile.py:\d+, in faulty\)") as caught:
        compiled_schedules(f"{HERE}:faulty", f"{HERE}:small", generation("v5e"))
    assert "Traceback" in "".join(caught.value.__notes__) and "in faulty" in "".join(caught.value.__notes__)


def test_a_loop_that_data_end_is_known_by_its_arrays():
    with pytest.raises(CompileError, match="--args-from"):
        compiled_schedules(f"{HERE}:until", f"{HERE}:shapes_until", generation("v5e"))
    (made,) = compiled_schedules(f"{HERE}:until", f"{HERE}:arrays_until", generation("v5e"))
    assert 7 in {s.issued for s in made.stretches}


def test_code_that_asks_for_the_backend_is_told_of_a_tpu():
    (made,) = compiled_schedules(f"{HERE}:interpreted_elsewhere", f"{HERE}:small", generation("v5e"))
    assert made.kernel.startswith("doubled") and made.calls == 1
    run = CliRunner().invoke(cli.app, ["tpu", "schedule", f"{HERE}:interpreted", "--args-from", f"{HERE}:small"])
    assert run.exit_code == console.REFUSED and "interpret mode (doubled)" in run.output and "interpret=False" in run.output


def test_a_kernel_in_a_loop_says_how_often_it_runs():
    run = CliRunner().invoke(cli.app, ["tpu", "schedule", f"{HERE}:repeated", "--args-from", f"{HERE}:small"])
    assert run.exit_code == 0 and "All calls together" in run.stdout and " µs" in run.stdout
    (made,) = compiled_schedules(f"{HERE}:repeated", f"{HERE}:small", generation("v5e"))
    assert made.calls == 12


def test_stopping_ends_what_compiles(monkeypatch, tmp_path):
    """The first result stops it; the second program, ten minutes long, is not waited for."""
    monkeypatch.setenv("KPT_TEST_WAITS", str(tmp_path / "told"))
    began, started = time.monotonic(), []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **how: started.append(popen(*args, **how)) or started[-1])

    def stop(_):
        raise KeyboardInterrupt

    its = [users_program(f"{HERE}:{f}", f"{HERE}:small") for f in ("doubled", "waits")]
    with pytest.raises(KeyboardInterrupt):
        compile_programs(its, [generation("v5e")], jobs=2, done=stop)
    assert len(started) == 2 and all(p.poll() == -signal.SIGKILL for p in started) and time.monotonic() - began < 300


def test_what_code_prints_moves_no_answer():
    its = [users_program(f"{HERE}:{f}", f"{HERE}:small") for f in ("chatty", "tripled")]
    made = compile_programs(its, [generation("v5e")], jobs=1)
    assert [m.program for m in made] == its and [m.schedules[0].kernel.split(".")[0] for m in made] == ["doubled", "tripled"]


def test_a_process_that_is_killed_says_so_and_takes_one_program_with_it():
    its = [users_program(f"{HERE}:{f}", f"{HERE}:small") for f in ("dies", "doubled")]
    first, second = compile_programs(its, [generation("v5e")], jobs=1)
    assert "killed by signal 9 (SIGKILL)" in first.error and "memory" in first.advice
    assert second.error is None and second.program == its[1] and second.schedules[0].kernel.startswith("doubled")


def test_an_answer_that_was_not_ended_is_none():
    heard, answered = os.pipe()
    answers = _lines(heard)
    os.write(answered, b'{"a": 1}\n{"b": ')
    os.close(answered)
    assert answers.get(timeout=60) == {"a": 1} and answers.get(timeout=60) is None


def test_who_asked_and_is_killed_leaves_nothing_behind(tmp_path):
    told = tmp_path / "told"
    code = f"from kpt_jax.tpu import *; compile_programs([users_program('{HERE}:waits', '{HERE}:small')], [generation('v5e')])"
    asks = subprocess.Popen([sys.executable, "-c", "from kpt.tpu import generation; " + code], env=os.environ | {"KPT_TEST_WAITS": str(told)})
    assert eventually(lambda: told.exists() and told.read_text().count(" "))
    child, folder = told.read_text().split()
    asks.kill()
    asks.wait()
    assert eventually(lambda: not Path(folder).exists()) and eventually(lambda: not Path("/proc", child).exists())


def eventually(holds, patience=120):
    end = time.monotonic() + patience
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_function_without_arrays_is_compiled_for_the_tpu():
    (made,) = compiled_schedules(f"{HERE}:from_nothing", None, generation("v5e"))
    assert made.kernel.startswith("doubled") and made.written == 4 * 256 * 256


def test_numbers_of_pythons_are_arguments():
    (made,) = compiled_schedules(f"{HERE}:with_a_number", f"{HERE}:small_and_a_number", generation("v5e"))
    assert made.kernel.startswith("doubled")


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("function, arguments, times", [("prefetched_rows", "three_rows", 19), ("in_scalar_memory", "two_numbers", 9)])
def test_integers_in_scalar_memory_are_known(name, function, arguments, times):
    (made,) = compiled_schedules(f"{HERE}:{function}", f"{HERE}:{arguments}", generation(name))
    assert made.unknown == 0 and times in {s.issued for s in made.stretches if s.occupancy["EUP"] > 0}


def test_documents_of_several_rows_are_known():
    (made,) = compile_programs([program("attention_documents", (2, 1024, 2, 2, 128), passes="forward")], [generation("v5e")])
    assert made.error is None and [s.unknown for s in made.schedules] == [0]


@pytest.mark.parametrize("name", ["v4", "v5p"])
def test_a_grid_that_is_not_split_is_one_cores(name):
    (made,) = compiled_schedules(f"{HERE}:unsplit", f"{HERE}:tall", generation(name))
    assert made.cores == 1 and made.read == made.written == 2 * 4096 * 2048
    bandwidth = (made.read + made.written) / made.seconds
    assert name == "v4" or bandwidth > 0.6 * 2765e9  # half of the chip's was what it got


def test_command_line(tmp_path):
    run = CliRunner().invoke(cli.app, [
        "tpu", "schedule", "kpt_jax.bench_tpu:large", "--args-from", "kpt_jax.bench_tpu:n1024", "--gen", "v5e,v6e",
        "--plot", str(tmp_path / "units.svg"), "--json",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert [s["generation"] for s in found] == ["v5e", "v6e"]
    assert all(sum(level["bundles"] for level in s["loops"]) == s["bundles"] for s in found)
    assert "MXU" in (tmp_path / "units.svg").read_text()
    shown = CliRunner().invoke(cli.app, ["tpu", "schedule", "kpt_jax.bench_tpu:large", "--args-from", "kpt_jax.bench_tpu:n1024"])
    assert shown.exit_code == 0 and "bound" in shown.stdout and "DMA latency" in shown.stdout
    assert "Where the cycles of" in shown.stdout and "one call of a kernel" in shown.stdout
    ours = CliRunner().invoke(cli.app, ["tpu", "schedule", "--op", "rms_norm", "--shape", "1024x1024"])
    assert ours.exit_code == 0 and "rms_norm, forward" in ours.stdout and "rms_norm, backward" in ours.stdout
    ours = json.loads(CliRunner().invoke(cli.app, ["tpu", "schedule", "--op", "rms_norm", "--shape", "1024x1024", "--json"]).stdout)
    assert {s["pass"] for s in ours} == {"forward", "backward"} and "1024x1024" in ours[0]["program"]
    none = CliRunner().invoke(cli.app, ["tpu", "schedule", f"{HERE}:plain", "--args-from", f"{HERE}:array"])
    assert none.exit_code == console.REFUSED and "no Pallas kernel" in none.output


@pytest.mark.parametrize("arguments", [
    [f"{HERE}:doubled", "--args-from", f"{HERE}:small", "--shape", "256x256"],
    ["--op", "rms_norm", "--args-from", f"{HERE}:small"],
])  # fmt: skip
def test_what_would_be_ignored_is_refused(arguments):
    run = CliRunner().invoke(cli.app, ["tpu", "schedule", *arguments])
    assert run.exit_code == console.REFUSED and "--args-from" in run.output


def sixty_mebibytes(x):
    """More than the 16 MiB of a v4's VMEM, less than a v5e's."""

    def kernel(x_ref, out_ref, _):
        out_ref[...] = x_ref[...] * 2

    out, params = jax.ShapeDtypeStruct(x.shape, x.dtype), pltpu.CompilerParams(vmem_limit_bytes=100 << 20)
    return pl.pallas_call(kernel, out_shape=out, scratch_shapes=[pltpu.VMEM((15 << 10, 1024), jnp.float32)], compiler_params=params)(x)


def test_a_generation_that_fails_withholds_no_other():
    command = ["tpu", "schedule", f"{HERE}:sixty_mebibytes", "--args-from", f"{HERE}:small", "--gen", "v4,v5e"]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == console.REFUSED and "v5e" in run.stdout and "Where the cycles" in run.stdout and "was to be compiled for v4" in run.output
    run = CliRunner().invoke(cli.app, [*command, "--json"])
    made, failed = json.loads(run.stdout)
    assert run.exit_code == console.REFUSED and made["generation"] == "v5e" and failed["generation"] == "v4" and "VMEM" in failed["error"]


def test_a_kernel_that_cannot_be_imported_is_no_refusal(monkeypatch):
    """Its program names a provider's module that is not there."""
    missing = dataclasses.replace(program("matmul", (512, 512, 512), passes="forward"), make=f"{HERE}:not_there", given={}, sources=())
    (made,) = compile_programs([missing], [generation("v5e")], schedules=False)
    assert made.error is not None and "no_such_module" in made.error and not made.refused


def not_there():
    return kpt.registry.load(dataclasses.replace(kpt.registry.get("matmul.pallas_tpu"), loader="no_such_module:matmul")), ()


def test_products_of_bytes():
    (made,) = compile_programs([program("matmul", (512, 512, 512), dtype="int8", passes="forward")], [generation("v5e")])
    assert made.error is None and made.schedules[0].cycles > 0
