"""Compiles JAX functions for TPUs that are not here, and reads the schedules of their Pallas kernels.

libtpu reads its flags once, keeps a lock, and writes logs: what it compiles for one generation is a process of its own. It is told
programs as a line of JSON, and answers a line for each through a pipe of its own, for what people's code prints goes to its standard
output. When its standard input ends, so does it: whoever asked is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kpt.errors import KernelError, KptError, MissingDependencyError
from kpt.hardware import detect_hardware
from kpt.install import install
from kpt.kernels.spec import unmet
from kpt.raised import place
from kpt.raised import told as said
from kpt.tpu import Generation, Schedule, schedule
from kpt.tpu import cache as schedule_cache
from kpt_jax.compiler_words import in_short
from kpt_jax.pallas_calls import of_kernel

PATIENCE = 900  # seconds for one program
INSTALL = f"{install('tpu')} (Linux on x86-64; no TPU is needed)"
_MEMORY = 3 << 30
"""Bytes that one compiling process may need."""
_VMEM = re.compile(r"space=vmem, size = 0x([0-9a-f]+)")
_FINAL = re.compile(r"\d+-(?P<name>.+)-\d+-schedule-analysis_final_bundles\.txt")
# The text of every pass takes longer than the compilation.
_FLAGS = (
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=.*(final_bundles|final_hlo-static-per-bundle-utilization|original).*",
)


class CompileError(KptError):
    """The TPU compiler refused a program, or the program's own code raised. What was said in full is a note of the exception."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled: `make(**given)` returns a function and the tuple of its arguments.

    Attributes:
      label: what people read.
      make: "module:function".
      given: JSON.
      sources: patterns of the files of kpt that decide the outcome, which is kept; none for a program that other files decide.
    """

    label: str
    make: str
    given: Mapping[str, Any]
    sources: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program.

    Attributes:
      error: what was wrong, where it made nothing.
      advice: what to do then, if kpt knows.
      detail: the compiler's whole message then, or the traceback of an exception.
      refused: whether that is the kernel's own word (blocks that do not fit, say), and the compiler was not asked.
      schedules: of the Pallas kernels, in the order of their compilation.
      interpreted: names of Pallas calls that XLA got as plain operations, so that there is no kernel of them.
      temporaries: bytes of HBM between the program's operations.
      code: bytes of instructions.
      accessed: bytes of HBM that XLA's cost analysis counts. For a Pallas kernel that is what its author estimates.
      around: of these, bytes of XLA's own operations around the kernels (another layout of an array, a sum); None where the program
        loops, for the analysis does not say how often.
      estimated: seconds, by that analysis; None where it does not know some operation.
    """

    program: Program
    generation: str
    error: str | None = None
    schedules: tuple[Schedule, ...] = ()
    temporaries: int = 0
    code: int = 0
    accessed: float = 0.0
    around: float | None = None
    estimated: float | None = None
    refused: bool = False
    advice: str = ""
    detail: str = ""
    interpreted: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all its Pallas kernels."""
        return sum(s.seconds for s in self.schedules)

    @property
    def cycles(self) -> float:
        return sum(s.cycles for s in self.schedules)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Compiled:
        program = Program(**{**found["program"], "sources": tuple(found["program"]["sources"])})
        schedules, interpreted = tuple(Schedule.from_json(s) for s in found["schedules"]), tuple(found["interpreted"])
        return cls(**{**found, "program": program, "schedules": schedules, "interpreted": interpreted})


def users_program(function: str, args_from: str | None) -> Program:
    """A function by name, with the arguments that another one returns; arrays or `jax.ShapeDtypeStruct`s."""
    return Program(function, "kpt_jax.tpu:_named", {"function": function, "args_from": args_from})


def compiled_schedules(function: str, args_from: str | None, on: Generation) -> list[Schedule]:
    """The schedules of every Pallas kernel that a function calls, compiled for one device of `on`.

    Args:
      function: "module:function", jitted or not.
      args_from: "module:function" that returns the tuple of its arguments.

    Raises:
      MissingDependencyError: libtpu is not installed.
      CompileError: the compiler's message, or that it took too long.
      ScheduleError: a schedule that kpt cannot read.
    """
    (made,) = compile_programs([users_program(function, args_from)], [on])
    require(made)
    return list(made.schedules)


def require(made: Compiled) -> None:
    """Raises CompileError where nothing was made of a program."""
    if made.error is None:
        return
    advice = made.advice or ("The words are the compiler's; `kpt --debug tpu ...` shows all of them" if made.detail else "")
    error = CompileError(f"{made.program.label} was to be compiled for {made.generation}", made.error, advice)
    if made.detail:
        error.add_note(f"In the process that compiled:\n{made.detail}")
    raise error


def interpreted(made: Compiled) -> tuple[str, str] | None:
    """What to say of Pallas calls that were not compiled: why there is no kernel of them, and what to do; None where there are none."""
    if not made.interpreted:
        return None
    names = ", ".join(dict.fromkeys(made.interpreted))
    return (
        f"Pallas calls are in interpret mode ({names}): XLA gets their operations, and there is no kernel to schedule",
        "Pass interpret=False for a TPU: where kpt compiles, jax.default_backend() is 'tpu', and jax.devices() are those that are here",
    )


def compiler_version() -> str:
    """That of libtpu.

    Raises:
      MissingDependencyError: it is not installed, or jax is too old for the kernels.
    """
    asked = "A kernel was to be compiled for a TPU"
    if (why := unmet("jax>=0.11.2")) is not None:
        raise MissingDependencyError(asked, f"The kernel {why}", INSTALL)
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(asked, "libtpu, which holds the TPU compiler, is not installed", INSTALL) from None


def compile_programs(
    programs: Sequence[Program],
    generations: Sequence[Generation],
    *,
    jobs: int | None = None,
    schedules: bool = True,
    done: Callable[[Compiled], None] = lambda _: None,
) -> list[Compiled]:
    """Compiles every program for one device of every generation, some at a time.

    What kpt's own code decides is kept in the cache and not compiled again.

    Args:
      jobs: processes at a time; by default as many as there are cores, and 3 GiB of free memory for each.
      schedules: read the schedules of Pallas kernels; without them a compilation takes a third of the time.
      done: called with each result, in the order in which they come, by one thread at a time.

    Returns:
      Program by program, each for all generations.

    Raises:
      MissingDependencyError: libtpu is not installed, or jax is too old.
    """
    version = compiler_version()
    found: dict[tuple[int, str], Compiled] = {}
    lock, processes, hashes = threading.Lock(), _Processes(), {p: _hash(p) for program in programs for p in program.sources}

    def keep(place: tuple[int, str], made: Compiled) -> None:
        with lock:
            found[place] = made
            done(made)

    waiting: list[tuple[int, Generation]] = []
    keys: dict[tuple[int, str], str] = {}
    for n, program in enumerate(programs):
        for on in generations:
            if program.sources:
                keys[n, on.name] = key = _key(program, on, version, schedules, [hashes[p] for p in program.sources])
                if (kept := schedule_cache.load(key)) is not None:
                    keep((n, on.name), Compiled.from_json(kept))
                    continue
            waiting.append((n, on))
    jobs = max(1, min(jobs or _jobs(), len(waiting)))
    # A process takes several programs of one generation, for its start costs as much as a small kernel; the last ones are short turns.
    turns: list[tuple[Generation, list[int]]] = []
    for on in generations:
        mine = [n for n, of in waiting if of == on]
        size = max(1, min(8, -(-len(waiting) // (2 * jobs))))
        turns += [(on, mine[i : i + size]) for i in range(0, len(mine), size)]

    def turn(on: Generation, numbers: list[int]) -> None:
        with contextlib.closing(_compile([programs[n] for n in numbers], on, schedules, processes)) as results:
            for n, made in zip(numbers, results, strict=False):  # fewer come where somebody stopped it
                if made.error is None and (n, on.name) in keys:
                    schedule_cache.store(keys[n, on.name], made.to_json())
                keep((n, on.name), made)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for started in [pool.submit(turn, *t) for t in turns]:
                started.result()
        except BaseException:  # what has not begun does not begin, and what has does not go on
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[n, on.name] for n in range(len(programs)) for on in generations]


class _Processes:
    """Those that compile, so that who waits for them can end them all."""

    def __init__(self) -> None:
        self.lock, self.stopped = threading.Lock(), False
        self.running: set[subprocess.Popen[str]] = set()

    def start(self, command: Sequence[str], **how: Any) -> subprocess.Popen[str] | None:
        """None once they were stopped."""
        with self.lock:
            if self.stopped:
                return None
            process = subprocess.Popen(command, text=True, **how)
            self.running.add(process)
            return process

    def end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        with self.lock:
            self.running.discard(process)
        process.wait()

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.kill()


def _jobs() -> int:
    """By the cores and the memory that are here, and that control groups leave of them."""
    cpu = detect_hardware(platform="cpu")
    try:
        free = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        free = None
    if free is None or cpu.memory_bytes is None:
        return 1
    return max(1, min(cpu.cores or 1, min(int(free[1]) << 10, cpu.memory_bytes) // _MEMORY))


def _hash(pattern: str) -> str:
    """Of names and contents of the files of kpt that fit a pattern."""
    root = Path(__file__).resolve().parent.parent
    found = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob(pattern)}
    return schedule_cache.key(**found)


def _key(program: Program, on: Generation, libtpu: str, schedules: bool, sources: Sequence[str]) -> str:
    """Of all that decides what the compiler makes of a program of kpt's own."""
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return schedule_cache.key(
        program=dataclasses.asdict(program), generation=on.name, libtpu=libtpu, sources=list(sources), schedules=schedules,
        versions={n: metadata.version(n) for n in ("jax", "jaxlib", "tokamax") if unmet(n) is None},
        flags={n: v for n, v in os.environ.items() if n in flags or (n.startswith("JAX_") and n != "JAX_PLATFORMS")},
    )


