"""The core imports no framework: importing all of it loads none, and no line of it imports one, lazily or not."""

import ast
import pathlib
import subprocess
import sys

import pytest

import kpt

ROOT = pathlib.Path(kpt.__path__[0])
FILES = sorted(ROOT.rglob("*.py"))
FRAMEWORKS = {"jax", "jaxlib", "flax", "torch", "torch_xla", "triton", "tensorflow"}
BUILT_ON_THEM = {"kpt_jax", "kpt_torch", "pallas_kernels"}


def imports(source):
    """Top-level packages that a source imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_importing_every_module_loads_no_framework():
    parts = [f.relative_to(ROOT.parent).with_suffix("").parts for f in FILES if f.stem != "__main__"]
    modules = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
    assert {"kpt.kernels", "kpt.strategy.plan", "kpt.validation"} <= set(modules)
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(sorted({FRAMEWORKS | BUILT_ON_THEM!r} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "[]"), found.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_line_imports_a_framework(file):
    assert not FRAMEWORKS & set(imports(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_line_knows_what_is_inside_a_framework(file):
    """Its private modules are a front end's business."""
    texts = {n.value for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not {t for t in texts if t.startswith(tuple(f"{name}._" for name in FRAMEWORKS))}


@pytest.mark.parametrize(
    "line", ["import jax", "import numpy, jax.numpy as jnp", "from torch import nn", "def f():\n  import jax"]
)
def test_the_search_finds_what_it_looks_for(line):
    assert FRAMEWORKS & set(imports(line))
