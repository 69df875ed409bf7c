"""`kpt tpu`: Pallas kernels compiled, scheduled and tuned by the TPU's own compiler, with no TPU here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kpt.commands.named import ArgsFrom, call
from kpt.console import NO, REFUSED, AsJson, answering, front_end, print_json, print_table, seconds, size
from kpt.console import progress as progress_bar
from kpt.errors import KptError, MissingDependencyError

INTERRUPTED = 130
"""As a shell has it, 128 + SIGINT."""
LOOPS = 6
"""Levels of loops that a table shows, the costliest."""

app = typer.Typer(help="TPU kernels as their compiler schedules them, with no TPU here.", no_args_is_help=True)

Op = Annotated[list[str] | None, typer.Option("--op", help="An op, or a benchmark of `kpt bench`; may be given several times.")]
Gen = Annotated[str, typer.Option(help="TPU generations, with commas: v4,v5e,v5p,v6e,v7x.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Compilations at a time. [default: one a core, with 3 GiB of free memory each]")]


@app.command("compile")
def compile_kernels(
    context: typer.Context,
    op: Op = None,
    gen: Gen = "v4,v5e,v5p,v6e,v7x",
    every_shape: Annotated[bool, typer.Option("--every-shape", help="All shapes of `kpt bench`, not the first of each.")] = False,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Compile kpt's TPU kernels for every generation, forward and backward, with no TPU here.

    The real TPU compiler (libtpu) takes each kernel at its benchmark shape, in bfloat16, and at the first one in float32 too; matmul
    in int8 as well, forward.
    Shown are the memory and the time of each, by its schedule, or what the compiler said. Exit code 1 if it failed on one; what a
    kernel does not take on a chip (its blocks do not fit the VMEM) it refuses by itself, and another provider runs such calls.
    Schedules are kept in the cache, and made again when kpt's code or a version changes.

    Example: kpt tpu compile --op attention --gen v5e,v6e
    """
    with answering(context, as_json):
        cases, program = front_end("kpt_jax.tpu_programs", "cases"), front_end("kpt_jax.tpu_programs", "program")
        generations = _generations(gen)
        chosen = cases(op or (), every_shape)
        programs, seen = [], set()
        for name, dims in chosen:
            programs.append(program(name, dims))
            if name not in seen:  # the first shape of each
                programs.append(program(name, dims, dtype="float32"))
                if name == "matmul":  # products of bytes have no gradients
                    programs.append(program(name, dims, dtype="int8", passes="forward"))
            seen.add(name)
        found = _compiled(programs, generations, jobs)
        unmade = [m for m in found if m.error is not None]
        refused = [m for m in unmade if m.refused]
        if as_json:
            # What happens bundle by bundle is `kpt tpu schedule`'s to tell.
            print_json([{**(told := m.to_json()), "schedules": [s | {"stretches": []} for s in told["schedules"]]} for m in found])
        else:
            rows = []
            for m in found:
                where = (m.program.label, m.generation)
                if m.error is not None:
                    rows.append((*where, "", "", "refused" if m.refused else "failed", *[""] * 6))
                    continue
                rows += [
                    (*((*where, size(m.code), size(m.around)) if i == 0 else [""] * 4), s.kernel, str(s.cores), size(s.vmem),
                     size(s.read + s.written), f"{s.cycles:,.0f}", seconds(s.seconds), s.bound)
                    for i, s in enumerate(m.schedules)
                ]  # fmt: skip
            print_table(("program", "TPU", "code", "around", "kernel", "cores", "VMEM", "HBM", "cycles", "time", "bound"), rows)
            for m in unmade:
                typer.echo(f"{m.program.label} on {m.generation}: {m.error}" + (f". {m.advice}." if m.advice else ""))
            typer.echo(f"{len(found) - len(unmade)} of {len(found)} programs compiled, {len(refused)} refused by the kernel.")
        if len(unmade) > len(refused):
            raise typer.Exit(NO)


