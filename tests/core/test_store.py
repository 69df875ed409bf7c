"""The cache's SQLite files: eight writers, kill -9, full disks, read-only folders, files that are not ours, other versions."""

import logging.handlers
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

import kpt
from kpt import store
from kpt.aside import set_aside
from kpt.errors import StoreError
from kpt.store import Schema, Store
from kpt.tpu import cache

ROOT = str(Path(kpt.__path__[0]).parent)
ONE = "CREATE TABLE t (writer INTEGER, n INTEGER, text TEXT)"
SCHEMA = Schema("numbers", 0x6B7074FF, (ONE,))


def add(to, writer, n, text=""):
    to.write(lambda c: c.execute("INSERT INTO t VALUES (?, ?, ?)", (writer, n, text)))


def rows(of):
    return of.read(lambda c: [tuple(r)[:2] for r in c.execute("SELECT * FROM t ORDER BY writer, n")])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "t.sqlite"


def test_what_is_written_is_there_for_another_store(path):
    add(Store(path, SCHEMA), 0, 1)
    assert rows(Store(path, SCHEMA)) == [(0, 1)]
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
    raw.close()


def test_a_write_that_fails_leaves_nothing(path):
    kept = Store(path, SCHEMA)

    def half(c):
        c.execute("INSERT INTO t VALUES (0, 1, '')")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kept.write(half)
    assert rows(kept) == []


# A writer announces each number once it was written; the parent kills it where it pleases.
WRITER = f"""
import sys
from pathlib import Path
from kpt.store import Schema, Store
kept = Store(Path(sys.argv[1]), Schema("numbers", 0x6B7074FF, ({ONE!r},)))
for n in range(int(sys.argv[3])):
    kept.write(lambda c: c.execute("INSERT INTO t VALUES (?, ?, ?)", (int(sys.argv[2]), n, "x" * 3000)))
    print(n, flush=True)
assert not kept.in_memory
"""


def writer(path, number, count):
    command = [sys.executable, "-W", "error", "-c", WRITER, str(path), str(number), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT})


def test_eight_processes_write_at_once(path):
    writers = [writer(path, i, 25) for i in range(8)]
    for w in writers:
        _, err = w.communicate(timeout=120)
        assert (w.returncode, err) == (0, "")
    assert rows(Store(path, SCHEMA)) == [(i, n) for i in range(8) for n in range(25)]


def test_kill_9_loses_nothing_that_was_acknowledged(path):
    announced = set()
    for i in range(4):
        pair = [writer(path, 2 * i + j, 10_000) for j in range(2)]
        # Killed after 1 to 7 announcements, in the middle of whatever both of them are doing then.
        seen = [pair[0].stdout.readline() for _ in range(1 + 2 * i)]
        for w in pair:
            w.send_signal(signal.SIGKILL)
        for j, w in enumerate(pair):
            lines = (seen if j == 0 else []) + w.stdout.readlines()
            w.communicate()
            announced |= {(2 * i + j, int(line)) for line in lines if line.endswith("\n")}
    assert len(announced) >= 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert announced <= set(rows(Store(path, SCHEMA)))
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


def filled(path):
    kept = Store(path, SCHEMA)
    for n in range(60):
        add(kept, 0, n, "x" * 2000)
    return path.read_bytes()


def corrupt_head(path):
    path.write_bytes(b"\0" * 100 + filled(path)[100:])


def corrupt_pages(path):
    data = filled(path)
    path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


def truncated(path):
    path.write_bytes(filled(path)[: 4096 * 5 + 17])


def a_text(path):
    path.parent.mkdir()
    path.write_text('{"version": 1}\n' * 100)


def another_programs(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE moz_cookies (id INTEGER)")
    raw.close()


@pytest.mark.parametrize("damage", [corrupt_head, corrupt_pages, truncated, a_text, another_programs], ids=lambda f: f.__name__)
def test_a_file_that_is_not_ours_or_is_damaged_is_set_aside(path, damage):
    damage(path)
    before = path.read_bytes()
    kept = Store(path, SCHEMA)
    with pytest.warns(UserWarning, match="set aside"):
        rows(kept)
    add(kept, 1, 2)
    assert rows(Store(path, SCHEMA)) == [(1, 2)] and not kept.in_memory
    assert path.with_name("t.sqlite.bad").read_bytes() == before


def test_an_empty_file_is_a_new_store(path):
    path.parent.mkdir()
    path.touch()
    add(Store(path, SCHEMA), 1, 2)
    assert rows(Store(path, SCHEMA)) == [(1, 2)]


def test_one_who_finds_the_file_replaced_meanwhile_does_not_set_the_good_one_aside(path):
    a_text(path)
    late = Store(path, SCHEMA)
    with pytest.warns(UserWarning, match="set aside"):
        add(Store(path, SCHEMA), 1, 2)
    late._set_aside(sqlite3.DatabaseError("file is not a database"))
    assert rows(late) == [(1, 2)]


def test_what_is_set_aside_overwrites_nothing(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "f").write_text(text)
        with pytest.warns(UserWarning, match="set aside"):
            set_aside(tmp_path / "f", "bad")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"f.bad": "first", "f.bad2": "second"}


# Steps of a later version of the schema.
NEWER = Schema("numbers", SCHEMA.application, (ONE, "ALTER TABLE t ADD COLUMN more TEXT DEFAULT 'old'; CREATE INDEX i ON t (n)"))


def test_an_older_file_is_brought_up_to_date(path):
    add(Store(path, SCHEMA), 1, 2)
    assert Store(path, NEWER).read(lambda c: [tuple(r) for r in c.execute("SELECT * FROM t")]) == [(1, 2, "", "old")]


