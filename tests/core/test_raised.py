"""Exceptions of a user's code in one line, with the line of theirs."""

from __future__ import annotations

import importlib

import pytest

import kpt.ops
from kpt.errors import OpError
from kpt.raised import told

MODULE = """import json

def step(params):
    return params["scale"]

def parse():
    return json.loads("{")

def empty():
    raise ValueError
"""


def raised(function, *args):
    try:
        function(*args)
    except Exception as error:
        return told(error)
    raise AssertionError("it did not raise")


@pytest.mark.parametrize("name, args, says", [
    ("step", ({},), "KeyError: 'scale' (theirs.py:4, in step)"),
    ("parse", (), "(theirs.py:7, in parse)"),  # not the line of Python's library that raised
    ("empty", (), "ValueError (theirs.py:10, in empty)"),
])  # fmt: skip
def test_an_exception_names_the_users_line(tmp_path, monkeypatch, name, args, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.delitem(importlib.sys.modules, "theirs", raising=False)
    assert raised(getattr(importlib.import_module("theirs"), name), *args).endswith(says)


def test_an_exception_without_a_line_of_the_users_names_none():
    with pytest.raises(OpError) as caught:
        kpt.ops.op("none")
    caught.value.__traceback__ = caught.value.__traceback__.tb_next  # this file's frame
    assert told(caught.value) == f"OpError: {caught.value}"
