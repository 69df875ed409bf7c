"""What the commands share: how an answer is printed, how an error becomes a sentence and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt.errors import KptError, MissingDependencyError
from kpt.install import install
from kpt.raised import told

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

OK, NO, REFUSED, MISSING, CRASHED = range(5)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@contextlib.contextmanager
def answering(context: typer.Context, as_json: bool) -> Iterator[None]:
    """Turns an error into one sentence (or JSON) and an exit code; with --debug, after its traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        # The reader has seen enough (`kpt kernels list | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(OK) from None
    except Exception as error:
        if context.obj:
            traceback.print_exc()  # and the same exit code: Python's own for an error is 1, which says that the answer is no
        code = MISSING if isinstance(error, MissingDependencyError) else REFUSED if isinstance(error, KptError) else CRASHED
        message = str(error) if isinstance(error, KptError) else told(error)
        if as_json:
            fields = {"error": type(error).__name__, "message": message}
            if isinstance(error, KptError):
                fields |= {"asked": error.asked, "possible": error.possible, "advice": error.advice}
            print_json(fields)
        else:
            make_console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
            if code == CRASHED and not context.obj:
                typer.echo("kpt --debug ... shows where this comes from.", err=True)
        raise typer.Exit(code) from None


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Rows under column names, or without a head where all names are empty."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    (console or make_console()).print(table)


def make_console(stderr: bool = False) -> Console:
    """A rich console; into a pipe, wide."""
    from rich.console import Console

    console = Console(stderr=stderr)
    # A pipe has no width; a reader's grep should not meet wrapped lines.
    return console if console.is_terminal else Console(stderr=stderr, width=200)


def progress() -> Progress:
    """A bar on standard error that goes away when it is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=make_console(stderr=True), transient=True)


def front_end(module: str, name: str) -> Callable[..., Any]:
    """A function of a front end, "kpt_jax..." or "kpt_torch...".

    Raises:
      MissingDependencyError: jax, flax, optax or torch is not installed.
    """
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("jax", "jaxlib", "flax", "optax", "torch"):
            raise
        name, extra = ("PyTorch", "torch") if module.startswith("kpt_torch") else ("JAX", "jax")
        raise MissingDependencyError(
            f"The {name} front end was asked for", f"{package} is not installed", install(extra)
        ) from None


def print_json(value: Any) -> None:
    """What `--json` prints; values that JSON has no word for become their text."""
    typer.echo(json.dumps(value, indent=1, default=str))


def words(value: Any) -> str:
    """A field's value for people; "-" for nothing."""
    if isinstance(value, dict):
        return "; ".join(f"{k}: {words(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def flops(value: float | None) -> str:
    """FLOP/s in words; "unknown" for None."""
    return "unknown" if value is None else f"{value / 1e12:,.4g} TFLOP/s"


def size(value: float | None) -> str:
    """Bytes in words; "unknown" for None."""
    if value is None:
        return "unknown"
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if value >= u), (2**10, "KiB"))
    return f"{value / unit:,.4g} {name}"


def rate(value: float | None) -> str:
    """Bytes/s in words; "unknown" for None."""
    return "unknown" if value is None else f"{value / 1e9:,.4g} GB/s"


def seconds(value: float) -> str:
    """Seconds in words."""
    unit, name = next(((u, n) for u, n in ((1.0, "s"), (1e-3, "ms")) if value >= u), (1e-6, "µs"))
    return f"{value / unit:,.4g} {name}"