def _compile(programs: Sequence[Program], on: Generation, schedules: bool, processes: _Processes) -> Any:
    """Yields what became of each program. A process that dies takes one program with it; the rest goes on in another, unless stopped."""
    left = list(programs)
    while left:
        with (
            tempfile.TemporaryDirectory(prefix="kpt-tpu-", ignore_cleanup_errors=True) as folder,
            Path(folder, "kpt-errors").open("w+") as log,
        ):
            flags = [os.environ.get("LIBTPU_INIT_ARGS", ""), *((f"--xla_jf_dump_to={folder}", *_FLAGS) if schedules else ())]
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
                "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": folder,
                "LIBTPU_INIT_ARGS": " ".join(filter(None, flags)),
            }  # fmt: skip
            heard, answered = os.pipe()
            told = json.dumps({"generation": on.name, "folder": folder, "schedules": schedules, "answers": answered,
                               "programs": [dataclasses.asdict(p) for p in left]})  # fmt: skip
            command = [sys.executable, "-m", "kpt_jax.tpu"]
            try:
                process = processes.start(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                                          pass_fds=(answered,))  # fmt: skip
            finally:
                os.close(answered)
            answers = _lines(heard)
            if process is None:
                return
            assert process.stdin is not None
            problem = None
            try:
                with contextlib.suppress(BrokenPipeError):  # one that was stopped reads nothing
                    process.stdin.write(told + "\n")
                    process.stdin.flush()
                while left:
                    try:
                        answer = answers.get(timeout=PATIENCE)
                    except queue.Empty:
                        problem = f"it was not done after {PATIENCE} s"
                        break
                    if answer is None:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(timeout=10)  # it ends by itself, and its return code says how
                        break
                    yield dataclasses.replace(Compiled.from_json(answer), program=left.pop(0))
            finally:  # also where nobody asks for the rest
                processes.end(process)
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            if left and not processes.stopped:
                log.seek(0)
                yield _died(left.pop(0), on, process.returncode, log.read(), problem)


