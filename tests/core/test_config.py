"""Settings come from the environment, bad ones with advice, and the table of docs/config.md is complete."""

import dataclasses
import re
from pathlib import Path

import pytest

from kpt.config import Config, config
from kpt.errors import ConfigError

DOC = Path(__file__).parents[2] / "docs" / "config.md"


def test_defaults():
    assert config({}) == Config()
    assert config({"KPT_LEVEL": ""}) == Config()


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("KPT_HARDWARE", "tpu-v5e", "hardware", "tpu-v5e"),
        ("KPT_LEVEL", "conservative", "level", "conservative"),
        ("KPT_CERTIFY", "off", "certify", "off"),
        ("KPT_CERTIFY_BYTES", "512M", "certify_bytes", 512 << 20),
        ("KPT_CERTIFY_BYTES", "0", "certify_bytes", 0),
        ("KPT_CERTIFY_BYTES", "1.5g", "certify_bytes", 3 << 29),
        ("KPT_CACHE_DIR", "/somewhere", "cache_dir", Path("/somewhere")),
        ("KPT_LOG_LEVEL", "debug", "log_level", "DEBUG"),
    ],
)
def test_each_variable(variable, text, field, value):
    assert getattr(config({variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [("KPT_LEVEL", "fast"), ("KPT_CERTIFY", "yes"), ("KPT_CERTIFY_BYTES", "-1"), ("KPT_CERTIFY_BYTES", "2T"),
     ("KPT_CERTIFY_BYTES", "inf"), ("KPT_CERTIFY_BYTES", "G"), ("KPT_LOG_LEVEL", "loud")],
)  # fmt: skip
def test_bad_values_say_what_is_allowed(variable, text):
    with pytest.raises(ConfigError, match=variable):
        config({variable: text})


def test_the_table_lists_every_setting():
    named = set(re.findall(r"^\| `KPT_(\w+)`", DOC.read_text(), re.MULTILINE))
    assert named == {f.name.upper() for f in dataclasses.fields(Config)}
