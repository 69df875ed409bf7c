"""The command line. Everything but the words of --help is imported when a command needs it."""

from __future__ import annotations

import dataclasses
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt._version import __version__
from kpt.commands import history, pipeline, tpu, tune
from kpt.commands.named import ArgsFrom
from kpt.commands.named import attribute as _attribute
from kpt.commands.named import call as _call
from kpt.config import config, start_logging
from kpt.console import NO, AsJson, answering
from kpt.console import flops as _flops
from kpt.console import front_end as _front_end
from kpt.console import make_console as _console
from kpt.console import print_json as _print_json
from kpt.console import print_table as _print_table
from kpt.console import progress as _progress
from kpt.console import rate as _rate
from kpt.console import size as _bytes
from kpt.console import words as _words
from kpt.errors import KptError
from kpt.install import install

if TYPE_CHECKING:
    from rich.console import Console

    from kpt.hardware import HardwareProfile
    from kpt.kernels import KernelSpec

EPILOG = """
Exit codes: 0 done; 1 done, and the answer is no (curves do not coincide, twins differ, a regression, no kernel can run here);
2 the request cannot be met (wrong usage, unknown name, a function that cannot be planned); 3 an optional package
is missing; 4 an unexpected error, in kpt or in your code (--debug shows where).
"""
# What the numbers depend on, in the order in which `kpt doctor` lists it.
PACKAGES = (
    "numpy",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "torch",
    "triton",
    "torch_xla",
    "transformers",
    "tokamax",
)

DEMO = Path("kpt-report/demo.html")