def _died(program: Program, on: Generation, code: int, log: str, problem: str | None) -> Compiled:
    """What is said of a program whose process ended before it answered."""
    said = [line for line in log.splitlines() if line.strip()]
    advice = ""
    if problem is None and code < 0:
        problem = f"The process that compiled it was killed by signal {-code} ({signal.Signals(-code).name})"
        fatal = next((line for line in said if re.match(r"F\d{4} ", line)), None)  # of a check that failed, libtpu says so
        if fatal is not None:
            problem += f": {fatal}"
        elif -code == signal.SIGKILL:
            advice = "That is mostly the system, out of memory: compile fewer at a time, or a smaller shape"
    elif problem is None:
        problem = f"The process that compiled it ended with code {code}" + (f": {said[-1]}" if said else "")
    return Compiled(program, on.name, problem[:1000], advice=advice, detail=log)


def _lines(heard: int) -> queue.Queue[dict[str, Any] | None]:
    """Answers that come through a pipe; None after the last. A line that its writer did not end is none."""
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        try:
            with open(heard, encoding="utf-8") as stream:
                for line in stream:
                    if line.endswith("\n"):
                        found.put(json.loads(line))
        finally:
            found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


# In the process that compiles -----------------------------------------------------------------------------------


def _named(function: str, args_from: str | None) -> tuple[Any, tuple[Any, ...]]:
    from kpt.commands.named import attribute, call

    try:
        return call(function, args_from, "A schedule")
    except KptError:
        raise
    except Exception:
        # A function without parameters is called, for it may be a factory. A program with a kernel for TPUs cannot run here, and is
        # traced; what a factory raises, it raises again then.
        if args_from is not None:
            raise
        return attribute(function), ()


