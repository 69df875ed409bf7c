"""`kpt tune`: kernels timed ahead; `kpt tune export` and `kpt tune import`: measurements from one machine for another."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt.commands.named import ArgsFrom, call
from kpt.console import AsJson, answering, front_end, print_json
from kpt.errors import ConfigError, MissingDependencyError, StoreError

if TYPE_CHECKING:
    from kpt.strategy.tune import Runner

app = typer.Typer()


@app.callback(invoke_without_command=True)
def tune(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="An op, or a benchmark of `kpt bench`; again for more. All by default.")] = None,
    framework: Annotated[str | None, typer.Option(help="Whose kernels: jax, unless given, or torch.")] = None,
    program: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="The calls of this function, model or factory instead of an op's.")
    ] = None,
    args_from: ArgsFrom = None,
    budget: Annotated[str, typer.Option(help='How long the trials may take: seconds, or "30s", "10m", "1h".')] = "10m",
    dtype: Annotated[str | None, typer.Option(help="bfloat16, or float32 on a CPU, unless given.")] = None,
    level: Annotated[str, typer.Option(help="conservative, balanced or aggressive.")] = "balanced",
    as_json: AsJson = False,
) -> None:
    """Time the kernels that could compute an op against each other, on this machine, before a program asks.

    At common shapes (those of `kpt bench`), forward and with the backward pass; or the calls of a program, a JAX function or a
    PyTorch module, as it is used. What is measured already is not measured again: an interrupted run goes on where it was. Plans
    choose by what is found here (`kpt plan` says "measured"), and without it by estimate. On a CPU one kernel computes each op, so that
    there is nothing to time until another package brings kernels.

    Examples: kpt tune --op attention --budget 5m; kpt tune --framework torch; kpt tune --program train:model --args-from train:batch;
    kpt tune --program train:model_and_batch (a function that returns both)
    """
    if context.invoked_subcommand is not None:
        return
    with answering(context, as_json):
        import dataclasses

        from kpt.auto import session
        from kpt.console import print_table, progress
        from kpt.console import seconds as words
        from kpt.hardware import planned_elsewhere
        from kpt.strategy.levels import level_named
        from kpt.strategy.tune import ahead
        from kpt.tuning.trials import seconds_of

        time, rows, level = seconds_of(budget), [], level_named(level).name
        if program is not None and (op or framework or dtype):
            raise ConfigError("Tuning of a --program was asked for with --op, --framework or --dtype", "Its calls are what they are",
                              "Leave these out, or --program")  # fmt: skip
        if program is None and args_from is not None:
            raise ConfigError("Tuning of ops was asked for with --args-from", "Ops have shapes of their own", "Name a --program")
        if program is not None:
            target, arguments = call(program, args_from, "Tuning")
            found = session(target, arguments, {}, level, "auto").tune(time)
        else:
            calls, runner = _front(framework or "jax", "calls")(op or (), dtype), _front(framework or "jax", "runner")()
            planned_elsewhere(runner.hardware)
            if dtype is not None:
                _possible(dtype, {c.op for c in calls}, runner)
            with progress() as bar:
                task = bar.add_task("timing kernels", total=None)

                def done(trial: Any, outcome: Any) -> None:
                    bar.update(task, advance=1, description=str(trial))
                    best = sorted((statistics.median(s), kernel) for kernel, s in outcome.seconds.items())
                    rows.append((str(trial), "  ".join(f"{kernel} {words(t)}" for t, kernel in best)))

                found = ahead(calls, runner, level, time, done)
        if as_json:
            print_json(dataclasses.asdict(found))
            return
        if rows:
            print_table(("call", "fastest first"), rows)
        for kernel, why in found.dropped.items():
            typer.echo(f"{kernel} {why}.")
        alone = "" if rows or found.known else " Where one kernel alone can compute an op, there is nothing to compare."
        typer.echo(f"{found.measured} calls measured, {found.known} known already, {found.left} left for another run.{alone}")


@app.command("export")
def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the JSON goes.")],
    as_json: AsJson = False,
) -> None:
    """Write what was measured on this machine to a file, with where and when.

    What this machine imported itself is left out: it cannot vouch for that.

    Example: kpt tune export h100.json
    """
    with answering(context, as_json):
        from kpt.tuning import Measurements, export_json

        table = Measurements()
        text = export_json(table)
        try:
            file.write_text(text + "\n", encoding="utf-8")
        except OSError as problem:
            raise StoreError(f"{file} was to be written", str(problem), "Name a file in a directory that can be written") from None
        rows = sum(not m.origin for m in table.all())
        if as_json:
            print_json({"file": str(file), "rows": rows})
        else:
            typer.echo(f"{rows} measurement{'' if rows == 1 else 's'} in {file}.")


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What kpt tune export wrote.")],
    as_json: AsJson = False,
) -> None:
    """Take in measurements from another machine.

    A sample of five calls is measured again, where chip, driver and framework versions are those of this machine. If the kernel that won
    there loses in none of them here by more than the noise, plans choose by these measurements. Otherwise, and on other hardware, they are
    kept with where they are from, and not used. What was measured here is not replaced.

    Example: kpt tune import h100.json
    """
    with answering(context, as_json):
        import dataclasses

        from kpt.tuning import Measurements, import_json

        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise StoreError(f"{file} was to be imported", str(problem), "Give a file that kpt tune export wrote") from None
        told = import_json(Measurements(), text, _again, source=file)
        if as_json:
            print_json(dataclasses.asdict(told))
        else:
            typer.echo(f"{told.rows} measurements, {told.added} of them new: {told.origin}.")
            for note in told.notes:
                typer.echo(note)


def _possible(dtype: str, ops: Collection[str], runner: Runner) -> None:
    """Refuses a dtype in which no kernel here computes any of the ops."""
    from kpt.kernels import registry

    here = [k for k in registry.kernels() if k.op in ops and k.framework == runner.framework and runner.hardware.platform in k.platforms]
    there = list(dict.fromkeys(d for k in here for d in k.dtypes))
    if dtype not in there:
        asked = f"Calls on arrays of {dtype!r} were to be timed"
        raise ConfigError(asked, f"Kernels here compute in {', '.join(there)}", "Name one of them")


def _again(environment: Any, contests: Any, count: int) -> Any:
    """Calls measured again by the front end whose framework they were measured with."""
    from kpt.auto import showing
    from kpt.strategy.tune import measured_again

    framework = environment[2].partition(" ")[0]
    try:
        runner = _front(framework, "runner")()
    except (ConfigError, MissingDependencyError) as problem:
        return str(problem).rstrip(".")
    with showing("measuring a sample again") as done:
        return measured_again(runner, environment, contests, count, done)


def _front(framework: str, name: str) -> Any:
    """What a front end gives to `kpt tune`."""
    from kpt.kernels.spec import FRAMEWORKS

    if framework not in FRAMEWORKS:
        raise ConfigError(f"Kernels of {framework!r} were asked for", f"There are those of {' and '.join(FRAMEWORKS)}", "Name one of them")
    return front_end(f"kpt_{framework}.tune_ahead", name)
