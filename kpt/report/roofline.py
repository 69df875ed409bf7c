"""Where the sites of a plan stand under the roofline of their chip.

S. Williams, A. Waterman, D. Patterson: Roofline, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping

from kpt import ops
from kpt.errors import KptError
from kpt.hardware import HardwareProfile, detect_hardware, hardware_profile, time_bound
from kpt.kernels import registry
from kpt.kernels.estimate import estimate, seconds
from kpt.kernels.spec import ORIGINAL, original
from kpt.report.html import Figure, Table
from kpt.report.svg import Line, line_chart
from kpt.strategy import Plan, Site

SPAN = 8.0
"""By how much the roof reaches beyond the sites, to either side."""


def roofline(plan: Plan) -> Figure | None:
    """Rate (FLOP/s) over intensity (FLOP/byte) of every kind of site, forward, both axes logarithmic, under the roof of each dtype.

    Intensity is the op's own: what must be computed over what must cross memory. Rates are that work over the estimates by which plans
    choose where nothing was measured, of the code as written and of the kernel.

    Returns:
      None where the chip's figures are not known, or no site has any work.
    """
    try:
        # "cpu" is any CPU by its name; plans on one choose by what was read of it.
        hardware = detect_hardware(platform="cpu") if plan.hardware == "cpu" else hardware_profile(plan.hardware)
    except KptError:  # a chip that was described by hand
        return None
    count: dict[tuple[str, ...], int] = {}
    kinds: dict[tuple[str, ...], Site] = {}
    for s in (*plan.sites, *plan.skipped):
        kind = s.op, s.kernel, repr(s.specs), repr(s.params)
        kinds.setdefault(kind, s)
        count[kind] = count.get(kind, 0) + 1
    rows, points = [], []
    for which, s in kinds.items():
        if (found := _point(s, hardware, plan.framework)) is None:
            continue
        dtype, intensity, rates, bound, words = found
        points.append((dtype, intensity, rates))
        row: tuple[str, ...] = (s.op, s.kernel, str(count[which]), dtype, f"{intensity:,.3g}", bound, *words)
        rows.append(row)
    if not points:
        return None
    xs = [x for _, x, _ in points]
    span = min(xs) / SPAN, max(xs) * SPAN
    device, lines = hardware.per_device(), []
    for dtype in dict.fromkeys(d for d, _, _ in points):
        peak, bandwidth = device.peak(dtype) or 0.0, device.memory_bandwidth or 0.0
        corner = min(max(peak / bandwidth, span[0]), span[1])
        bends = [span[0], corner, span[1]]
        lines.append(Line(dtype, bends, [min(peak, x * bandwidth) for x in bends], "roof"))
    sides = ((ORIGINAL, "before"), ("kernel", "after"))[: 1 + bool(plan.sites)]
    for name, style in sides:
        lines.append(Line(name, xs, [rates.get(name, 0.0) for _, _, rates in points], style, dots=True))
    chart = line_chart(
        lines,
        title="Roofline",
        description=f"{len(points)} kinds of sites under the roof of {hardware.name}; the table has each.",
        x_label="intensity (FLOP/byte)",
        y_label="rate (FLOP/s)",
        log_x=True,
        log_y=True,
    )
    caption = (
        f"Forward, by the estimates for {hardware.name} by which plans choose where nothing was measured. "
        "On the slope memory is the limit, on the flat the arithmetic."
    )
    columns = "op", "kernel", "sites", "dtype", "FLOP/byte", "limit", "at least", "as written", "kernel"
    legend = (("roof", "what the chip allows"), ("before dots", "as written"), ("after dots", "through kpt"))[: 1 + len(sides)]
    return Figure("Roofline", chart, caption, Table(columns, rows, frozenset({2, 4, 6, 7, 8})), legend)


def _point(
    site: Site, hardware: HardwareProfile, framework: str
) -> tuple[str, float, Mapping[str, float], str, tuple[str, str, str]] | None:
    """A site's dtype, intensity, rates by who computes it, what limits it, and times in words; None where they are not known."""
    if not site.specs:
        return None
    dtype, op = next(iter(site.specs.values())).dtype, ops.op(site.op)
    try:
        cost = op.cost(site.specs, **site.params)
        bound = time_bound(cost, hardware, dtype)
        who = {ORIGINAL: original(site.op, framework)} | ({} if site.kernel == ORIGINAL else {"kernel": registry.get(site.kernel)})
    except KptError:
        return None
    if not cost.flops or not cost.bytes:
        return None
    times = {n: t for n, k in who.items() if (t := estimate(k, op.cost, site.specs, site.params, hardware, dtype))}
    words = [seconds(bound.seconds), *(seconds(times[n]) if n in times else "-" for n in (ORIGINAL, "kernel"))]
    return dtype, cost.flops / cost.bytes, {n: cost.flops / t for n, t in times.items()}, bound.bound, (words[0], words[1], words[2])