def test_a_migration_that_fails_changes_nothing(path):
    add(Store(path, SCHEMA), 1, 2)
    broken = Schema("numbers", SCHEMA.application, (ONE, "ALTER TABLE t ADD COLUMN more TEXT; ALTER TABLE none ADD COLUMN x TEXT"))
    with pytest.raises(sqlite3.OperationalError):
        rows(Store(path, broken))
    assert rows(Store(path, SCHEMA)) == [(1, 2)]


def test_a_newer_file_is_refused_and_left_alone(path):
    Store(path, NEWER).read(lambda c: None)
    before = path.read_bytes()
    for use in (rows, lambda s: add(s, 3, 4)):
        with pytest.raises(StoreError, match="version 2; this kpt knows versions up to 1") as refused:
            use(Store(path, SCHEMA))
        assert "Upgrade kpt" in refused.value.advice
    assert path.read_bytes() == before


def goes_on_in_memory(kept, earlier):
    """One line of the log says so, for all files of the folder."""
    told = logging.handlers.BufferingHandler(10)
    logging.getLogger("kpt").addHandler(told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            other = Store(kept.path, SCHEMA)
            add(other, 7, 7, "x" * 100_000)
            assert other.in_memory
        add(kept, 7, 7, "x" * 100_000)
        add(kept, 8, 8)
    logging.getLogger("kpt").removeHandler(told)
    (line,) = [r.getMessage() for r in told.buffer]
    assert re.fullmatch(r"\S+ cannot be written \(.+\): what this process measures ends with it. KPT_CACHE_DIR names another place.", line)
    assert kept.in_memory
    assert rows(kept) == [*earlier, (7, 7), (8, 8)]


def test_a_full_disk_is_a_warning(path, monkeypatch):
    """SQLite's own answer to a disk without room, from a database that may not grow."""
    add(Store(path, SCHEMA), 1, 2)
    connect = Store._connect

    def small(self):
        connection = connect(self)
        connection.execute("PRAGMA max_page_count = 4")
        return connection

    monkeypatch.setattr(Store, "_connect", small)
    goes_on_in_memory(Store(path, SCHEMA), [(1, 2)])
    monkeypatch.undo()
    assert rows(Store(path, SCHEMA)) == [(1, 2)]


def in_a_process(body, path):
    """Runs a function of this module in a process of its own, whose limits and user are its own."""
    code = f"from pathlib import Path; from tests.core import test_store; test_store.{body.__name__}(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr


def with_small_files(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    goes_on_in_memory(Store(path, SCHEMA), [(1, 2)])


def test_a_write_that_the_system_refuses_is_a_warning(path):
    """The system's own refusal, by a limit on the size of files."""
    add(Store(path, SCHEMA), 1, 2)
    in_a_process(with_small_files, path)
    assert rows(Store(path, SCHEMA)) == [(1, 2)]


def as_nobody(path):
    if os.getuid() == 0:  # whom no permission stops
        os.setuid(65534)
    goes_on_in_memory(Store(path, SCHEMA), [(1, 2)])


def test_a_read_only_directory_is_a_warning_and_what_it_holds_is_read():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add(Store(folder / "t.sqlite", SCHEMA), 1, 2)
        for f in folder.iterdir():
            f.chmod(0o444)
        folder.chmod(0o555)
        in_a_process(as_nobody, folder / "t.sqlite")
        folder.chmod(0o755)
        assert rows(Store(folder / "t.sqlite", SCHEMA)) == [(1, 2)]


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    goes_on_in_memory(Store(tmp_path / "file" / "t.sqlite", SCHEMA), [])


def test_schedules_that_cannot_be_kept_are_told_in_the_same_way(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "file" / "kpt"))
    for name in ("a", "b"):
        cache.store(name, 1)
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == [f"{tmp_path}/file/kpt/tpu cannot be written"]


def test_a_file_that_stays_locked_is_a_warning(path, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.0)
    add(Store(path, SCHEMA), 1, 2)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k | {"timeout": 0.0}))
    holder = connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    goes_on_in_memory(Store(path, SCHEMA), [(1, 2)])
    holder.close()


def on_both_sides_of_a_fork(path):
    kept = Store(path, SCHEMA)
    add(kept, 1, 1)
    child = os.fork()
    if child == 0:
        add(kept, 2, 2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    add(kept, 3, 3)


def test_a_store_may_be_used_on_both_sides_of_a_fork(path):
    in_a_process(on_both_sides_of_a_fork, path)
    assert rows(Store(path, SCHEMA)) == [(1, 1), (2, 2), (3, 3)]


def test_a_store_may_be_used_by_threads(path):
    kept = Store(path, SCHEMA)
    threads = [threading.Thread(target=lambda i=i: [add(kept, i, n) for n in range(5)]) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert rows(kept) == [(i, n) for i in range(4) for n in range(5)]


def test_one_who_is_killed_while_setting_a_file_aside_leaves_the_next_to_do_it(path, monkeypatch):
    """Its log goes first, so that none is ever beside a new file."""
    filled(path)
    holder = sqlite3.connect(path)
    holder.execute("INSERT INTO t VALUES (9, 9, '')")
    holder.commit()  # in the log, which lives as long as this connection
    assert path.with_name("t.sqlite-wal").exists()
    moved = []

    def replace(self, target):
        moved.append(self.name)
        if self == path:
            raise KeyboardInterrupt
        return os.rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="set aside"):
        set_aside(path, "bad", store.COMPANIONS)
    assert moved[-1] == "t.sqlite" and path.exists() and not path.with_name("t.sqlite-wal").exists()
    holder.close()