def _import(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _as_on_a_tpu(device: Any) -> Iterator[None]:
    """What code asks about the chip while it is imported and traced is answered as on a TPU: kernels ask for the abstract device, and
    people write `interpret=jax.default_backend() != "tpu"`. jax itself asks elsewhere, and computes on what is here."""
    import jax

    about = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    true, jax.default_backend = jax.default_backend, lambda: "tpu"
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=about)):
            yield
    finally:
        jax.default_backend = true


def _scalars(kernel: str, told_of: Sequence[tuple[str, list[np.ndarray | None]]]) -> list[np.ndarray | None]:
    """Operands of a kernel under the compiler's name, `transpose_jvp_NAME__.1`; none where several calls of that name have others."""
    fit = [told_of[i][1] for i in of_kernel(kernel, [name for name, _ in told_of])]

    def alike(a: np.ndarray | None, b: np.ndarray | None) -> bool:
        return a is b is None or (a is not None and b is not None and np.array_equal(a, b))

    same = all(len(a) == len(fit[0]) and all(map(alike, a, fit[0])) for a in fit)
    return fit[0] if fit and same else []


def _read(analysis: Path, on: Generation, told_of: Sequence[tuple[str, list[np.ndarray | None]]]) -> Schedule | None:
    """The schedule that belongs to a dump, if it is that of a Pallas kernel."""
    m = _FINAL.fullmatch(analysis.name)
    # TLP is the program around the kernels.
    if m is None or m["name"] == "TLP" or 'custom_call_target="tpu_custom_call"' not in analysis.read_text(errors="replace"):
        return None
    name = m["name"]

    def dumped(stage: str) -> str:
        """The compiler numbers its stages differently from kernel to kernel."""
        pattern = re.compile(r"\d+-" + re.escape(name) + r"-\d+-" + re.escape(stage) + r"\.txt")
        return next((p.read_text() for p in sorted(analysis.parent.iterdir()) if pattern.fullmatch(p.name)), "")

    vmem = sum(int(n, 16) for n in _VMEM.findall(dumped("original")))
    return schedule(name, on, dumped("final_bundles"), dumped("final_hlo-static-per-bundle-utilization"), vmem, _scalars(name, told_of))


def _compile_one(program: Program, on: Generation, device: Any, folder: Path | None) -> Compiled:
    import jax

    from kpt_jax.pallas_calls import pallas_calls, times_of
    from kpt_jax.prefetched import prefetched

    with _as_on_a_tpu(device):
        fn, args = _import(program.make)(**program.given)
        sharding = jax.sharding.SingleDeviceSharding(device)
        shapes = jax.tree.map(lambda a: _shape(a, sharding), args)
        # What has no argument is compiled for where its results are to be.
        jitted = (fn if hasattr(fn, "lower") else jax.jit(fn)) if jax.tree.leaves(shapes) else jax.jit(fn, out_shardings=sharding)
        made = jitted.lower(*shapes).compile()
        closed = jax.make_jaxpr(fn)(*args) if folder else None
        told_of = prefetched(closed, args) if closed else []
    calls = list(pallas_calls(closed.jaxpr)) if closed else []
    if (wide := next((c for c in calls if c.cores > device.num_cores), None)) is not None:  # the compiler takes it, and leaves work undone
        raise KptError(f"Kernel {wide.name} is for a mesh of {wide.cores} TensorCores", f"A device of {on.name} has {device.num_cores}",
                       "Leave num_cores out, and the mesh has those of the device")  # fmt: skip
    read = [s for path in sorted(folder.iterdir()) if (s := _read(path, on, told_of)) is not None] if folder else []
    times = times_of([s.kernel for s in read], calls)
    cost, memory = made.cost_analysis() or {}, made.memory_analysis()
    accessed = float(cost.get("bytes accessed", 0))
    seconds = float(cost.get("optimal_seconds", -1))  # an operation without an estimate counts -1
    return Compiled(
        program, on.name, None, tuple(dataclasses.replace(s, calls=n) for s, n in zip(read, times, strict=True)),
        int(getattr(memory, "temp_size_in_bytes", 0)), int(getattr(memory, "generated_code_size_in_bytes", 0)),
        accessed, _around(made.as_text() or "", accessed), seconds if seconds > 0 else None,
        interpreted=tuple(c.name for c in calls if c.interpreted),
    )  # fmt: skip


