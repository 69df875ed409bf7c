"""`kpt history`, `kpt compare` and `kpt regress`: what was measured, side by side, and whether it became slower."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpt.console import NO, AsJson, answering, print_json, print_table, seconds, size
from kpt.errors import ConfigError

if TYPE_CHECKING:
    from kpt.tracking.history import Comparison
    from kpt.tracking.run import Run
    from kpt.tracking.statistics import Finding, Thresholds

Name = Annotated[str | None, typer.Option(help="Only runs with this in their name.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots, too.")]
Minor = Annotated[float, typer.Option(min=0, help="Relative increase from which a change is minor.")]
Moderate = Annotated[float, typer.Option(min=0, help="The same for moderate.")]
Severe = Annotated[float, typer.Option(min=0, help="The same for severe.")]


def history(
    context: typer.Context,
    name: Name = None,
    label: Annotated[str | None, typer.Option(help="Only runs with this label.")] = None,
    since: Annotated[str | None, typer.Option(metavar="DATE", help="Only runs since then, UTC: 2026-05-01.")] = None,
    last: Annotated[int, typer.Option(min=1, help="So many of the latest.")] = 50,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """List the runs that were measured.

    kpt.auto_optimize and `kpt bench` add what they measure, unless KPT_RECORD=off; so does kpt.tracking.record. The time is the
    median over a run's samples. Runs are of one series if name, model, passes, hardware and machine agree.

    Examples: kpt history --name attention
              kpt history --since 2026-05-01 --html history.html
    """
    with answering(context, as_json):
        from kpt.tracking.history import History

        runs = History().runs(name, label, None if since is None else _utc(since), last)
        if html is not None:
            from kpt.tracking.page import history_page

            _say_where(history_page(runs, html, " ".join(filter(None, ("kpt history", name and f"--name {name!r}")))), as_json)
        if as_json:
            print_json([r.to_json() for r in runs])
        elif not runs and (name or label or since) and History().runs(last=1):
            typer.echo("No run is so named, labelled or recent; kpt history lists all of them.")
        elif not runs:
            typer.echo("No runs. kpt.auto_optimize and kpt bench record what they measure.")
        else:
            columns = ("run", "recorded (UTC)", "name", "measured", "time", "samples", "memory", "error", "commit", "label")
            print_table(columns, [_row(r) for r in runs])


def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A label, or how a run's id or a commit begins (4 digits or more).")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, for what is compared with A.")],
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Compare the runs of A with those of B.

    For each series that both have: the change of time and memory, its confidence interval, and whether it is more than this
    machine's noise from run to run. A change is judged from 8 runs of A and 3 of B on; with fewer the interval is from the noise of
    the machine's earlier runs, if there are 8, and there is no verdict. Always exits with 0; for a gate there is `kpt regress`.

    Examples: kpt compare v1.2 v1.3
              kpt compare 3f2a91c b07d4e8 --html compare.html
    """
    with answering(context, as_json):
        from kpt.tracking.history import History, compare

        kept = History()
        left, right = kept.select(a), kept.select(b)
        found = compare(left, right, history=kept.runs())
        if not found:
            raise ConfigError(
                f"{a} and {b} were to be compared", "They have no series in common: name, model, passes, hardware and machine must agree",
                "kpt history --json shows them",
            )  # fmt: skip
        _answer(found, f"{b} beside {a}", f"kpt compare {a} {b}", html, as_json, None)


