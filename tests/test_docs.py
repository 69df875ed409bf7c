"""Every ```python block of README.md and docs/ and every cell of notebooks/ runs, in order, in one namespace per page.

A block whose info string says `no-test` (```python no-test) shows what is not to be run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
BLOCK = re.compile(r"^```python(?P<marks>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def program(page: Path) -> str:
    """The blocks of a page as one program whose tracebacks name the page and its lines."""
    text, lines = page.read_text(encoding="utf-8"), []
    if page.suffix == ".ipynb":
        return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    for block in BLOCK.finditer(text):
        if "no-test" not in block["marks"]:
            start = text.count("\n", 0, block.start("code"))
            lines += [""] * (start - len(lines)) + block["code"].splitlines()
    return "\n".join(lines)


RUNNABLE = [p for p in PAGES if program(p).strip()]
COMPILES = {"tune_tpu_kernel_without_a_tpu.ipynb"}  # for TPUs, with libtpu


def _marks(page: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.tpu] if page.name in COMPILES else [pytest.mark.slow] if page.suffix == ".ipynb" else []


def test_the_readme_has_code_that_runs():
    assert PAGES[0] in RUNNABLE


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=_marks(p)) for p in RUNNABLE],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs(page, tmp_path):
    code = (
        f"exec(compile(open({str(tmp_path / 'page.py')!r}).read(), {str(page)!r}, 'exec'), {{'__name__': '__main__'}})"
    )
    (tmp_path / "page.py").write_text(program(page), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg", "KPT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_relative_link_leads_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_error_has_its_entry_in_troubleshooting():
    """The typed errors of all packages, found in their sources: importing them needs frameworks."""
    sources = [p for package in ("kpt", "kpt_jax", "kpt_torch", "pallas_kernels") for p in (ROOT / package).rglob("*.py")]
    known = {name for p in sources for name in re.findall(r"^class (\w+Error)\(KptError", p.read_text(encoding="utf-8"), re.MULTILINE)}
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(known) > 9 and set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == known