def _shape(a: Any, sharding: Any) -> Any:
    """An array, a `jax.ShapeDtypeStruct`, or a number of Python's, as an array on the TPU."""
    import jax

    aval = jax.api_util.shaped_abstractify(a)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding)


def _around(program: str, accessed: float) -> float | None:
    """Of the bytes that XLA counts in an optimized program: those that are not the word of a kernel's author."""
    if " while(" in program:
        return None
    told = (re.search(r'"bytes_accessed":"(\d+)"', line) for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line)
    return accessed - sum(float(found[1]) for found in told if found)


def _child() -> None:
    """Compiles what the first line of standard input tells, and answers a line for each program."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to who asked as well, whose end is the end here, with nothing left behind
    told = json.loads(sys.stdin.readline())
    os.set_inheritable(told["answers"], False)
    folder = Path(told["folder"])
    threading.Thread(target=_end_with_input, args=(folder,), daemon=True).start()
    from jax.experimental import topologies

    from kpt.tpu import generation

    sys.path.insert(0, os.getcwd())
    on = generation(told["generation"])
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=on.topology).devices[0]
    with open(told["answers"], "w", encoding="utf-8") as answers:
        for given in told["programs"]:
            program = Program(**{**given, "sources": tuple(given["sources"])})
            for path in folder.glob("*.txt"):
                path.unlink()
            try:
                made = _compile_one(program, on, device, folder if told["schedules"] else None)
            except Exception as error:
                made = _failed(program, on, error)
            answers.write(json.dumps(made.to_json()) + "\n")
            answers.flush()


def _end_with_input(folder: Path) -> None:
    """Who asked holds the other end of the standard input. If it is gone nobody waits, and nobody else clears up."""
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _failed(program: Program, on: Generation, error: Exception) -> Compiled:
    """What an exception says, the compiler's or of the program's own code."""
    import jax

    detail = "".join(traceback.format_exception(error))
    if isinstance(error, KptError):
        words = ". ".join(p.rstrip(".") for p in (error.asked, error.possible) if p)
        refused = isinstance(error, KernelError) and _of_a_kernel(error)
        return Compiled(program, on.name, words, refused=refused, advice=error.advice, detail=detail)
    if isinstance(error, jax.errors.JaxRuntimeError):
        short, advice = in_short(" ".join(str(error).split()))
        return Compiled(program, on.name, short[:1000], advice=advice, detail=str(error))
    words = " ".join(said(error).split())[:1000]
    whose = "jax's" if place(error) is None else "code's own"
    return Compiled(program, on.name, words, advice=f"The {whose} words; `kpt --debug tpu ...` shows the way there", detail=detail)


def _of_a_kernel(error: Exception) -> bool:
    """Whether a kernel of kpt's raised it. That it cannot be imported, or is unknown, is no word of a kernel."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("pallas_kernels.")


def measure(fn: Callable[..., Any], args: Sequence[Any], *, clock: Callable[[], float] = time.perf_counter, repeats: int = 5) -> float:
    """Seconds of a call on the device that is here: the median of `repeats`, after one that compiles."""
    import jax

    jax.block_until_ready(fn(*args))
    taken = []
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(fn(*args))
        taken.append(clock() - start)
    return sorted(taken)[repeats // 2]


if __name__ == "__main__":
    _child()
