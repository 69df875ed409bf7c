"""A report as one HTML file: text, charts and the plan, with nothing to load from elsewhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from kpt.errors import ConfigError
from kpt.kernels.spec import elsewhere
from kpt.strategy import Plan, Site
from kpt.strategy.explain import count


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under named columns. Cells are text; those of the columns in `numbers` are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart (SVG text), what it shows, and the same numbers as a table for those who want or need them.

    `legend` holds (style, label) for each curve, in the styles of `kpt.report.svg`.
    """

    title: str
    svg: str
    caption: str
    table: Table | None = None
    legend: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report says, in reading order.

    Attributes:
      title: the heading.
      verdict: the outcome in one sentence.
      passed: whether the numbers agree; the verdict is marked accordingly, in words too. None where that is no question.
      headline: (figure, what it is) for the few numbers a reader takes away: ("2.1×", "faster step").
      facts: (name, value): hardware, versions, sizes.
      figures: the evidence.
      plan: what was swapped and why, if there is a plan.
      command: what makes this report again.
    """

    title: str
    verdict: str
    passed: bool | None
    headline: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]]
    figures: Sequence[Figure]
    plan: Plan | None
    command: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Sites that a reader takes for one: the same code with the same kernel for the same reason, in several layers."""

    site: Site
    paths: tuple[str, ...]
    error: float | None
    error_gradient: float | None


def groups(sites: Sequence[Site]) -> list[Group]:
    """Sites by op, kernel, source line and reason, with the worst error of each group."""
    members: dict[tuple[object, ...], list[Site]] = {}
    for s in sites:
        members.setdefault((s.op, s.kernel, s.version, s.source, s.reason), []).append(s)

    def worst(errors: list[float | None]) -> float | None:
        return max((e for e in errors if e is not None), default=None)

    return [
        Group(
            g[0], tuple(s.path for s in g if s.path), worst([s.error for s in g]), worst([s.error_gradient for s in g])
        )
        for g in members.values()
    ]


def candidates(site: Site) -> list[tuple[str, str]]:
    """The kernels that a site might have had, and why not; those for other hardware together, at the end."""
    others = elsewhere(site.alternatives)
    listed = [(name, why) for name, why in site.alternatives.items() if name not in others]
    return [*listed, *([(", ".join(others), "for other hardware")] if others else [])]


def render(report: Report) -> str:
    """The report as the text of an HTML page. Needs jinja2."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(groups=groups, candidates=candidates, count=count)
    environment.filters["error"] = lambda e: "not measured" if e is None else f"{e:.1e}"
    return environment.get_template("template.html").render(report=report)


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Renders the report into a file; returns its absolute path.

    Raises:
      ConfigError: as `writable`.
    """
    target, text = writable(path), render(report)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"A report was to be written to {target}", problem.strerror or str(problem), "Name another file") from None
    return target


def writable(path: str | os.PathLike[str], what: str = "A report") -> Path:
    """The absolute path of a file that is to be written, asked for before what takes minutes.

    Raises:
      ConfigError: the path is a folder, its folder is not there (a name with a slip makes no new one), or it may not be written.
    """
    target = Path(path).resolve()
    asked = f"{what} was to be written to {target}"
    if os.path.isdir(target):  # which takes any name
        raise ConfigError(asked, "It is a folder", "Name a file in it")
    if not os.path.isdir(target.parent):
        raise ConfigError(asked, f"There is no folder {target.parent}", "Make it, or name another")
    if not os.access(target if os.path.exists(target) else target.parent, os.W_OK):
        raise ConfigError(asked, "It may not be written", "Name another file")
    return target
