"""A plan in words, for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from kpt.kernels.estimate import seconds
from kpt.strategy.plan import Plan, Site

_WIDTH = 100


def explain(plan: Plan) -> str:
    """Sites with a kernel, then those left alone, each with its reason. Sites that differ by index share a line."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(plan.versions.items()))
    lines = [
        f"Plan {plan.hash} for {plan.function}",
        f"  level {plan.level}, {plan.hardware}, {versions or plan.framework}",
        f"  {count(len(plan.sites), 'site')} with a kernel, {len(plan.skipped)} left as written",
    ]
    if plan.sites:
        lines += ["", "With a kernel", *_table(plan.sites)]
    if plan.skipped:
        lines += ["", "Left as written", *_table(plan.skipped)]
    if plan.notes:
        lines += ["", "Notes", *(line for note in plan.notes for line in _wrapped(f"- {note}", "  ", hang="  "))]
    return "\n".join(line.rstrip() for line in lines)


def count(n: int, noun: str) -> str:
    """ "1 site", "2 sites"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def joined(n: int) -> str:
    """What a plan notes of sites that are one call with the layer after them."""
    one = n == 1
    return (f"{count(n, 'site')} {'runs' if one else 'run'} in one call with the linear layer that reads {'it' if one else 'them'}, and"
            f" {'keeps' if one else 'keep'} no result for it.")  # fmt: skip


def paired(n: int) -> str:
    """What a plan notes of pairs of sites that are one call each."""
    return f"{count(n, 'pair')} of sites that share their tables {'runs as one launch' if n == 1 else 'run as one launch each'}."


def apart(op: str, beside: str, why: str) -> str:
    """What a plan notes of a site that could have been one call with what stands beside it."""
    return f"A site of {op} runs apart from {beside}: {why}"


LINEAR, SHARING = "the linear layer that reads it", "the one that shares its tables"
"""What may stand beside a site."""


def _table(sites: Iterable[Site]) -> list[str]:
    groups: dict[tuple, list[Site]] = {}
    for s in sites:
        # Layers of a model differ in their number only; one line tells of all of them.
        key = (_named(s), s.kernel, s.version, re.sub(r"\d+", "*", s.path), s.source, s.reason)
        groups.setdefault(key, []).append(s)
    rows = []
    for members in groups.values():
        s = members[0]
        times = f" × {len(members)}" if len(members) > 1 else ""
        kernel = s.kernel if s.version is None else f"{s.kernel} v{s.version}"
        rows.append((f"{_named(s)}{times}", kernel, _where(members), members))
    first, second = (max(len(r[i]) for r in rows) for i in (0, 1))
    lines = []
    for op, kernel, where, members in rows:
        lines.append(f"  {op:<{first}}  {kernel:<{second}}  {where}")
        lines += _wrapped(members[0].reason, "      ")
        if evidence := _evidence(members):
            lines.append(f"      {evidence}")
    return lines


def _named(site: Site) -> str:
    """The op, and that the sum before a norm is part of it, which is as much work again."""
    return f"{site.op} of a sum" if "residual" in site.specs else site.op


def _where(members: list[Site]) -> str:
    s = members[0]
    same = all(m.path == s.path for m in members)
    path = s.path if same else _span([m.path for m in members])
    return "  ".join(p for p in (path, s.source) if p) or "?"


def _span(paths: list[str]) -> str:
    """One path for several that differ in numbers: numbers that vary become a range."""
    numbers = list(zip(*(re.findall(r"\d+", p) for p in paths), strict=True))
    parts = re.split(r"\d+", paths[0])
    out = parts[0]
    for values, text in zip(numbers, parts[1:], strict=True):
        distinct = sorted(set(map(int, values)))
        whole = distinct == list(range(distinct[0], distinct[-1] + 1))
        many = f"{distinct[0]}..{distinct[-1]}" if whole else ",".join(map(str, distinct))
        out += (values[0] if len(distinct) == 1 else f"{{{many}}}") + text
    return out


def _evidence(members: list[Site]) -> str:
    """The worst error of the group, and the time of one of its sites."""
    parts = []
    for label, values in (
        ("forward", [m.error for m in members if m.error is not None]),
        ("gradients", [m.error_gradient for m in members if m.error_gradient is not None]),
    ):
        if values:
            parts.append(f"{label} {max(values):.1e}")
    text = f"relative L2 error: {', '.join(parts)}" if parts else ""
    timed = [(m.time_before, m.time_after) for m in members if m.time_before and m.time_after]
    if timed:
        before, after = (sum(t[i] for t in timed) / len(timed) for i in (0, 1))
        each = " each" if len(members) > 1 else ""
        text += f"{'; ' if text else ''}{seconds(before)} → {seconds(after)}{each} ({before / after:.2f}×)"
    return text


def _wrapped(text: str, indent: str, hang: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
