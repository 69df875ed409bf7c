"""The persistent table of measurements: what one kernel took in one environment, for one bucket of calls and one configuration."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sqlite3
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kpt._version import __version__
from kpt.config import config as settings
from kpt.errors import StoreError
from kpt.store import Schema, Store

FORWARD, BOTH, AS_CALLED = "forward", "forward and backward", "as called"
"""What is measured: of a kernel or a loss its passes, the first two; of a function that is no loss the call, with the gradients that it
takes itself."""
SCHEMA = Schema(
    "measurements",
    0x6B707401,
    (
        """
        CREATE TABLE measurement (
          kernel TEXT NOT NULL, version INTEGER NOT NULL, chip TEXT NOT NULL, driver TEXT NOT NULL, framework TEXT NOT NULL,
          dtype TEXT NOT NULL, shape TEXT NOT NULL, mask TEXT NOT NULL, passes TEXT NOT NULL, config TEXT NOT NULL,
          seconds REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL, samples INTEGER NOT NULL, measured TEXT NOT NULL,
          kpt TEXT NOT NULL, origin TEXT NOT NULL, verified INTEGER NOT NULL,
          PRIMARY KEY (kernel, version, chip, driver, framework, dtype, shape, mask, passes, config)
        ) WITHOUT ROWID
        """,
        "ALTER TABLE measurement ADD COLUMN call TEXT NOT NULL DEFAULT '{}'",
    ),
)


@dataclasses.dataclass(frozen=True)
class Key:
    """What a measurement is of. Another kernel version, driver or framework is another measurement.

    Attributes:
      kernel, version: as in `KernelSpec`; "original" and 0 for the user's own code.
      chip: name of the hardware profile.
      driver, framework: with their versions: "570.124", "jax 0.11.2, jaxlib 0.11.2".
      dtype, shape, mask: of the bucket.
      passes: "forward" or "forward and backward".
    """

    kernel: str
    version: int
    chip: str
    driver: str
    framework: str
    dtype: str
    shape: str
    mask: str = ""
    passes: str = FORWARD

    def __post_init__(self) -> None:
        if self.passes not in (FORWARD, BOTH):
            raise StoreError(
                f"A measurement of {self.kernel} was described with passes {self.passes!r}", f"Passes are {FORWARD!r} or {BOTH!r}"
            )


_KEY = tuple(f.name for f in dataclasses.fields(Key))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Attributes:
    key: what was measured.
    seconds, low, high: of a call: median and quartiles.
    samples: how many those are from.
    config: the kernel's block sizes and other choices, JSON-ready; empty for its own rule.
    measured: when, UTC, ISO 8601.
    kpt: the version that measured.
    origin: "" if measured here, else which import brought it.
    verified: whether it may be relied on: measured here, or from an import whose sample was measured again and agreed.
    call: what ran, JSON-ready as a `Trial` has it (`op`, `specs`, `params`), for the key has only its bucket; empty where unknown.
    """

    key: Key
    seconds: float
    low: float
    high: float
    samples: int
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measured: str = dataclasses.field(default_factory=lambda: now())
    kpt: str = __version__
    origin: str = ""
    verified: bool = True
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.seconds <= self.high < math.inf) or self.samples < 1:
            raise StoreError(
                f"A measurement of {self.key.kernel} was described: {self.seconds} s [{self.low}, {self.high}], {self.samples} samples",
                "Quartiles are positive, finite, and have the median between them, of at least one sample",
            )

    @classmethod
    def of(
        cls, key: Key, seconds: Sequence[float], config: Mapping[str, Any] | None = None, call: Mapping[str, Any] | None = None
    ) -> Measurement:
        """From the samples themselves, in seconds."""
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [*seconds]
        return cls(key, middle, low, high, len(seconds), config or {}, call=call or {})

    def to_json(self) -> dict[str, Any]:
        """As an export has it, flat; what another machine has to find out itself (`origin`, `verified`) is not in it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("key", "origin", "verified")}
        return dataclasses.asdict(self.key) | fields | {"config": dict(self.config), "call": dict(self.call)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], origin: str) -> Measurement:
        """Inverse of `to_json`, unverified.

        Raises:
          StoreError: fields are missing, or are not what they should be.
        """
        try:
            texts: dict[str, Any] = {n: _text(data[n]) for n in _KEY if n != "version"}
            key = Key(version=_count(data["version"]), **texts)
            figures = [float(data[n]) for n in ("seconds", "low", "high")]
            when = datetime.datetime.fromisoformat(_text(data["measured"])).isoformat()
            made = cls(key, figures[0], figures[1], figures[2], _count(data["samples"]), dict(data["config"]), when, _text(data["kpt"]))
            made = dataclasses.replace(made, call=dict(data.get("call", {})))
            _text_of(made.config), _text_of(made.call)
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            asked = "A measurement was read from JSON"
            raise StoreError(asked, f"{type(problem).__name__}: {problem}", "Export it again with kpt tune export") from None
        return dataclasses.replace(made, origin=origin, verified=False)


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat()


class Measurements:
    """The measurements in a cache directory.

    Args:
      folder: the directory; that of the settings unless given.
    """

    def __init__(self, folder: Path | None = None):
        self.store = Store((settings().cache_dir if folder is None else folder) / "tuning.sqlite", SCHEMA)

    def put(self, *measurements: Measurement) -> None:
        """Adds measurements, all of them or none; one made here takes the place of an earlier one of the same key and config.

        Raises:
          StoreError: a newer version of kpt wrote the file.
        """
        self.store.write(lambda c: _insert(c, measurements))

    def get(self, key: Key) -> list[Measurement]:
        """Every configuration measured for a key, the fastest first, unverified ones included."""
        where = " AND ".join(f"{n} = ?" for n in _KEY)
        sql = f"SELECT * FROM measurement WHERE {where} ORDER BY seconds, config"
        return self.store.read(lambda c: [_measurement(r) for r in c.execute(sql, dataclasses.astuple(key))])

    def best(self, *keys: Key) -> Measurement | None:
        """The fastest verified measurement over several kernels' keys; None where there is none."""
        return min((m for k in keys for m in self.get(k) if m.verified), key=lambda m: m.seconds, default=None)

    def all(self) -> list[Measurement]:
        """Every row, ordered by key."""
        sql = f"SELECT * FROM measurement ORDER BY {', '.join(_KEY)}, seconds"
        return self.store.read(lambda c: [_measurement(r) for r in c.execute(sql)])

    def verify(self, measurements: Iterable[Measurement]) -> None:
        """Marks imported rows as verified, those that are still what they were."""
        where = " AND ".join(f"{n} = ?" for n in (*_KEY, "config", "origin"))
        rows = [(*dataclasses.astuple(m.key), _text_of(m.config), m.origin) for m in measurements]
        self.store.write(lambda c: c.executemany(f"UPDATE measurement SET verified = 1 WHERE {where}", rows))