@app.command("schedule")
def schedule(
    context: typer.Context,
    function: Annotated[
        str | None, typer.Argument(metavar="[MODULE:FUNCTION]", help="A function that calls Pallas kernels, anybody's.")
    ] = None,
    args_from: ArgsFrom = None,
    op: Op = None,
    shape: Annotated[str | None, typer.Option(help="With --op: numbers with x between, as `kpt bench` has them.")] = None,
    gen: Gen = "v5e",
    plot: Annotated[
        Path | None, typer.Option(help="Where a chart of the longest kernel's units, bundle by bundle, goes: SVG, PNG or PDF, by its name.")
    ] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Compile a function for a TPU that is not here, and show what bounds its Pallas kernels.

    The real TPU compiler (libtpu) schedules every kernel; kpt runs the scalar instructions of the schedule, and so counts how
    often each bundle is issued, blocks that a mask skips included, and what waits for HBM. How far to trust the times:
    docs/benchmarks/tpu-static.md. Arguments may be jax.ShapeDtypeStructs; integers that are arrays count as known, so that
    what they skip does not count. While it is traced, jax.default_backend() is "tpu". With --op, kpt's own kernels, forward and
    backward.

    \b
    Examples: kpt tpu schedule my.module:step --args-from my.module:arguments --gen v5e,v6e
              kpt tpu schedule --op attention_causal --shape 4x4096x16x16x128 --plot units.svg
    """
    with answering(context, as_json):
        generations = _generations(gen)
        if plot is not None:
            from kpt.report import drawable

            drawable(plot)
        if (function is None) == (op is None):
            raise KptError("A schedule was asked for", "It is that of MODULE:FUNCTION or of --op", "Give one of the two")
        if function is not None and shape is not None:
            raise KptError(f"The schedule of {function} was asked for with --shape", "Its arguments have shapes", "Give --args-from alone")
        if op is not None and args_from is not None:
            raise KptError("The schedule of --op was asked for with --args-from", "Its arrays are those of `kpt bench`", "Give --shape")
        if function is not None:
            call(function, args_from, "The schedule")  # its errors are better than those of the process that compiles
            programs = [front_end("kpt_jax.tpu", "users_program")(function, args_from)]
        else:
            cases, program = front_end("kpt_jax.tpu_programs", "cases"), front_end("kpt_jax.tpu_programs", "program")
            dims = _shape(shape)
            programs = [program(name, dims or first) for name, first in cases(op)]
        found = _compiled(programs, generations, jobs)
        require, interpreted = front_end("kpt_jax.tpu", "require"), front_end("kpt_jax.tpu", "interpreted")
        failed = [made for made in found if made.error is not None]
        if len(failed) == len(found):
            require(failed[0])
        pairs = [(made, s) for made in found for s in made.schedules]
        schedules = [s for _, s in pairs]
        unmade = next((why for made in found if (why := interpreted(made)) is not None), None)
        if not schedules:
            asked = f"The schedule of {function} was asked for"
            raise KptError(asked, *(unmade or ("It calls no Pallas kernel", "Name a function that does, or whose plan does")))
        longest = max(schedules, key=lambda s: s.seconds)
        if plot is not None:
            from kpt.tpu import plot as draw

            draw(longest, plot)
        if unmade is not None:
            typer.echo(". ".join(unmade) + ".", err=True)
        passes = [_pass(made, s) if op else None for made, s in pairs]
        if as_json:
            print_json([
                *({**s.to_json(), "program": made.program.label, "pass": which, "loops": [dataclasses.asdict(level) for level in s.loops]}
                  for (made, s), which in zip(pairs, passes, strict=True)),
                *({"program": made.program.label, "generation": made.generation, "error": made.error, "advice": made.advice}
                  for made in failed),
            ])  # fmt: skip
            if failed:
                raise typer.Exit(REFUSED)
            return
        units = ("MXU", "VPU", "XLU", "EUP", "load", "store")
        rows = []
        for (made, s), which in zip(pairs, passes, strict=True):
            ours = [f"{made.program.given['name']}, {which}"] if op else []
            row = [s.kernel, *ours, s.generation, str(s.cores), _calls(s), seconds(s.seconds), f"{s.cycles:,.0f}"]
            row += [f"{s.stalled / max(s.cycles, 1):.0%}", s.bound, *(f"{s.occupancy[u]:.0%}" for u in units)]
            rows.append([*row, size(s.vmem), size(s.read + s.written), f"{s.spills:,}"])
        figures = "time", "cycles", "stalled", "bound", *units, "VMEM", "HBM", "spills"
        print_table(("kernel", *(["program"] if op else []), "TPU", "cores", "calls", *figures), rows)
        _print_loops(longest, units)
        typer.echo("Every figure is of one call of a kernel on one core, HBM bytes too. What the words mean: docs/tpu.md.")
        if still := [s for s in schedules if s.read == 0]:
            typer.echo(f"{_names(still)}: nothing is read from HBM: XLA has what the kernel takes in VMEM.")
        if any(s.calls != 1 for s in schedules):
            typer.echo("calls: how often a loop of the program (lax.scan) repeats the kernel; ? where the program alone does not tell.")
            if all(s.calls is not None for s in schedules):
                totals = [(made.generation, sum(s.seconds * s.calls for s in made.schedules)) for made in found if made.error is None]
                typer.echo("All calls together: " + ", ".join(f"{seconds(total)} on {on}" for on, total in totals) + ".")
        if guessed := [s for s in schedules if s.unknown]:
            typer.echo(f"{_names(guessed)}: some branches depend on data; what they may skip is counted. Of --args-from, integers that are "
                       "arrays and come to scalar memory whole count as known: docs/tpu.md.")  # fmt: skip
        for made in failed[1:]:
            typer.echo(f"{made.program.label} on {made.generation}: {made.error}", err=True)
        if failed:
            require(failed[0])


def _print_loops(schedule: Any, units: Sequence[str]) -> None:
    """The costliest levels of a kernel's loops, in the order of the program, and the rest in a row."""
    levels = [level for level in schedule.loops if level.issued]
    shown = sorted(levels, key=lambda level: -level.bundles * level.issued)[:LOOPS]
    cycles = {level.start: level.bundles * level.issued for level in levels}
    issued = max(sum(cycles.values()), 1)
    rows = [
        (f"{level.start:,}", f"{level.bundles:,}", f"{level.issued:,}", f"{cycles[level.start]:,}", f"{cycles[level.start] / issued:.0%}",
         *(f"{level.occupancy[u]:.0%}" for u in units))
        for level in sorted(shown, key=lambda level: level.start)
    ]  # fmt: skip
    if rest := [level for level in levels if level not in shown]:
        bundles, spent = sum(level.bundles for level in rest), sum(cycles[level.start] for level in rest)
        rows.append(("others", f"{bundles:,}", "", f"{spent:,}", f"{spent / issued:.0%}", *[""] * len(units)))
    typer.echo(f"Where the cycles of {schedule.kernel} on {schedule.generation} go, stalls aside:")
    print_table(("from bundle", "bundles", "times", "cycles", "of all", *units), rows)


def _names(schedules: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(f"{s.kernel} on {s.generation}" for s in schedules))


@app.command("tune")
def tune(
    context: typer.Context,
    op: Op = None,
    shape: Annotated[str | None, typer.Option(help="Numbers with x between, as `kpt bench` has them. [default: each op's first]")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    gen: Gen = "v5e",
    jobs: Jobs = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which no further round of candidates begins; 0: no limit.")] = 0,
    write: Annotated[
        Path | None, typer.Option(help="A table to put better blocks into; pallas_kernels/tuned_tpu.json is what kernels read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search the block sizes of kpt's TPU kernels by compiling them and reading their schedules, with no TPU here.

    From what a kernel's rule chooses, no larger than the array, each size is doubled and halved, and the best neighbour is next,
    until none is better; neighbours that cost the same are walked through. What is compared is the time of the forward and the
    backward pass together. Schedules are kept in the cache: a search that was interrupted goes on where it was. On a TPU the
    candidates are measured. Without --op, all kernels are searched, which takes hours; an op stands for all its benchmarks
    (rms_norm for rms_norm_residual too). Exit code 1 if one of several could not be searched.

    Example: kpt tpu tune --op matmul --shape 4096x4096x4096 --gen v5e,v6e --budget 600
    """
    with answering(context, as_json):
        import time

        cases, program = front_end("kpt_jax.tpu_programs", "cases"), front_end("kpt_jax.tpu_programs", "program")
        search, write_row = front_end("kpt_jax.tpu_tune", "tune"), front_end("kpt_jax.tpu_tune", "write")
        generations, dims = _generations(gen), _shape(shape)
        todo = [(name, dims or first, on) for name, first in cases(op or ()) for on in generations]
        for name, extents, _ in todo:  # what cannot be is said before hours of searching
            program(name, extents)
        options = [*(f"--op {n}" for n in op or ()), *([f"--shape {shape}"] if shape else []), f"--dtype {dtype}", f"--gen {gen}"]
        command = " ".join(["kpt tpu tune", *options])
        if write is not None:
            front_end("kpt_jax.tpu_tune", "require_table")(write)
        if not op:
            typer.echo(f"All {len(todo)} kernels are searched at full shapes; --op, --shape and --budget make it less.", err=True)
        start, found, failed = time.monotonic(), [], []
        try:
            with progress_bar() as progress:
                task = progress.add_task("", total=len(todo))
                for n, (name, extents, on) in enumerate(todo):
                    progress.update(task, description=f"{name} on {on.name}")
                    if not progress.console.is_terminal:
                        typer.echo(f"{n + 1} of {len(todo)}: {name} {'x'.join(map(str, extents))} on {on.name}", err=True)
                    tried = iter(range(1, 1 << 30))
                    try:
                        tuned = search(
                            name, extents, on, dtype=dtype, jobs=jobs, more=lambda: not budget or time.monotonic() - start < budget,
                            done=lambda _, name=name, on=on, tried=tried: progress.update(
                                task, description=f"{name} on {on.name}, {next(tried)} candidates"),
                        )  # fmt: skip
                    except KptError as error:
                        if len(todo) == 1 or isinstance(error, MissingDependencyError):
                            raise
                        failed.append(f"{name} on {on.name}: {error}")
                    else:
                        found.append(tuned)
                        if write is not None:
                            write_row(write, tuned, on, command)
                    progress.advance(task)
        except KeyboardInterrupt:
            _print_tuned(found, as_json)
            _resumable()
            raise typer.Exit(INTERRUPTED) from None
        _print_tuned(found, as_json)
        for words in failed:
            typer.echo(words, err=True)
        if failed:
            raise typer.Exit(NO)


def _print_tuned(found: Sequence[Any], as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(t) for t in found])
        return

    def sizes(blocks: dict[str, int]) -> str:
        return " ".join(f"{n}={length}" for n, length in blocks.items())

    def cost(t: Any, value: float) -> str:
        return seconds(value) if t.method == "clock" else f"{value:,.0f} cycles"

    if found:
        print_table(
            ("kernel", "shape", "TPU", "by rule", "takes", "best", "takes", "gain", "tried", "refused"),
            [(t.bench, "x".join(map(str, t.dims)), t.generation, sizes(t.default), cost(t, t.default_cost),
              *((sizes(t.best), cost(t, t.cost)) if t.best != t.default else ("the same", "")),
              f"{t.default_cost / t.cost - 1:.1%}", str(t.tried), str(t.failed)) for t in found],
        )  # fmt: skip
        typer.echo("Of the forward and the backward pass together; by rule, each product may have smaller blocks than these.")
    if not all(t.finished for t in found):
        typer.echo("The budget ended a search; the same command goes on where it was.")


def _generations(text: str) -> list[Any]:
    from kpt.tpu import generation

    names = [name.strip() for name in text.split(",") if name.strip()]
    return list(dict.fromkeys(generation(name) for name in names or [text]))


def _resumable() -> None:
    """Says to who stops a search what becomes of it."""
    from kpt.tpu import cache

    typer.echo(f"Stopped. Schedules that were read are kept in {cache.folder()}: the same command goes on from them.", err=True)
    if front_end("kpt_jax.tpu_tune", "measures")():
        typer.echo("What a TPU measured is not kept: there it begins again.", err=True)


def _pass(made: Any, schedule: Any) -> str:
    """Which pass of a program of kpt's calls a kernel."""
    return "backward" if schedule in front_end("kpt_jax.bench_tpu_peers", "of_pass")(made, "backward") else "forward"


def _calls(schedule: Any) -> str:
    return "?" if schedule.calls is None else f"{schedule.calls:,}"


def _shape(text: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(n) for n in text.split("x")) if text else None
    except ValueError:
        raise KptError(f"Shape {text!r} was given", "A shape is numbers with x between", "Write 4096x4096x4096") from None


def _compiled(programs: Sequence[Any], generations: Sequence[Any], jobs: int | None) -> list[Any]:
    """Compiles with a progress bar."""
    compile_programs = front_end("kpt_jax.tpu", "compile_programs")
    with progress_bar() as progress:
        task = progress.add_task("compiling", total=len(programs) * len(generations))

        def done(made: Any) -> None:
            progress.update(task, advance=1, description=f"{made.program.label} for {made.generation}")

        return list(compile_programs(programs, generations, jobs=jobs, done=done))