def regress(
    context: typer.Context,
    fail_on: Annotated[
        str, typer.Option(help="The least severity that makes the exit code 1: minor, moderate, severe or never.")
    ] = "moderate",
    name: Name = None,
    recent: Annotated[int, typer.Option(min=3, help="The latest runs of each series that are judged: 3 or more.")] = 5,
    minor: Minor = 0.02,
    moderate: Moderate = 0.05,
    severe: Severe = 0.15,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Say whether the latest runs are slower, or need more memory, than those before.

    The last 5 runs of each series are held against up to 30 before them, back to the last change of level: a rank test over whole
    runs, and a confidence interval with this machine's noise from run to run. A significant increase is minor from 2%, moderate
    from 5%, severe from 15%. With fewer than 8 runs before or 3 recent ones there is no verdict, and no failure. How often it is
    wrong: python -m kpt.tracking.simulate, docs/history.md.

    Exit codes: 0 no regression of that severity; 1 there is one; 2 the request cannot be met.

    Example, in CI: for i in 1 2 3 4 5; do kpt bench rms_norm; done && kpt regress --fail-on moderate
    """
    with answering(context, as_json):
        from kpt.tracking.history import History, regressions
        from kpt.tracking.statistics import SEVERITIES, Thresholds

        if fail_on not in (*SEVERITIES, "never"):
            raise ConfigError(f"--fail-on {fail_on} was given", "It is minor, moderate, severe or never", "Give one of them")
        limits = Thresholds(minor=minor, moderate=moderate, severe=severe, recent=recent)
        kept = History()
        runs = kept.runs(name)
        if not runs and kept.runs(last=1):
            raise ConfigError(f"--name {name} was given", "No run has that in its name: nothing could fail", "kpt history lists the runs")
        found = regressions(runs, limits)
        failing = SEVERITIES[SEVERITIES.index(fail_on) :] if fail_on != "never" else ()
        failed = [c for c in found if c.worst.verdict in failing]
        _answer(found, "The latest runs, beside those before", f"kpt regress --fail-on {fail_on}", html, as_json, limits, bool(failed))
        if failed:
            raise typer.Exit(NO)


def add_to(app: typer.Typer) -> None:
    """Adds the commands, with their names."""
    for command in (history, compare, regress):
        app.command()(command)


def _utc(text: str) -> str:
    """A date or time as runs have theirs, so that the two compare as text."""
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--since {text} was given", "It is a date or time, UTC unless it says otherwise", "Write it like 2026-05-01 or "
                          "2026-05-01T12:00") from None  # fmt: skip
    return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC).isoformat()


def _row(r: Run) -> tuple[str, ...]:
    return (
        r.id, r.recorded[:16].replace("T", " "), r.name, r.measured, seconds(r.median), str(len(r.seconds)),
        "-" if r.memory is None else size(r.memory), "-" if r.error is None else f"{r.error:.1e}", r.commit or "-", r.label or "-",
    )  # fmt: skip


def change(finding: Finding) -> str:
    """A change and its interval in words."""
    from kpt.tracking.statistics import signed

    if finding.effect is None:
        return "-"
    interval = "" if finding.low is None or finding.high is None else f" [{signed(finding.low)}, {signed(finding.high)}]"
    return f"{signed(finding.effect)}{interval}"


def _answer(
    found: Sequence[Comparison],
    what: str,
    command: str,
    html: Path | None,
    as_json: bool,
    limits: Thresholds | None,
    failed: bool | None = None,
) -> None:
    if html is not None:
        from kpt.tracking.page import comparison_page

        _say_where(comparison_page(found, html, what, command, limits, failed), as_json)
    if as_json:
        print_json(({} if failed is None else {"failed": failed}) | {"series": [c.to_json() for c in found]})
        return
    if not found:
        typer.echo("No runs. kpt.auto_optimize and kpt bench record what they measure.")
        return
    rows = []
    for c in found:
        for kind, finding in (("time", c.time), ("memory", c.memory)):
            if finding is not None:
                runs = f"{finding.baseline} / {finding.recent}"
                rows.append((c.name, c.after[-1].measured, kind, finding.verdict, change(finding), runs, finding.reason))
    print_table(("series", "measured", "of", "verdict", "change", "runs", "because"), rows)
    for c in found:
        if c.changed is not None:
            at = f"{c.changed.recorded[:16].replace('T', ' ')}, commit {c.changed.commit or 'unknown'}"
            typer.echo(f"{c.name}: the level changed at run {c.changed.id} ({at}).")
        if c.note:
            typer.echo(c.note)


def _say_where(path: Path, quiet: bool) -> None:
    typer.echo(f"Written: {path}", err=quiet)
