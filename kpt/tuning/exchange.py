"""Measurements from one machine for another: JSON that says where it is from, and is not believed before a sample is measured again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

from kpt._version import __version__
from kpt.errors import StoreError
from kpt.tuning.measurements import Measurement, Measurements, _insert, now
from kpt.tuning.rounds import SIGMAS, gain, ratio

FORMAT = 1
SAMPLE = 5
"""Calls of each environment that are measured again."""
Environment = tuple[str, str, str]
"""Chip, driver and framework with its versions."""
Contest = Sequence[Measurement]
"""Rows of several kernels for one kind of call."""
Again = Callable[[Environment, Sequence[Contest], int], Sequence[tuple[Contest, Mapping[str, Sequence[float]]]] | str]
"""`again(environment, contests, count)`: up to `count` of the contests, with the seconds that each kernel took here, one figure a round; or
why nothing of that environment can be measured here, in one clause."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Attributes:
    origin: under which the rows are kept.
    rows: in the file.
    added: of them, those that were new or newer.
    verified: of those, the ones that may be relied on now.
    notes: what became of the rows of each environment, one sentence each.
    """

    origin: str
    rows: int
    added: int
    verified: int
    notes: tuple[str, ...]


def export_json(table: Measurements) -> str:
    """All that was measured on this machine; what it imported itself stays out, for it cannot vouch for that."""
    rows = [m.to_json() for m in table.all() if not m.origin]
    about = {"kind": "kpt.tuning", "format": FORMAT, "kpt": __version__, "machine": platform.node(), "exported": now()}
    return json.dumps(about | {"rows": rows}, indent=1)


def import_json(table: Measurements, text: str, again: Again | None = None, seed: int = 0, source: object = None) -> Import:
    """Takes in an export. The rows count for `Measurements.best` only once a sample of their calls was measured again and agreed.

    Plans choose by who is the fastest, so that is what has to hold, within the noise of both machines; times themselves differ with
    clocks and cooling. The sample is drawn apart for each chip, driver and framework version: rows of a chip that is not here stay
    unverified, and no key of this machine asks for them. One disagreement leaves all rows of that environment unverified.

    Args:
      again: measures on this machine; without it nothing is verified.
      seed: of the draw.
      source: the file that the text is from, for errors.

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
        origin.encode()  # a ValueError for what JSON may hold and a file may not
        rows = [Measurement.from_json(r, origin) for r in data["rows"]]
    except (StoreError, ValueError, KeyError, TypeError, RecursionError) as problem:
        asked = "Measurements were to be imported" if source is None else f"{source} was to be imported"
        missing = f"It has no {problem}" if isinstance(problem, KeyError) else f"{type(problem).__name__}: {problem}"
        what = problem.possible if isinstance(problem, StoreError) else missing
        raise StoreError(asked, what, "Give a file that kpt tune export wrote") from None
    added = table.store.write(lambda c: _insert(c, rows))
    environments: dict[Environment, list[Measurement]] = {}
    for m in rows:
        environments.setdefault((m.key.chip, m.key.driver, m.key.framework), []).append(m)
    notes = []
    for environment, members in environments.items():
        agreed, why = _checked(environment, members, again, random.Random(seed))
        if agreed:
            table.verify(members)
        words = f"{len(members)} measurement{'' if len(members) == 1 else 's'} of {', '.join(filter(None, environment))}"
        notes.append(f"{words}: {'used' if agreed else 'kept, not verified and not used'}; {why}.")
    verified = sum(m.verified and m.origin == origin for m in table.all())
    return Import(origin, len(rows), added, verified, tuple(notes))


def _checked(environment: Environment, rows: Sequence[Measurement], again: Again | None, draw: random.Random) -> tuple[bool, str]:
    """Whether a sample of the calls has the same winners here, and the reason in words."""
    kinds: dict[tuple[str, ...], list[Measurement]] = {}
    for m in rows:
        kinds.setdefault((m.key.kernel.partition(".")[0], m.key.dtype, m.key.shape, m.key.mask, m.key.passes), []).append(m)
    contests = [c for c in kinds.values() if len({m.key.kernel for m in c}) > 1]
    if not contests:
        return False, "no two of them are of kernels for the same call, so that there is nothing to choose by them"
    if again is None:
        return False, "nothing was measured again"
    draw.shuffle(contests)
    found = again(environment, contests, SAMPLE)
    if isinstance(found, str):
        return False, found
    otherwise = [said for contest, seconds in found if (said := _disagreement(contest, seconds))]
    if otherwise:
        return False, "; ".join(otherwise)
    wanted = min(SAMPLE, len(contests))
    calls = f"{wanted} of {len(contests)} call{'' if len(contests) == 1 else 's'} {'was' if wanted == 1 else 'were'}"
    if len(found) < wanted:
        return False, f"{calls} to be measured again, and {len(found)} could be"
    return True, f"{calls} measured again here, with the same winner"


def _disagreement(contest: Contest, seconds: Mapping[str, Sequence[float]]) -> str:
    """How the winner of the import loses here, by more than the noise of both; "" where it does not."""
    best = {n: min((m for m in contest if m.key.kernel == n), key=lambda m: m.seconds) for n in seconds}
    winner = min(best, key=lambda n: best[n].seconds)
    here = min(seconds, key=lambda n: statistics.median(seconds[n]))
    if winner == here:
        return ""
    won, noise = gain(seconds[winner], seconds[here])
    spread = sum((best[n].high - best[n].low) / 2 / best[n].seconds for n in (winner, here))
    if won <= SIGMAS * noise + spread:
        return ""
    at = contest[0].key
    return f"at {at.shape} {at.dtype}, {at.passes}, {winner} won there, and {here} is {ratio(won)} here"
