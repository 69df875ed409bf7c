"""`kpt tune export` and `kpt tune import`: measurements from one machine for another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpt.console import AsJson, answering, print_json
from kpt.errors import StoreError

app = typer.Typer(help="Measurements of kernels: move them between machines.", no_args_is_help=True)


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

    They are kept with where they are from, and no kernel is chosen by them before a sample of them has been measured again on this
    machine and agreed (kpt.tuning.import_json with measure_again). What was measured here is not replaced.

    Example: kpt tune import h100.json
    """
    with answering(context, as_json):
        import dataclasses

        from kpt.tuning import Measurements, import_json

        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise StoreError(f"{file} was to be imported", str(problem), "Give a file that kpt tune export wrote") from None
        told = import_json(Measurements(), text)
        if as_json:
            print_json(dataclasses.asdict(told))
        else:
            typer.echo(f"{told.rows} measurements, {told.added} of them new, unverified: {told.origin}.")
