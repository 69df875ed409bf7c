"""Every spelling gives exactly the sites that it says, and runs to the same numbers and gradients with them."""

from __future__ import annotations

import math

import pytest

from tests.jax.plain_kernels import assert_same, rewritten
from tests.jax.spellings import attention, linear, loss, norms, public, rope, structure

SPELLINGS = [(m.__name__.rsplit(".", 1)[-1], s) for m in (attention, norms, linear, loss, rope, structure, public) for s in m.table]
DEFAULTS = {"weight_offset": 0.0, "label_smoothing": 0.0, "interleaved": False}


def agrees(match, expect) -> bool:
    """Whether a match has these parameters, array shapes and (under "arrays") exactly these arrays."""
    for name, want in expect.items():
        if name == "arrays":
            got, want = set(match.arrays), set(want.split())
        elif name in match.arrays:
            got = match.arrays[name].shape
        elif name in ("terms", "fill", "additive"):
            got = getattr(match.params["mask"], name)
        else:
            got = match.params.get(name, DEFAULTS.get(name))
        if isinstance(want, float) and isinstance(got, float):
            if not math.isclose(got, want, rel_tol=1e-6):
                return False
        elif got != want:
            return False
    return True


@pytest.mark.parametrize("spelling", [s for _, s in SPELLINGS], ids=[f"{m}: {s.name}" for m, s in SPELLINGS])
def test_spelling(spelling):
    args = spelling.args()
    found, fast = rewritten(spelling.fn, *args)
    shown = "\n".join(f"{m.op} { {n: a.shape for n, a in m.arrays.items()} } {dict(m.params)}" for m in found.sites)
    shown += "\n" + "\n".join(f"missed {m.op}: {m.reason}" for m in found.missed)
    assert found.ops() == sorted(s.op for s in spelling.sites), shown
    left = list(found.sites)
    for site in spelling.sites:
        hit = next((m for m in left if m.op == site.op and agrees(m, site.expect)), None)
        assert hit is not None, f"no {site.op} with {site.expect} among\n{shown}"
        left.remove(hit)
    assert_same(spelling.fn, fast, args, gradients=spelling.gradients)