app = typer.Typer(
    name="kpt",
    help="Finds what a better kernel computes in code you already have, swaps it in, and proves the numbers.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
hardware_app = typer.Typer(help="Chips: what they can do, and which one is here.", no_args_is_help=True)
kernels_app = typer.Typer(help="Kernels: who can compute an op, and where.", no_args_is_help=True)
app.add_typer(hardware_app, name="hardware")
app.add_typer(kernels_app, name="kernels")
app.add_typer(tpu.app, name="tpu")
app.add_typer(tune.app, name="tune")
app.add_typer(pipeline.app, name="pipeline")
history.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    context.obj = debug
    with answering(context, as_json=False):
        if not debug:
            from kpt_torch.quiet import no_tracebacks  # which imports no torch

            no_tracebacks()
        start_logging()


@app.command()
def demo(
    context: typer.Context,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; 200 unless given.")] = None,
    out: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = DEMO,
    as_json: AsJson = False,
) -> None:
    """Train a small model as written and through kpt.

    A byte-level language model learns from Python's own sources, once as a Flax user would write it and once through
    kpt_jax.optimize, with the same seeds. Shown are the plan, the certificates, memory, time and both loss curves.
    Exits with 1 if the two loss curves do not coincide.
    """
    with answering(context, as_json):
        run = _front_end("kpt_jax.demo_report", "run")
        if out == DEMO:  # this folder is ours; that of another report has to be there
            out.parent.mkdir(exist_ok=True)
        # Progress goes where it does not mix with the JSON.
        result = run(steps, out, _console(stderr=as_json))
        if as_json:
            _print_json(result)
        if not result["coincide"]:
            raise typer.Exit(NO)


@app.command()
def plan(
    context: typer.Context,
    function: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="A function, a model, or what returns (either, inputs).")],
    args_from: ArgsFrom = None,
    level: Annotated[str | None, typer.Option(help="conservative, balanced or aggressive.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="The chip, which need not be here: h100, v5e, as in `kpt hardware list`. Else KPT_HARDWARE's, or this one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be swapped in a function or a model, and why.

    Modules are found as by `python -m`, in the current directory first. Its inputs, or arrays like them, come from --args-from, or from a
    factory: a function without parameters that returns (function or model, tuple of its arguments).

    Examples: kpt plan train:loss --args-from train:batch; kpt plan train:model_and_batch; kpt plan train:model_and_batch --hardware h100
    """
    with answering(context, as_json):
        target, arguments = _call(function, args_from, "A plan")
        from kpt.auto import front_end as framework_of

        made = _front_end(framework_of(target, arguments), "plan")(target, *arguments, level=level, hardware=hardware or "auto")
        typer.echo(made.to_json() if as_json else made.explain())


@app.command()
def bench(
    context: typer.Context,
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="What to measure, such as attention or glu; everything unless given.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Other libraries' kernels too, where they are installed.")] = False,
    shapes: Annotated[str | None, typer.Option(help="16384x4096,32768x8192 instead of the table's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 unless given; float32 on a CPU.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each contender, about.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes, besides.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where a chart goes: SVG, PNG or PDF, by its name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure kernels for JAX beside the code that they replace.

    Every kernel for JAX that can run here, plain code and with --peers other libraries' kernels, in one process and in turn,
    on inputs larger than the caches; each is checked against float64 first. On an NVIDIA GPU the times are those of
    the kernels, by CUPTI.

    Example: kpt bench rms_norm glu --peers --plot rates.svg
    """
    with answering(context, as_json):
        from kpt.report import drawable, writable

        if out is not None:
            writable(out, "JSON")
        if plot is not None:
            drawable(plot)
        measure = _front_end("kpt_jax.bench", "main")
        say = _console(stderr=as_json)
        result = measure(
            ops or (), shapes, peers, dtype, seconds, out, plot,
            lambda text: say.print(text, highlight=False, markup=False, soft_wrap=True),
        )  # fmt: skip
        if as_json:
            _print_json(result)


@app.command()
def twin(
    context: typer.Context,
    pair: Annotated[str, typer.Argument(metavar="MODULE:TWIN", help="A kpt.twin.Twin: one model, written in JAX and in PyTorch.")],
    steps: Annotated[int, typer.Option(min=0, help="Training steps whose losses are compared.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    through_kpt: Annotated[bool, typer.Option("--through-kpt", help="Step the JAX model as kpt_jax.optimize rewrites it.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Where a chart of both loss curves goes: SVG, PNG or PDF, by its name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Step a model that is written twice, in JAX and PyTorch, and find where the two first differ.

    Both get the same weights and data. Compared are the values that the model taps, layer by layer, each made from the same value
    before it; the loss, all gradients and a step of AdamW; and the losses of training. Named is the first that differs by more than
    rounding, with both values. How to write a Twin: tests/models/gpt.py, `python -c "help('kpt.twin')"`.
    Exits with 1 if the two differ.

    Example: kpt twin tests.models.llama:TWIN --steps 100 --plot losses.svg
    """
    with answering(context, as_json):
        from kpt.report import Line, draw, drawable
        from kpt.twin import Twin, compare

        if plot is not None:
            drawable(plot)
        found = _attribute(pair)
        if not isinstance(found, Twin):
            raise KptError(f"{pair!r} was given", f"It is of type {type(found).__name__}", "Name a kpt.twin.Twin")
        sides = _front_end("kpt_jax.twin", "Side")(found, through_kpt), _front_end("kpt_torch.twin", "Side")(found)
        with _progress() as progress:
            task = progress.add_task("training both", total=2 * steps)
            result = compare(found, *sides, steps=steps, seed=seed, done=lambda _: progress.advance(task))
        if plot is not None:
            xs = range(steps)
            a, b = result.sides
            lines = [Line(a, xs, result.losses[0], "before"), Line(b, xs, result.losses[1], "after")]
            title = f"Training losses of {result.twin}"
            draw(lines, plot, title=title, description=result.explain(), x_label="step", y_label="loss, nats")
        typer.echo(result.to_json() if as_json else result.explain())
        if not result.passed:
            raise typer.Exit(NO)


@hardware_app.command("list")
def hardware_list(context: typer.Context, as_json: AsJson = False) -> None:
    """The chips that kpt has figures for."""
    with answering(context, as_json):
        from kpt.hardware import PROFILES

        profiles = list(PROFILES.values())
        if as_json:
            _print_json([dataclasses.asdict(p) for p in profiles])
            return
        _print_table(
            ("name", "chip", "platform", "bfloat16", "memory", "bandwidth"),
            [
                (
                    p.name,
                    p.model,
                    p.platform,
                    _flops(p.peak("bfloat16")),
                    _bytes(p.memory_bytes),
                    _rate(p.memory_bandwidth),
                )
                for p in profiles
            ],
        )


@hardware_app.command("show")
def hardware_show(context: typer.Context, name: str, as_json: AsJson = False) -> None:
    """Every figure of one chip, and where it is from."""
    with answering(context, as_json):
        from kpt.hardware import hardware_profile

        _print_profile(hardware_profile(name), as_json)


@hardware_app.command("detect")
def hardware_detect(context: typer.Context, as_json: AsJson = False) -> None:
    """The chip of this machine, found without loading a framework."""
    with answering(context, as_json):
        from kpt.hardware import detect_hardware

        _print_profile(detect_hardware(), as_json)


@kernels_app.command("list")
def kernels_list(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[OP]", help="Of one op, such as attention; of all unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """The kernels that kpt and the installed packages offer."""
    with answering(context, as_json):
        from kpt.kernels import registry
        from kpt.ops import op

        kernels = registry.kernels(op(name).name if name else None)
        if as_json:
            _print_json([_kernel(k) for k in kernels])
            return
        _print_table(
            ("kernel", "version", "framework", "platforms", "dtypes", "from level"),
            [
                (k.name, str(k.version), k.framework, ", ".join(k.platforms), ", ".join(k.dtypes), k.level)
                for k in kernels
            ],
        )


@kernels_app.command("show")
def kernels_show(context: typer.Context, name: str, as_json: AsJson = False) -> None:
    """What one kernel takes, honours and needs."""
    with answering(context, as_json):
        from kpt.hardware import detect_hardware
        from kpt.kernels import registry

        kernel = registry.get(name)
        fields = _kernel(kernel) | {"refused_here": _refused_here(kernel, detect_hardware())}
        if as_json:
            _print_json(fields)
            return
        fields["here"] = fields.pop("refused_here") or "can run"
        _print_table(("", ""), [(key.replace("_", " "), _words(value)) for key, value in fields.items()])


@app.command()
def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Show versions, the chip, and which kernels can run.

    Of those that cannot, it says why, and of missing packages, what to install. Settings come from the environment.
    Exits with 1 if no kernel can run.
    """
    with answering(context, as_json):
        from kpt.hardware import detect_hardware
        from kpt.kernels import registry

        settings = {name: "auto" if value is None else str(value) for name, value in dataclasses.asdict(config()).items()}
        hardware = detect_hardware()
        versions = {"python": platform.python_version(), "kpt": __version__}
        versions |= {name: _installed(name) or "not installed" for name in PACKAGES}
        kernels = {k.name: _refused_here(k, hardware) for k in registry.kernels()}
        advice = _advice(hardware, versions)
        if as_json:
            _print_json(
                {
                    "versions": versions,
                    "settings": settings,
                    "hardware": dataclasses.asdict(hardware),
                    "kernels": {name: {"can_run": why is None, "why_not": why} for name, why in kernels.items()},
                    "broken_entry_points": registry.broken,
                    "advice": advice,
                }
            )
        else:
            console = _console()
            _print_table(("package", "version"), list(versions.items()), console)
            console.print()
            _print_table(("setting", "value"), [(f"KPT_{name.upper()}", value) for name, value in settings.items()], console)
            console.print()
            _print_profile(hardware, False, console, brief=True)
            console.print()
            alike: dict[str, list[str]] = {"can run": []}
            for name, why in kernels.items():
                alike.setdefault(why or "can run", []).append(name)
            rows = [(str(len(names)), why, ", ".join(names) or "-") for why, names in alike.items()]
            _print_table(("kernels", "here", "which"), rows, console)
            for name, why in registry.broken.items():
                console.print(f"The entry point {name} cannot be loaded: {why}", style="red")
            for line in advice:
                console.print(f"\n{line}", highlight=False)
        if all(kernels.values()):
            raise typer.Exit(NO)


def main() -> None:
    """The console script."""
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {message}", err=True)  # a reader is no reader of source
    app()


def _kernel(kernel: KernelSpec) -> dict[str, Any]:
    """A kernel's fields as JSON-ready values."""
    fields = {f.name: getattr(kernel, f.name) for f in dataclasses.fields(kernel)}
    for name, value in fields.items():
        if isinstance(value, frozenset):
            fields[name] = sorted(value)
        elif callable(value):
            fields[name] = f"{value.__module__}:{value.__qualname__}"
    return fields | {"params": dict(kernel.params)}


def _refused_here(kernel: KernelSpec, hardware: HardwareProfile) -> str | None:
    """Why no call at all can go to this kernel on this machine; None where the call decides."""
    from kpt.kernels.spec import refusal

    anything = dataclasses.replace(kernel, accepts=None)
    return refusal(anything, kernel.op, hardware, kernel.dtypes[0], {}, {}, kernel.level, kernel.framework)


def _installed(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _advice(hardware: HardwareProfile, versions: dict[str, str]) -> list[str]:
    """Install lines for what this chip could use and has not."""
    extra = {"cuda": "cuda", "tpu": "tpu"}.get(hardware.platform, "jax")
    lines = []
    if versions["jax"] == "not installed":
        lines.append(f"For JAX: {install(extra)}")
    elif extra == "tpu" and versions["libtpu"] == "not installed":
        lines.append(f"For the TPU: {install('tpu')}")
    if versions["torch"] == "not installed":
        lines.append(f"For PyTorch: {install('torch')}")
    return lines


def _print_profile(
    profile: HardwareProfile, as_json: bool, console: Console | None = None, brief: bool = False
) -> None:
    if as_json:
        _print_json(dataclasses.asdict(profile))
        return

    def row(name: str, value: str, figure: str) -> tuple[str, str, str]:
        return name, value, profile.sources.get(figure, "")

    rows = [
        (profile.model, profile.name, ""),
        ("platform", f"{profile.platform}, {profile.architecture}", ""),
        row("cores", f"{profile.cores:,}", "cores"),
        row("memory", _bytes(profile.memory_bytes), "memory_bytes"),
        row("bandwidth", _rate(profile.memory_bandwidth), "memory_bandwidth"),
    ]
    if not brief:
        rows.append(row("interconnect", _rate(profile.interconnect), "interconnect"))
        rows.append(("devices", str(profile.devices), ""))
        rows += [row(f"peak {dtype}", _flops(rate), dtype) for dtype, rate in profile.peak_flops.items()]
        rows += [row(cache, _bytes(size), cache) for cache, size in profile.caches.items()]
    columns: tuple[str, ...] = ("", "", "source")
    _print_table(columns[:2] if brief else columns, [r[:2] for r in rows] if brief else rows, console)
    for note in profile.notes:
        (console or _console()).print(f"- {note}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
