"""One SQLite file of the cache, for many processes at once: measurements (`kpt.tuning`) and history (`kpt.tracking`) are kept in such.

A connection lives for one operation, so that a store may be used from any thread and across a fork. A write that returned is in
the file's log: it survives the process, however that ends. What is wrong with the file is never the end of the program that
measures: an unreadable one is set aside, and where nothing can be written, the store goes on in memory, which the log says once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kpt.aside import set_aside, unwritable
from kpt.errors import StoreError

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds to wait for other processes before a write is kept in memory instead."""
COMPANIONS = ("-wal", "-shm", "-journal")
_UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_UNWRITABLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
)


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a file holds.

    Attributes:
      what: for messages: "measurements".
      application: SQLite's application_id, by which another program's file is told from ours.
      steps: SQL that brings version i to version i + 1; a new version appends one and changes none.
    """

    what: str
    application: int
    steps: tuple[str, ...]


class _Foreign(Exception):
    """The file is a database, and another program's."""


class Store:
    """A file of one schema.

    Args:
      path: of the file; it and its folder are made when they are needed.
      schema: what it holds.
    """

    def __init__(self, path: Path, schema: Schema):
        self.path, self.schema = path, schema
        self._memory: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @property
    def in_memory(self) -> bool:
        """Whether what is written from now on ends with this process."""
        return self._memory is not None

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work(connection)`, which only reads.

        Raises:
          StoreError: a newer version of kpt wrote the file.
        """
        return self._run(work, write=False)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work(connection)` in one transaction: all of it is in the file when this returns, or none.

        Raises:
          StoreError: a newer version of kpt wrote the file.
        """
        return self._run(work, write=True)

    def _run(self, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        deadline = time.monotonic() + PATIENCE
        while True:
            if self._memory is not None:
                with self._lock, _transaction(self._memory, write):
                    return work(self._memory)
            try:
                with contextlib.closing(self._connect()) as connection, _transaction(connection, write):
                    return work(connection)
            except (sqlite3.DatabaseError, _Foreign, OSError) as problem:
                code = getattr(problem, "sqlite_errorcode", 0) & 0xFF  # extended codes have the plain one in their low byte
                if code in _BUSY and time.monotonic() < deadline:
                    # The busy handler does not cover recovery and the removal of a log by its last user.
                    time.sleep(random.uniform(0.001, 0.05))
                elif isinstance(problem, _Foreign) or code in _UNREADABLE:
                    self._set_aside(problem)
                elif isinstance(problem, OSError) or code in _UNWRITABLE or code in _BUSY:
                    self._go_on_in_memory(problem)
                else:
                    raise

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=5.0, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            if self._version(connection) < len(self.schema.steps):
                # A fresh file, or an older one: whoever comes first brings it up to date, the others wait and see that it is.
                connection.execute("PRAGMA journal_mode = WAL")
                with _transaction(connection, write=True):
                    self._migrate(connection)
            # FULL: a commit is on the disk, not only in the system's memory, so that it survives the machine too.
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _version(self, connection: sqlite3.Connection) -> int:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != self.schema.application and (version or connection.execute("SELECT 1 FROM sqlite_master").fetchone()):
            raise _Foreign("another program's database")
        if version > len(self.schema.steps):
            raise StoreError(
                f"{self.path}, which holds {self.schema.what}, was opened",
                f"A newer kpt wrote it (version {version}; this kpt knows versions up to {len(self.schema.steps)})",
                "Upgrade kpt, or set KPT_CACHE_DIR to another directory",
            )
        return version

    def _migrate(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA application_id = {self.schema.application}")
        for version in range(self._version(connection), len(self.schema.steps)):
            for statement in filter(str.strip, self.schema.steps[version].split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")

    def _set_aside(self, problem: Exception) -> None:
        """Sets the file aside, unless another process has done so meanwhile and a good one is in its place."""
        import filelock

        try:
            with filelock.FileLock(f"{self.path}.lock", timeout=PATIENCE):
                if not self._readable():
                    set_aside(self.path, problem, COMPANIONS, stacklevel=4)
                    if self.path.exists():
                        raise PermissionError(f"{self.path} cannot be renamed")
        except (OSError, filelock.Timeout) as obstacle:
            self._go_on_in_memory(obstacle)

    def _readable(self) -> bool:
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=5.0)) as connection:
                self._version(connection)
                return [r[0] for r in connection.execute("PRAGMA quick_check")] == ["ok"]
        except sqlite3.OperationalError as problem:
            return problem.sqlite_errorcode & 0xFF in _BUSY
        except (sqlite3.DatabaseError, _Foreign):
            return False

    def _go_on_in_memory(self, problem: Exception) -> None:
        with self._lock:
            if self._memory is not None:
                return
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            # What is in the file can still be read, on a full disk as it is, in a read-only directory without its log.
            for how in ("mode=ro", "immutable=1"):
                with contextlib.suppress(sqlite3.Error, _Foreign):
                    with contextlib.closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?{how}", uri=True)) as source:
                        self._version(source)
                        source.backup(memory)
                    break
            else:
                memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            memory.row_factory = sqlite3.Row
            self._migrate(memory)
            self._memory = memory
        unwritable(self.path.parent, problem)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, write: bool) -> Iterator[None]:
    # IMMEDIATE takes the write lock at once: a transaction that began by reading could not wait for it.
    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk rolls back by itself.
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
