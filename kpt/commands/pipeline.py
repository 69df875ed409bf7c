"""`kpt pipeline run`: everything between a program and its release, in one command for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kpt.console import NO, AsJson, answering, make_console, print_json, seconds

app = typer.Typer(help="From a program to an artifact that a release can rest on.", no_args_is_help=True)


@app.command("run")
def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to run: docs/pipeline.md.")],
    as_json: AsJson = False,
) -> None:
    """Detect, plan, tune, validate, measure, record, judge, and write an artifact.

    The artifact is a folder with the plan and its certificates, the report, what was tuned, the environment and the verdict.
    A run that was interrupted goes on where it was.

    Exit codes: 0 it passed; 1 the gate found a regression; 2 the request cannot be met.

    Example: kpt pipeline run kpt.toml
    """
    with answering(context, as_json):
        from kpt.commands.named import call
        from kpt.pipeline import STEPS, configured
        from kpt.strategy.explain import count

        def named(function: str, inputs: str | None) -> tuple[Any, tuple]:
            return call(function, inputs, "The pipeline")

        console = make_console(stderr=True)
        made = configured(config, named).run(lambda step: console.print(f"{STEPS.index(step) + 1}/{len(STEPS)} {step}", highlight=False))
        report = made.report
        if as_json:
            print_json({"artifact": made.folder, "checkpoint": made.checkpoint, "passed": made.passed, "verdict": made.verdict,
                        "kept": report.kept, "speedup": report.speedup, "sites": len(report.plan.sites)})  # fmt: skip
        else:
            before, after = (sorted(s)[len(s) // 2] for s in (report.seconds_before, report.seconds_after))
            kept = f"{count(len(report.plan.sites), 'site')} with a kernel" if report.kept else "the original is kept"
            through = "" if report.one_program else f", {seconds(after)} through kpt"
            typer.echo(f"{report.function}: {seconds(before)} as written{through}, {report.measured}; {kept}.")
            if report.plan.notes:
                typer.echo(report.plan.notes[-1])
            typer.echo(f"Gate: {made.verdict}, {'passed' if made.passed else 'failed'}. Artifact: {made.folder}")
        if not made.passed:
            raise typer.Exit(NO)
