"""Reports and their charts: valid, self-contained, and true to the numbers."""

import dataclasses
import html.parser
import importlib.util
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from kpt.errors import ConfigError, KptError, MissingDependencyError
from kpt.hardware import detect_hardware
from kpt.kernels import registry
from kpt.kernels.estimate import seconds
from kpt.kernels.spec import OtherHardware
from kpt.ops import Spec, op
from kpt.report import Bar, Figure, Line, Report, Table, bar_chart, draw, draw_bars, drawable, line_chart, render, save, writable, write
from kpt.report.html import groups
from kpt.report.roofline import roofline
from kpt.report.svg import HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks
from kpt.strategy import Plan, Site

NS = "{http://www.w3.org/2000/svg}"
WORDS = {"title": "Loss", "description": "It falls.", "x_label": "step", "y_label": "loss"}


def paths(svg, kind):
    found = [p for p in ET.fromstring(svg).iter(f"{NS}path") if p.get("class").startswith(kind)]
    return [[tuple(map(float, xy)) for xy in re.findall(r"[ML]([\d.]+) ([\d.]+)", p.get("d"))] for p in found]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.87, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 200, [0, 50, 100, 150, 200]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
        (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_curve_is_where_its_numbers_are():
    (points,) = paths(line_chart([Line("a", [0, 1, 2], [0.0, 1.0, 2.0], "before")], **WORDS), "line")
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert TOP <= y2 < y0 <= HEIGHT


@pytest.mark.parametrize(
    ("ys", "log_y", "drawn"),
    [
        ([1.0, math.nan, 3.0], False, 2),
        ([math.inf, 2.0, 3.0], False, 2),
        ([1e-3, 0.0, 1e-6], True, 2),
        ([0.0, 0.0, 0.0], True, 0),
        ([4.0, 4.0, 4.0], False, 3),
    ],
)
def test_values_without_a_place_are_left_out(ys, log_y, drawn):
    (points,) = paths(line_chart([Line("a", [1, 2, 3], ys, "after", dots=True)], **WORDS, log_y=log_y), "dots")
    assert len(points) == drawn
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_bars_are_in_proportion_and_inside():
    bars = [Bar("as written", 300.0, "300 MiB", "before"), Bar("kpt", 100.0, "100 MiB", "after", low=90.0, high=280.0)]
    svg = ET.fromstring(bar_chart(bars, title="Memory", description="Less."))
    first, second = (float(r.get("width")) for r in svg.iter(f"{NS}rect"))
    assert first == pytest.approx(3 * second, rel=1e-2)
    assert all(0 <= float(t.get("x")) <= WIDTH for t in svg.iter(f"{NS}text"))


@pytest.mark.parametrize(
    "chart", [line_chart([], **WORDS), bar_chart([Bar("a", 0.0, "0", "after")], title="t", description="d")]
)
def test_nothing_to_show_is_still_a_chart(chart):
    assert ET.fromstring(chart).tag == f"{NS}svg"


def test_a_chart_has_a_name_and_a_description_for_those_who_cannot_see_it():
    svg = ET.fromstring(line_chart([], **WORDS | {"title": "a < b", "description": "c & d"}))
    assert svg.get("role") == "img"
    assert (svg.find(f"{NS}title").text, svg.find(f"{NS}desc").text) == ("a < b", "c & d")


def site(path, error, reason="Measured faster."):
    return Site("attention", "attention.xla", 2, path, "model.py:50", reason, error=error, error_gradient=2 * error,
                alternatives={"attention.other": "does not honour <bias> masks"})  # fmt: skip


PLAN = Plan(
    "loss", "balanced", "cpu", "jax",
    sites=(site("attention0", 1e-7), site("attention1", 3e-7), site("attention2", 2e-7, "Estimated faster.")),
    skipped=(Site("glu", "original", None, "", "model.py:60", "No kernel is faster."),),
    notes=("A note & more.",),
)  # fmt: skip


def test_layers_with_the_same_site_share_an_entry_with_the_worst_error():
    first, second = groups(PLAN.sites)
    assert first.paths == ("attention0", "attention1")
    assert (first.error, first.error_gradient) == (3e-7, 6e-7)
    assert second.paths == ("attention2",)


def report(passed=True, plan=PLAN):
    chart = line_chart([Line("a", [1, 2], [1.0, 2.0], "before")], **WORDS)
    table = Table(("step", "loss"), [("1", "<0.5>")], frozenset({1}))
    figures = (Figure("The same training", chart, "A caption.", table, (("before", "as written"),)),)
    return Report(
        "A title", "A verdict.", passed, (("2.0×", "faster step"),), (("Hardware", "a & b"),), figures, plan, "kpt demo"
    )


class Page(html.parser.HTMLParser):
    """Checks nesting, and gathers the tags and all that would be loaded."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("plan", [PLAN, None], ids=["plan", "no plan"])
@pytest.mark.parametrize(("passed", "word"), [(True, "Passed."), (False, "Failed.")])
def test_a_report_is_one_well_formed_page_that_loads_nothing(passed, word, plan):
    text = render(report(passed, plan))
    page = Page(text)
    assert page.loads == [] and "@import" not in text and "url(" not in text
    assert ("html", {"lang": "en"}) in page.tags
    assert [t for t, _ in page.tags].count("h1") == 1
    assert word in text and "prefers-color-scheme: dark" in text
    assert ("The plan" in text) == (plan is not None)


def test_where_passing_is_no_question_nothing_is_said_of_it():
    text = render(report(None))
    assert "A verdict." in text and "Passed." not in text and "Failed." not in text


@pytest.mark.parametrize(
    "words",
    [
        "A verdict.",
        "2.0×",
        "a &amp; b",
        "&lt;0.5&gt;",
        "attention.xla v2",
        "attention0, attention1",
        "forward 3.0e-07, gradients 6.0e-07",
        "does not honour &lt;bias&gt; masks",
        "No kernel is faster.",
        "A note &amp; more.",
    ],
)
def test_a_report_says_all_it_was_given_escaped(words):
    assert words in render(report())


def test_kernels_for_other_hardware_share_a_line_at_the_end():
    others = {"glu.gpu": OtherHardware("is built for sm90, and cpu is x86-64"), "glu.slow": "runs on one core, and cpu is two",
              "glu.tpu": OtherHardware("runs on tpu, and cpu is cpu"), "glu.xla": "measured 2 s against 1 s for the choice"}  # fmt: skip
    plan = dataclasses.replace(PLAN, sites=(), skipped=(dataclasses.replace(PLAN.skipped[0], alternatives=others),))
    text = render(report(plan=Plan.from_json(plan.to_json())))
    shown = re.findall(r'<li class="note"><span class="mono">(.*?)</span> (.*?)</li>', text)
    assert shown == [(n, others[n]) for n in ("glu.slow", "glu.xla")] + [("glu.gpu, glu.tpu", "for other hardware")]


def test_write_returns_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(report(), "report.html")
    assert path == tmp_path / "report.html" and path.read_text(encoding="utf-8") == render(report())


def test_a_place_that_may_not_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "theirs.html").touch()
    refused = {tmp_path / "theirs.html"}
    monkeypatch.setattr("os.access", lambda path, mode: path not in refused)
    assert writable(tmp_path / "mine.html") == tmp_path / "mine.html"
    with pytest.raises(ConfigError, match="may not be written"):
        writable(tmp_path / "theirs.html")
    refused.add(tmp_path)
    with pytest.raises(ConfigError, match="may not be written"):
        writable(tmp_path / "mine.html")


@pytest.mark.parametrize(("name", "says"), [(".", "is a folder"), ("none/report.html", "There is no folder .*none"), ("x" * 300, "too long")])
def test_where_no_file_can_be_there_is_no_report_and_no_new_folder(tmp_path, name, says):
    with pytest.raises(ConfigError, match=says):
        write(report(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_chart_as_a_file_brings_its_style_and_the_names_of_its_lines(tmp_path):
    line = Line("a < b", [1, 2], [1.0, 2.0], "before")
    save(line_chart([line], **WORDS), tmp_path / "chart.svg", [line])
    svg = ET.parse(tmp_path / "chart.svg").getroot()
    assert "prefers-color-scheme: dark" in svg.find(f"{NS}style").text
    assert svg.get("viewBox") == "0 -28 720 352"
    assert [e.text for e in svg.iter(f"{NS}text")][-2:] == ["a < b", WORDS["title"]]


@pytest.mark.parametrize("name, says", [("chart.gif", "SVG, PNG or PDF"), ("chart", "SVG, PNG or PDF"), ("none/chart.svg", "no folder"), ("none/chart.png", "no folder")])
def test_a_chart_that_cannot_be_written_is_refused(tmp_path, name, says):
    with pytest.raises(KptError, match=says):
        drawable(tmp_path / name)


def test_a_png_without_matplotlib_is_refused_with_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        drawable(tmp_path / "chart.png")


@pytest.mark.parametrize("suffix, begins", [("svg", b"<svg"), ("png", b"\x89PNG"), ("PDF", b"%PDF")])
def test_a_chart_is_written_as_its_name_says(tmp_path, suffix, begins):
    if suffix != "svg":
        pytest.importorskip("matplotlib")
    draw_bars([Bar("a", 1.0, "1", "before"), Bar("b", 2.0, "2", "after")], tmp_path / f"bars.{suffix}", title="t", description="d")
    draw([Line("a", [0, 1], [1.0, 2.0], "after")], tmp_path / f"lines.{suffix}", **WORDS)
    assert all(p.read_bytes().startswith(begins) for p in tmp_path.iterdir())


def a_site(kernel, rows, **more):
    specs = {"x": Spec((rows, 4096), "float32"), "weight": Spec((4096,), "float32")}
    version = None if kernel == "original" else registry.get(kernel).version
    return Site("rms_norm", kernel, version, "", "model.py:1", "why", params={"eps": 1e-6}, specs=specs, **more)


def test_sites_stand_under_the_roof_of_their_chip():
    plan = Plan("f", "balanced", "cpu", "jax", {}, (a_site("rms_norm.xla", 1024), a_site("rms_norm.xla", 1024)), (a_site("original", 64),))
    figure = roofline(plan)
    (roof,) = paths(figure.svg, "line")
    before, after = paths(figure.svg, "dots")
    assert len(roof) == 3 and len(before) == 2 and len(after) == 1
    # The same work in less time is higher, and nothing is above the roof, whose slope is the memory's.
    assert after[0][0] == before[0][0] and after[0][1] < before[0][1]
    (x0, y0), (x1, y1), (x2, y2) = roof
    assert x0 < before[0][0] < x1 <= x2 and y2 == y1 < y0
    assert all(y > y0 + (x - x0) / (x1 - x0) * (y1 - y0) for x, y in (*before, *after))
    cpu, cost = detect_hardware(platform="cpu"), op("rms_norm").cost(plan.sites[0].specs, eps=1e-6)
    assert [r[:4] for r in figure.table.rows] == [("rms_norm", "rms_norm.xla", "2", "float32"), ("rms_norm", "original", "1", "float32")]
    assert figure.table.rows[0][4:7] == (f"{cost.flops / cost.bytes:,.3g}", "memory", seconds(cost.bytes / cpu.memory_bandwidth))
    assert render(report(plan=plan)) and "FLOP/byte" in figure.svg


@pytest.mark.parametrize("plan", [Plan("f", "balanced", "a chip of mine", "jax", {}, (a_site("rms_norm.xla", 8),)),
                                  Plan("f", "balanced", "cpu", "jax", {}, ()), PLAN], ids=["unknown chip", "no sites", "no arrays"])  # fmt: skip
def test_without_figures_there_is_no_roofline(plan):
    assert roofline(plan) is None


def test_a_logarithmic_axis_places_powers_of_ten_evenly():
    ((a, b, c),) = paths(line_chart([Line("a", [0.1, 1.0, 10.0], [1.0, 10.0, 100.0], "roof")], **WORDS, log_x=True, log_y=True), "line")
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.1) and a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_renders_a_report_without_a_complaint(tmp_path, dark):
    def shown(name, text):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=300,300",
                   f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}",
                   f"--screenshot={tmp_path / name}.png", f"file://{tmp_path / name}.html"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return "CONSOLE" in done.stderr, (tmp_path / f"{name}.png").read_bytes()

    page = render(report())
    complained, picture = shown("report", page)
    assert not complained and picture.startswith(b"\x89PNG")
    assert shown("broken", page.replace("</body>", "<script>broken()</script></body>"))[0]
    # The theme is the reader's.
    other = page.replace("(prefers-color-scheme: dark)", "(prefers-color-scheme: no)")
    assert (shown("other", other)[1] != picture) == dark


def test_places_that_are_counted_have_whole_numbers():
    chart = line_chart([Line("a", [1, 2], [3.0, 4.0], "after")], title="t", description="d", x_label="run", y_label="time")
    assert ">1.2</text>" not in chart and ">1</text>" in chart and ">2</text>" in chart
