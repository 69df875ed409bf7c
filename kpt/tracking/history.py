"""Runs that were measured, kept in the cache directory, and what they say beside each other."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kpt.config import config
from kpt.errors import StoreError
from kpt.store import Schema, Store
from kpt.tracking.run import Run
from kpt.tracking.statistics import Finding, Thresholds, judge, judge_recent

SCHEMA = Schema(
    "history",
    0x6B707402,
    (
        """
        CREATE TABLE run (
          number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, recorded TEXT NOT NULL, name TEXT NOT NULL, label TEXT, source TEXT,
          data TEXT NOT NULL
        );
        CREATE INDEX run_name ON run (name)
        """,
    ),
)
LENGTH = 60
"""Runs of a series that are looked at for a change of level."""


class History:
    """The runs in a cache directory.

    Args:
      folder: the directory; that of the settings unless given.
    """

    def __init__(self, folder: Path | None = None):
        self.store = Store((config().cache_dir if folder is None else folder) / "history.sqlite", SCHEMA)

    def put(self, *runs: Run) -> None:
        """Adds runs, all of them or none; one that is there already, by its id, is not added again.

        Raises:
          StoreError: a newer version of kpt wrote the file.
        """
        rows = [(r.id, r.recorded, r.name, r.label, r.commit, json.dumps(r.to_json())) for r in runs]
        sql = "INSERT INTO run (id, recorded, name, label, source, data) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
        self.store.write(lambda c: c.executemany(sql, rows))

    def runs(self, name: str | None = None, label: str | None = None, since: str | None = None, last: int | None = None) -> list[Run]:
        """Runs in the order in which they were recorded.

        Args:
          name: a part of their names.
          label: their label.
          since: an ISO 8601 date or time, UTC.
          last: so many of the latest.
        """
        where, values = ["1"], list[Any]()
        for condition, value in (("instr(name, ?) > 0", name), ("label = ?", label), ("recorded >= ?", since)):
            if value is not None:
                where.append(condition)
                values.append(value)
        sql = f"SELECT data FROM run WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"
        return self._read(sql, [*values, -1 if last is None else last])[::-1]

    def select(self, text: str) -> list[Run]:
        """The runs that a user means: those with this label, or whose id or commit begins with it.

        Raises:
          StoreError: there are none.
        """
        sql = """SELECT data FROM run WHERE label = :text OR (length(:text) >= 4 AND (substr(id, 1, length(:text)) = :text
                 OR substr(source, 1, length(:text)) = :text)) ORDER BY number"""
        found = self._read(sql, {"text": text})
        if not found:
            raise StoreError(
                f"Runs of {text!r} were asked for", "No run has that label, and no id or commit of four or more digits begins with it",
                "kpt history lists them",
            )  # fmt: skip
        return found

    def _read(self, sql: str, values: Sequence[Any] | Mapping[str, Any]) -> list[Run]:
        def work(connection: sqlite3.Connection) -> list[Run]:
            return [Run.from_json(json.loads(row["data"])) for row in connection.execute(sql, values)]

        return self.store.read(work)


def record(*runs: Run, history: History | None = None) -> None:
    """Adds runs to the history: that of the cache directory unless given.

    Raises:
      StoreError: a newer version of kpt wrote it.
    """
    (history or History()).put(*runs)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of one series beside each other.

    Attributes:
      before, after: the runs.
      time, memory: what they say; `memory` is None where it is not known of all.
      changed: the first run of the present level, where the history has a change of level.
      note: what else a reader should know.
    """

    before: tuple[Run, ...]
    after: tuple[Run, ...]
    time: Finding
    memory: Finding | None
    changed: Run | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return self.after[-1].name

    @property
    def worst(self) -> Finding:
        """That of time and memory which a gate goes by."""
        from kpt.tracking.statistics import SEVERITIES

        findings = [f for f in (self.time, self.memory) if f is not None]
        return max(findings, key=lambda f: SEVERITIES.index(f.verdict) if f.verdict in SEVERITIES else -1)

    def to_json(self) -> dict[str, Any]:
        run = self.after[-1]
        return {
            "name": run.name, "fingerprint": run.fingerprint, "measured": run.measured, "hardware": run.hardware, "machine": run.machine,
            "before": [r.id for r in self.before], "after": [r.id for r in self.after], "time": self.time.to_json(),
            "memory": None if self.memory is None else self.memory.to_json(),
            "changed": None if self.changed is None else {"id": self.changed.id, "commit": self.changed.commit,
                                                          "recorded": self.changed.recorded},
            "note": self.note,
        }  # fmt: skip


def by_series(runs: Iterable[Run]) -> dict[tuple[str, str, str, str, str], list[Run]]:
    """Runs of the same thing on the same machine, in their order."""
    found: dict[tuple[str, str, str, str, str], list[Run]] = {}
    for r in runs:
        found.setdefault(r.series, []).append(r)
    return found


def compare(a: Sequence[Run], b: Sequence[Run], thresholds: Thresholds | None = None, history: Sequence[Run] = ()) -> list[Comparison]:
    """Runs `b` against runs `a`, for each series that both have.

    Args:
      history: all runs; where a side is too few runs to show the machine's noise, those before `b` do.
    """
    left, right = by_series(a), by_series(b)
    found = []
    chosen = {r.id for r in b}
    earlier = by_series(r for r in history if r.id not in chosen)
    for series in left.keys() & right.keys():
        before, after = left[series], right[series]
        machine = [r.seconds for r in earlier.get(series, ())][-LENGTH:]
        time = judge([r.seconds for r in before], [r.seconds for r in after], thresholds, machine=machine)
        memory = judge(*sizes, thresholds) if (sizes := _memory(before, after)) else None
        found.append(Comparison(tuple(before), tuple(after), time, memory))
    return sorted(found, key=lambda c: c.after[0].series)


def regressions(runs: Sequence[Run], thresholds: Thresholds | None = None) -> list[Comparison]:
    """The latest runs of every series against those before.

    Args:
      runs: in the order in which they were recorded, of any number of series.
    """
    limits = thresholds or Thresholds()
    found, series = [], by_series(runs)
    names: dict[tuple[str, ...], set[str]] = {}
    for name, mark, *rest in series:
        names.setdefault((name, *rest), set()).add(mark)
    for (name, mark, *rest), members in series.items():
        tail = members[-LENGTH:]
        time, start = judge_recent([r.seconds for r in tail], limits)
        before, after = tail[: -limits.recent], tail[-limits.recent :]
        memory = judge_recent(sizes[0] + sizes[1], limits)[0] if (sizes := _memory(before, after)) else None
        others = names[(name, *rest)] - {mark}
        note = f"{name} is recorded with {len(others) + 1} model fingerprints here; each has a history of its own." if others else ""
        changed = None if start is None else tail[start]
        found.append(Comparison(tuple(before), tuple(after), time, memory, changed, note))
    return found


def _memory(before: Sequence[Run], after: Sequence[Run]) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]] | None:
    if not before or not all(r.memory for r in (*before, *after)):
        return None
    return [(float(r.memory or 0),) for r in before], [(float(r.memory or 0),) for r in after]
