"""What `kpt demo` shows: the terminal's text and the HTML report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

from kpt.hardware import HardwareProfile
from kpt.report import Bar, Figure, Line, Report, Table, bar_chart, line_chart, writable, write
from kpt_jax.demo import BATCH, STEPS, TOLERANCE, Demo, Variant, prepare, train, versions
from kpt_jax.devices import here

COMMAND = "kpt demo"


def run(steps: int | None, out: Path, console: Console) -> dict[str, Any]:
    """The whole demo: plans, trains, prints to `console`, writes the report to `out`; returns the figures.

    Raises:
      ConfigError: as `kpt.report.writable`, before anything is trained.
    """
    writable(out)
    steps = steps or STEPS
    hardware = here()
    console.print(f"[bold]Hardware[/]  {hardware.model} ({hardware.name})", highlight=False)
    with console.status("starting") as status:
        demo = prepare(steps, announce=status.update)
    for name, value in facts(demo, hardware)[1:4]:
        console.print(f"[bold]{name:<9}[/] {value}", highlight=False)
    console.print()
    console.print(demo.plan.explain(), highlight=False, markup=False, soft_wrap=True)
    console.print()
    _grid(
        console,
        "Certificates, largest relative L2 error",
        ("op", "sites", "forward", "gradients"),
        certificate_rows(demo),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training both, in turn", total=steps)
        for done in train(demo):
            losses = f"loss {demo.before.losses[-1]:.4f} as written, {demo.after.losses[-1]:.4f} through kpt"
            progress.update(task, completed=done, description=losses)
    _grid(console, "Loss, nats per byte", ("step", "as written", "through kpt", "difference"), curve_rows(demo))
    _grid(console, "Before and after", ("", "as written", "through kpt", "change"), summary(demo))
    console.print(verdict(demo), style="green" if demo.coincide else "bold red", highlight=False)
    path = write(report(demo, hardware), out)
    console.print(f"Report: {path}", highlight=False, markup=False, soft_wrap=True)
    return demo.to_json() | {"report": str(path)}


def verdict(demo: Demo) -> str:
    """The outcome in one sentence."""
    difference = f"largest difference of the two losses over {demo.steps} steps: {demo.max_difference:.1e} nats"
    if demo.coincide:
        return f"The loss curves coincide; {difference} (allowed {TOLERANCE:.0e})."
    return f"The loss curves do not coincide; {difference}, allowed {TOLERANCE:.0e}. Please report this."


def facts(demo: Demo, hardware: HardwareProfile) -> list[tuple[str, str]]:
    """What the numbers were measured on: (name, value)."""
    config, packages = demo.config, {"Python": platform.python_version(), **versions()}
    model = f"{config.layers} layers, width {config.width}, {config.heads} heads; {demo.parameters:,} parameters"
    return [
        ("Hardware", f"{hardware.model} ({hardware.name}); {platform.platform()}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("Model", model),
        ("Data", f"{len(demo.text):,} bytes of Python's standard library; {BATCH} × {config.context} a step"),
        ("Training", f"{demo.steps} steps of AdamW, the same seeds and batches for both, steps taken in turn"),
        ("Planning", f"{demo.plan_seconds:.1f} s to trace, match, choose and certify"),
    ]


def summary(demo: Demo) -> list[tuple[str, str, str, str]]:
    """Rows of (what, as written, through kpt, change)."""
    before, after = demo.before, demo.after
    return [
        ("temporary memory of a step", mebibytes(before.temporary_bytes), mebibytes(after.temporary_bytes),
         f"{ratio(demo.memory_ratio)} {'smaller' if demo.memory_ratio >= 1 else 'larger'}"),
        ("step time, median", milliseconds(before.step_seconds), milliseconds(after.step_seconds),
         f"{ratio(demo.speedup)} {'faster' if demo.speedup >= 1 else 'slower'}"),
        ("step time, quartiles", _quartiles(before), _quartiles(after), ""),
        ("XLA compile time", f"{before.compile_seconds:.1f} s", f"{after.compile_seconds:.1f} s", ""),
        ("final loss, nats per byte", f"{before.losses[-1]:.6f}", f"{after.losses[-1]:.6f}", ""),
    ]  # fmt: skip


def curve_rows(demo: Demo, count: int = 10) -> list[tuple[str, str, str, str]]:
    """Rows of (step, loss as written, loss through kpt, difference), `count` of them evenly spread."""
    picked = np.unique(np.linspace(0, demo.steps - 1, min(count, demo.steps)).round().astype(int))
    pairs = [(int(i), demo.before.losses[i], demo.after.losses[i]) for i in picked]
    return [(str(i + 1), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}") for i, a, b in pairs]


def certificate_rows(demo: Demo) -> list[tuple[str, str, str, str]]:
    """Rows of (op, sites, worst forward error, worst gradient error) over the sites with a kernel."""
    rows = []
    for op in dict.fromkeys(s.op for s in demo.plan.sites):
        sites = [s for s in demo.plan.sites if s.op == op]
        rows.append((op, str(len(sites)), _worst([s.error for s in sites]), _worst([s.error_gradient for s in sites])))
    return rows


def report(demo: Demo, hardware: HardwareProfile) -> Report:
    """The same, with charts, as a report."""
    before, after = demo.before, demo.after
    steps = list(range(1, demo.steps + 1))
    difference = np.abs(np.subtract(before.losses, after.losses)).tolist()
    curves = Figure(
        "The same training",
        line_chart(
            [Line("as written", steps, before.losses, "before"), Line("through kpt", steps, after.losses, "after")],
            title="Loss of both trainings",
            description=f"Both curves fall from {before.losses[0]:.2f} to {before.losses[-1]:.2f}. {verdict(demo)}",
            x_label="step",
            y_label="loss, nats per byte",
        ),
        "Same seeds, same batches. The thin curve lies in the middle of the broad one wherever the two agree.",
        Table(("step", "as written", "through kpt", "difference"), curve_rows(demo, 20), frozenset({1, 2, 3})),
        (("before", "as written"), ("after", "through kpt")),
    )
    apart = Figure(
        "How far the losses are apart",
        line_chart(
            [
                Line("difference", steps, difference, "after", dots=True),
                Line("allowed", steps, [TOLERANCE] * demo.steps, "limit"),
            ],
            title="Absolute difference of the two losses at each step",
            description=f"The largest is {demo.max_difference:.1e} nats, and {TOLERANCE:.0e} is allowed.",
            x_label="step",
            y_label="difference, nats",
            log_y=True,
        ),
        "Sums taken in another order round differently, and training carries that on. Where the losses are "
        "equal to the last bit there is no point.",
        legend=(("dots", "difference at one step"), ("limit", f"allowed: {TOLERANCE:.0e}")),
    )
    memory = Figure(
        "Memory",
        bar_chart(
            [Bar(v.name, v.temporary_bytes, mebibytes(v.temporary_bytes), s) for v, s in _styled(demo)],
            title="Temporary memory of a compiled training step",
            description=f"As written {mebibytes(before.temporary_bytes)}, "
            f"through kpt {mebibytes(after.temporary_bytes)}.",
        ),
        "What a compiled training step needs besides parameters, optimizer state and data, by XLA's memory analysis.",
    )
    speed = Figure(
        "Time",
        bar_chart(
            [Bar(v.name, v.step_seconds, milliseconds(v.step_seconds), s, *v.quartiles) for v, s in _styled(demo)],
            title="Time of a training step",
            description=f"Median as written {milliseconds(before.step_seconds)}, through kpt "
            f"{milliseconds(after.step_seconds)}.",
        ),
        f"Median of {demo.steps} steps each, taken in turn in one process; the whisker spans the quartiles.",
        Table(("", "as written", "through kpt", "change"), summary(demo), frozenset({1, 2, 3})),
    )
    return Report(
        title="A language model, trained as written and through kpt",
        verdict=verdict(demo),
        passed=demo.coincide,
        headline=(
            (ratio(demo.memory_ratio), "less temporary memory" if demo.memory_ratio >= 1 else "more temporary memory"),
            (ratio(demo.speedup), "faster step" if demo.speedup >= 1 else "slower step"),
            (str(len(demo.plan.sites)), "sites with a kernel"),
            (f"{demo.max_difference:.0e}", "nats, largest loss difference"),
        ),
        facts=facts(demo, hardware),
        figures=(curves, apart, memory, speed),
        plan=demo.plan,
        command=COMMAND,
    )


def mebibytes(n: float) -> str:
    return f"{n / 2**20:,.1f} MiB"


def milliseconds(s: float) -> str:
    return f"{s * 1e3:,.1f} ms"


def ratio(r: float) -> str:
    """How many times, whichever way round: "2.10×" for 2.1 and for its inverse."""
    return f"{max(r, 1 / r):.2f}×"


def _grid(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Grid(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _styled(demo: Demo) -> tuple[tuple[Variant, str], tuple[Variant, str]]:
    return (demo.before, "before"), (demo.after, "after")


def _quartiles(v: Variant) -> str:
    low, high = v.quartiles
    return f"{low * 1e3:,.1f} to {high * 1e3:,.1f} ms"


def _worst(errors: list[float | None]) -> str:
    found = [e for e in errors if e is not None]
    return f"{max(found):.1e}" if found else "not measured"
