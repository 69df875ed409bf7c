"""Measurements from one machine for another: JSON that says where it is from, and is not believed before a sample is measured again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import random
import warnings
from collections.abc import Callable, Sequence

from kpt._version import __version__
from kpt.errors import StoreError
from kpt.tuning.measurements import Measurement, Measurements, _insert, now

FORMAT = 1
SAMPLE = 5
"""Rows of each environment that are measured again."""
AGREEMENT = 1.25
"""Ratio up to which two medians agree: machines of one kind differ in clocks and cooling, and a wrong row is off by far more."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Attributes:
    origin: under which the rows are kept.
    rows: in the file.
    added: of them, those that were new or newer.
    verified: of those, the ones that may be relied on now.
    disagreements: what measuring again found to be otherwise, one sentence each.
    """

    origin: str
    rows: int
    added: int
    verified: int
    disagreements: tuple[str, ...]


def export_json(table: Measurements) -> str:
    """All that was measured on this machine; what it imported itself stays out, for it cannot vouch for that."""
    rows = [m.to_json() for m in table.all() if not m.origin]
    about = {"kind": "kpt.tuning", "format": FORMAT, "kpt": __version__, "machine": platform.node(), "exported": now()}
    return json.dumps(about | {"rows": rows}, indent=1)


def import_json(
    table: Measurements, text: str, measure_again: Callable[[Measurement], float | None] | None = None, seed: int = 0
) -> Import:
    """Takes in an export. The rows count for `Measurements.best` only once a sample of them was measured again and agreed.

    The sample is drawn apart for each chip, driver and framework version: rows of a chip that is not here stay unverified, and no
    key of this machine asks for them. One disagreement leaves all rows of that environment unverified.

    Args:
      measure_again: seconds of a call on this machine for a row's key and config, or None where it cannot be measured here.
      seed: of the draw.

    Raises:
      StoreError: the text is no export of measurements, or is of a newer format. Nothing of it is taken in.
    """
    try:
        data = json.loads(text)
        if data["kind"] != "kpt.tuning" or not isinstance(data["rows"], list):
            raise ValueError(f"a {data['kind']!r}")
        if data["format"] > FORMAT:
            raise ValueError(f"format {data['format']}, and formats up to {FORMAT} are known")
        digest = hashlib.sha256(json.dumps(data["rows"], sort_keys=True).encode()).hexdigest()[:12]
        origin = f"{digest}, exported {data['exported']} by kpt {data['kpt']} on {data['machine']}"
        rows = [Measurement.from_json(r, origin) for r in data["rows"]]
    except (ValueError, KeyError, TypeError) as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise StoreError("Measurements were to be imported", what, "Give a file that kpt tune export wrote") from None
    added = table.store.write(lambda c: _insert(c, rows))
    agreed: list[Measurement] = []
    disagreements: list[str] = []
    if measure_again is not None:
        environments: dict[tuple[str, str, str], list[Measurement]] = {}
        for m in rows:
            environments.setdefault((m.key.chip, m.key.driver, m.key.framework), []).append(m)
        for members in environments.values():
            found = _check(members, measure_again, random.Random(seed))
            if found:
                disagreements += found
            elif found is not None:
                agreed += members
    table.verify(agreed)
    verified = sum(m.verified and m.origin == origin for m in table.all())
    for sentence in disagreements:
        warnings.warn(sentence, stacklevel=2)
    return Import(origin, len(rows), added, verified, tuple(disagreements))


def _check(rows: Sequence[Measurement], measure_again: Callable[[Measurement], float | None], draw: random.Random) -> list[str] | None:
    """Disagreements in a sample of rows; None where too few can be measured here."""
    checked, found = 0, []
    for m in draw.sample(rows, len(rows)):
        seconds = measure_again(m)
        if seconds is None:
            continue
        checked += 1
        if not 1 / AGREEMENT <= seconds / m.seconds <= AGREEMENT:
            found.append(f"{m.key.kernel} at {m.key.shape} took {seconds:.3g} s here, and {m.seconds:.3g} s by the import.")
        if checked == SAMPLE:
            break
    return found if checked == min(SAMPLE, len(rows)) else None
