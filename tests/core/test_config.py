"""Settings: what the environment may say, what it may not, and that the documentation says the same."""

import dataclasses
import logging
import pathlib
import re
import subprocess
import sys

import pytest

import kpt
from kpt.config import PREFIX, Config, config, setting
from kpt.errors import ConfigError

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "config.md"
GIB = 1 << 30

GOOD = [
    ("hardware", "auto", "auto"),
    ("hardware", "AUTO", "auto"),
    ("hardware", "h100", "h100-sxm"),
    ("hardware", "TPU v5e", "tpu-v5e"),
    ("level", "aggressive", "aggressive"),
    ("level", "Conservative", "conservative"),
    ("certify", "random", "random"),
    ("certify", "off", "off"),
    ("certify_bytes", "0", 0),
    ("certify_bytes", "4096", 4096),
    ("certify_bytes", "512MiB", GIB // 2),
    ("certify_bytes", " 3 gib ", 3 * GIB),
    ("certify_bytes", "1TiB", 1024 * GIB),
    ("cache_dir", "/some/where", pathlib.Path("/some/where")),
    ("cache_dir", "here", pathlib.Path.cwd() / "here"),
    ("cache_dir", "~/kpt", pathlib.Path.home() / "kpt"),
    ("record", "off", "off"),
    ("log_level", "DEBUG", "debug"),
]
BAD = [
    ("hardware", "h1000", "Near it are h100-sxm (h100)"),
    ("hardware", "abacus", "h100-sxm (h100)"),
    ("level", "reckless", "conservative, balanced, aggressive"),
    ("certify", "yes", "full, random, off"),
    ("certify_bytes", "much", "GiB"),
    ("certify_bytes", "-1", "GiB"),
    ("certify_bytes", "1.5GiB", "GiB"),
    ("certify_bytes", "2 parsecs", "GiB"),
    ("certify_bytes", "9" * 5000, "GiB"),
    ("cache_dir", __file__, "a file"),
    ("cache_dir", "~nobody-of-that-name/kpt", "home"),
    ("record", "never", "on, off"),
    ("log_level", "loud", "debug, info, warning, error, critical"),
]


def test_an_empty_environment_has_the_defaults():
    assert config({}) == config({PREFIX + "LEVEL": " "}) == Config()
    defaults = ("auto", "balanced", "full", None, "warning")
    found = Config()
    assert (found.hardware, found.level, found.certify, found.certify_bytes, found.log_level) == defaults
    assert found.cache_dir.name == "kpt"


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_a_variable_sets_its_setting_and_no_other(name, text, value):
    environ = {PREFIX + name.upper(): text}
    assert config(environ) == dataclasses.replace(Config(), **{name: value})
    assert setting(name, environ) == value


@pytest.mark.parametrize(("name", "text", "possible"), BAD)
def test_a_bad_value_is_an_error_that_names_the_variable_and_what_it_may_be(name, text, possible):
    environ = {PREFIX + name.upper(): text}
    with pytest.raises(ConfigError) as e:
        config(environ)
    assert PREFIX + name.upper() in e.value.asked
    assert possible in e.value.possible
    assert e.value.advice


def test_the_environment_is_read_anew_by_every_call(monkeypatch):
    monkeypatch.setenv("KPT_LEVEL", "conservative")
    assert config().level == "conservative"
    monkeypatch.setenv("KPT_LEVEL", "aggressive")
    assert config().level == "aggressive"


def test_one_setting_can_be_read_beside_a_bad_one():
    assert setting("hardware", {"KPT_HARDWARE": "v6e", "KPT_LEVEL": "reckless"}) == "tpu-v6e"


def test_the_cache_is_found_without_platformdirs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Config().cache_dir == tmp_path / "kpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Config().cache_dir == pathlib.Path.home() / ".cache" / "kpt"


def documented():
    """Rows of the table of the documentation: (setting, variable, default, allowed, meaning)."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", DOCS.read_text(), re.MULTILINE)
    return {row[0]: row for row in rows}


def test_the_documentation_lists_every_setting_once_and_in_order():
    assert list(documented()) == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_the_documentation_gives_the_right_variable_default_and_values(field):
    _, variable, default, allowed, meaning = documented()[field.name]
    assert variable == PREFIX + field.name.upper()
    assert meaning
    quoted = default.strip("`")
    if field.name == "cache_dir":
        assert "~/.cache/kpt" in default
    else:
        assert quoted in re.findall(r"`([^`]+)`", default)
        assert setting(field.name, {variable: quoted}) == getattr(Config(), field.name)
    if field.name in ("level", "certify", "record", "log_level"):
        for value in re.findall(r"`([^`]+)`", allowed):
            assert setting(field.name, {variable: value}) == value
        with pytest.raises(ConfigError) as e:
            setting(field.name, {variable: "?"})
        assert e.value.possible == "Allowed are " + ", ".join(re.findall(r"`([^`]+)`", allowed))


LOGGING = """
import logging, sys
from kpt.config import start_logging
{before}
start_logging({{"KPT_LOG_LEVEL": "info"}})
start_logging({{"KPT_LOG_LEVEL": "info"}})
start_logging({{}})
logging.getLogger("kpt").info("hello")
logging.getLogger("kpt").debug("too fine")
"""


@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("", "INFO kpt: hello\n"),
        ("logging.basicConfig(format='mine %(message)s')", "mine hello\n"),
        ("logging.getLogger().addHandler(logging.NullHandler())", ""),
    ],
    ids=["no logging set up", "the program's own format", "silenced"],
)
def test_the_log_shows_once_and_gives_way_to_the_programs_own(before, shown):
    code = LOGGING.format(before=before)
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(pathlib.Path(kpt.__path__[0]).parent)},
    )
    assert (found.returncode, found.stderr) == (0, shown)


def test_reading_settings_sets_up_no_logging():
    before = logging.getLogger("kpt").level, list(logging.getLogger("kpt").handlers)
    config({"KPT_LOG_LEVEL": "debug"})
    assert before == (logging.getLogger("kpt").level, list(logging.getLogger("kpt").handlers))
