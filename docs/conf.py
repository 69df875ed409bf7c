"""The documentation site: `make docs` builds it into site/, with every warning an error and nothing from the network."""

import re
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError

from kpt import __version__

project, release = "kpt", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
html_theme, html_title = "furo", "kpt"
pygments_dark_style = "github-dark"
highlight_language = "none"
html_copy_source = html_show_sphinx = False
html_show_copyright = False
myst_heading_anchors = 3

# A docstring's `x` is code; types stand in the signature, so that lists of fields have none of their own.
default_role = "code"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


REMOTE = re.compile(r"""<(?:script|img|iframe|link rel="(?:stylesheet|preload|preconnect)")[^>]*(?:src|href)="(?:https?:)?//[^"]*""")


def setup(app: Any) -> None:
    app.connect("source-read", home)
    app.connect("autodoc-process-docstring", together, priority=400)  # before napoleon's
    app.connect("build-finished", nothing_remote)


def home(app: Any, docname: str, source: list[str]) -> None:
    """README.md is the home page; its links are relative to the folder above docs/."""
    if docname == "index":
        readme = (Path(app.srcdir).parent / "README.md").read_text(encoding="utf-8")
        source[0] = re.sub(r"\]\((?!https?:|#)(docs/)?", lambda m: "](" if m[1] else "](../", readme) + "\n" + source[0]


def together(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Fields that share a description, "low, high: ...", would be read as a name after its type, were it not for the space."""
    lines[:] = [re.sub(r"^\s*\w+(?:, \w+)+(?=: )", lambda m: m[0].replace(", ", ",\N{ZERO WIDTH SPACE}"), line) for line in lines]


def nothing_remote(app: Any, problem: Exception | None) -> None:
    """The site is whole without a network."""
    for page in () if problem else Path(app.outdir).rglob("*.html"):
        if found := REMOTE.search(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page} loads something from elsewhere: {found[0]}")