def _insert(connection: sqlite3.Connection, measurements: Iterable[Measurement]) -> int:
    """Adds rows; an imported one gives way to one that was measured here, or later. Returns how many there are now because of it."""
    sql = f"""
        INSERT INTO measurement VALUES ({", ".join("?" * (len(_KEY) + 10))})
        ON CONFLICT DO UPDATE SET seconds = excluded.seconds, low = excluded.low, high = excluded.high, samples = excluded.samples,
          measured = excluded.measured, kpt = excluded.kpt, origin = excluded.origin, verified = excluded.verified, call = excluded.call
        WHERE excluded.origin = '' OR (measurement.origin != '' AND excluded.measured > measurement.measured)
    """
    before = connection.total_changes
    for m in measurements:
        figures = (m.seconds, m.low, m.high, m.samples, m.measured, m.kpt, m.origin, int(m.verified))
        connection.execute(sql, (*dataclasses.astuple(m.key), _text_of(m.config), *figures, _text_of(m.call)))
    return connection.total_changes - before


def _measurement(row: sqlite3.Row) -> Measurement:
    values = {f.name: row[f.name] for f in dataclasses.fields(Measurement) if f.name != "key"}
    values |= {"config": json.loads(row["config"]), "call": json.loads(row["call"]), "verified": bool(row["verified"])}
    return Measurement(Key(*(row[n] for n in _KEY)), **values)


def _text_of(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    value.encode()  # a ValueError for half of a surrogate pair, which JSON may hold and a file may not
    return value


def _count(value: Any) -> int:
    if not 0 <= int(value) < 1 << 63:
        raise ValueError(f"{value!r} is not a count")
    return int(value)
