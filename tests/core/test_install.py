"""Install lines work as written: kpt is on no package index, so that they are of a clone, and of extras that there are."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from kpt.install import install

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PAGES = [p for part in ("kpt", "kpt_jax", "kpt_torch", "pallas_kernels", "docs", "notebooks", "tests") for p in sorted((ROOT / part).rglob("*"))
         if p.suffix in (".py", ".md", ".ipynb")]  # fmt: skip
PAGES = [ROOT / "README.md", *(p for p in PAGES if p != Path(__file__))]


@pytest.mark.parametrize(("prefix", "pip"), [(ROOT / ".venv", ".venv/bin/pip"), ("/usr", "pip")])
def test_the_pip_is_that_of_the_environment_that_asks(monkeypatch, prefix, pip):
    monkeypatch.setattr(sys, "prefix", str(prefix))
    assert install("jax") == f"{pip} install -e '.[jax]' in a clone of kpt"


def test_no_page_installs_it_from_an_index():
    texts = {p: p.read_text(encoding="utf-8") for p in PAGES}
    assert [p for p, text in texts.items() if re.search(r"pip install \S*kpt-kernels(?!\S* @ git)", text)] == []


def test_the_extras_that_pages_name_are_there():
    named = re.compile(r"""-e \\?['"]\.\[([\w,-]+)\]|\binstall\(["']([\w-]+)["']\)|kpt-kernels\[([\w,-]+)\] @ git""")
    found = {extra for p in PAGES for groups in named.findall(p.read_text(encoding="utf-8")) for g in groups for extra in g.split(",") if extra}
    assert {"jax", "torch", "tpu", "xla", "jax-triton"} <= found <= set(EXTRAS)
