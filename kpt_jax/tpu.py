"""Compiles a JAX function for a TPU that is not here, and reads the schedules of its Pallas kernels.

Each compilation is a process of its own: libtpu reads its flags once, keeps a lock, and writes logs.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kpt.errors import KptError, MissingDependencyError
from kpt.tpu import Generation, Schedule, schedule

_SCALARS = "kpt-scalars.json"
_VMEM = re.compile(r"space=vmem, size = 0x([0-9a-f]+)")
_FINAL = re.compile(r"\d+-(?P<name>.+)-\d+-schedule-analysis_final_bundles\.txt")


class CompileError(KptError):
    """The TPU compiler refused a program; its message is in the text."""


def compiled_schedules(function: str, args_from: str | None, on: Generation, timeout: float = 600.0) -> list[Schedule]:
    """The schedules of every Pallas kernel that a function calls, compiled for one device of `on`.

    Args:
      function: "module:function", jitted or not.
      args_from: "module:function" that returns the tuple of its arguments; arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      MissingDependencyError: libtpu is not installed.
      CompileError: the compiler's message, or that it took too long.
      ScheduleError: a schedule that kpt cannot read.
    """
    try:
        metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "A kernel was to be compiled for a TPU", "libtpu, which holds the TPU compiler, is not installed",
            "pip install 'kpt-kernels[tpu]' (Linux on x86-64; no TPU is needed)",
        ) from None  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kpt-tpu-") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": folder, "LIBTPU_INIT_ARGS": flags,
        }  # fmt: skip
        command = [sys.executable, "-m", "kpt_jax.tpu", function, args_from or "", on.topology]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            problem = f"it was not done after {timeout:.0f} s"
            raise CompileError(f"{function} was compiled for {on.name}", problem, "Try a smaller shape") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            told = [json.loads(line[5:]) for line in said if line.startswith("KPT: ")]
            problem = told[-1] if told else said[-1] if said else f"the compiler ended with {done.returncode}"
            raise CompileError(f"{function} was compiled for {on.name}", problem, "The message is the compiler's or your code's own")
        told_of = _by_kernel(Path(folder))
        return [_read(found, on, told_of) for found in sorted(Path(folder).iterdir()) if _is_kernel(found)]


def _by_kernel(folder: Path) -> list[tuple[str, list[np.ndarray | None]]]:
    """Name and scalar operands of the calls, as the child left them."""
    found = json.loads((folder / _SCALARS).read_text()) if (folder / _SCALARS).exists() else []
    return [(name, [None if a is None else np.array(a["data"], a["dtype"]) for a in scalars]) for name, scalars in found]


def _scalars(kernel: str, told_of: list[tuple[str, list[np.ndarray | None]]]) -> list[np.ndarray | None]:
    """Of a kernel under the compiler's name for it, `transpose_jvp_NAME__.1`; none where several calls of that name have others."""
    plain = re.sub(r"\W", "_", kernel)
    longest = max((len(name) for name, _ in told_of if re.sub(r"\W", "_", name) in plain), default=0)
    fit = [scalars for name, scalars in told_of if len(name) == longest and re.sub(r"\W", "_", name) in plain]
    same = all(
        len(a) == len(fit[0])
        and all(x is y is None or (x is not None and y is not None and np.array_equal(x, y)) for x, y in zip(a, fit[0], strict=True))
        for a in fit
    )
    return fit[0] if fit and same else []


def _is_kernel(path: Path) -> bool:
    m = _FINAL.fullmatch(path.name)
    if m is None or m["name"] == "TLP":  # the program around the kernels
        return False
    return 'custom_call_target="tpu_custom_call"' in path.read_text(errors="replace")


def _read(analysis: Path, on: Generation, told_of: list[tuple[str, list[np.ndarray | None]]]) -> Schedule:
    m = _FINAL.fullmatch(analysis.name)
    assert m is not None

    def dumped(stage: str) -> str:
        """The compiler numbers its stages differently from kernel to kernel."""
        pattern = re.compile(r"\d+-" + re.escape(m["name"]) + r"-\d+-" + re.escape(stage) + r"\.txt")
        return next((p.read_text() for p in sorted(analysis.parent.iterdir()) if pattern.fullmatch(p.name)), "")

    vmem = sum(int(n, 16) for n in _VMEM.findall(dumped("original")))
    return schedule(
        m["name"], on, dumped("final_bundles"), dumped("final_hlo-static-per-bundle-utilization"), vmem, _scalars(m["name"], told_of)
    )


def _child(function: str, args_from: str, topology: str) -> None:
    """Compiles; the dump is the result."""
    import jax
    from jax.experimental import topologies

    from kpt_jax.prefetched import prefetched

    def named(text: str) -> Callable[..., Any]:
        module, _, name = text.partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found

    sys.path.insert(0, os.getcwd())
    fn, args = named(function), named(args_from)() if args_from else ()
    args = args if isinstance(args, tuple) else (args,)
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    about = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=about)):
        lowered = (fn if hasattr(fn, "lower") else jax.jit(fn)).lower(*shapes)
        lowered.compile()
        tables = prefetched(fn, args)
    scalars = [(name, [None if a is None else {"dtype": str(a.dtype), "data": a.tolist()} for a in tables]) for name, tables in tables]
    Path(os.environ["TPU_LOG_DIR"], _SCALARS).write_text(json.dumps(scalars))


if __name__ == "__main__":
    try:
        _child(*sys.argv[1:4])
    except Exception as error:
        print("KPT: " + json.dumps(" ".join(str(error).split())[:2000] or type(error).__name__), file=sys.stderr)
        sys.exit(1)
