"""What an error says: sentences, each of which begins as one."""

from __future__ import annotations

import ast
import pathlib

from kpt.errors import KptError

ROOT = pathlib.Path(__file__).parents[2]
# What a sentence of an error may begin with in lower case: names of commands, packages, files and arrays.
NAMES = {
    "kpt", "pip", "libtpu", "matplotlib", "orbax-checkpoint", "safetensors", "as_torch_kernel", "plgpu.as_torch_kernel", "docs/pipeline.md",
    "cos", "invalid", "labels", "m", "minor", "q", "weights", "x",
}  # fmt: skip


def sentences(call: ast.Call):
    """What is possible and what to do, where they begin with words that stand in the source."""
    for given in call.args[1:]:
        for text in (given.body, given.orelse) if isinstance(given, ast.IfExp) else (given,):
            first = text.values[0] if isinstance(text, ast.JoinedStr) and text.values else text
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def test_a_question_ends_as_one():
    assert str(KptError("Op 'rms_nrom' was asked for.", "The ops are rms_norm", "Did you mean 'rms_norm'?")) == (
        "Op 'rms_nrom' was asked for. The ops are rms_norm. Did you mean 'rms_norm'?"
    )


def test_every_sentence_of_an_error_begins_with_a_capital():
    wrong = []
    for path in (p for package in ("kpt", "kpt_jax", "kpt_torch", "pallas_kernels") for p in (ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for call in ast.walk(ast.parse(text)) if "Error(" in text else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Error"):
                wrong += [(path.name, s) for s in sentences(call) if s[:1].islower() and s.split()[0].rstrip(",") not in NAMES]
    assert not wrong
