"""Masks are an algebra: terms form a set, `&` is the intersection of what is visible, and JSON keeps all of it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt.ops import Bias, Causal, Explicit, Lengths, Mask, Segments, Window
from kpt.ops.attention import pairs
from kpt.ops.mask import visible
from tests.core.brute_force import sees

B, N, T, S = 2, 3, 5, 6
RNG = np.random.default_rng(3)
OPERANDS = {
    "q_segment_ids": RNG.integers(0, 3, (B, T)),
    "kv_segment_ids": RNG.integers(0, 3, (B, S)),
    "kv_lengths": np.array([0, 4]),
    "keep": RNG.random((B, 1, T, S)) < 0.6,
    "bias": RNG.standard_normal((1, N, T, S)),
}

offsets = st.integers(-7, 7)
sides = st.none() | st.integers(0, 7)
terms = st.one_of(
    st.builds(Causal, offsets), st.builds(Window, sides, sides, offsets),
    st.sampled_from([Segments(), Lengths(), Explicit(), Bias()]),
)  # fmt: skip
fills = st.sampled_from([(-math.inf, False), (-1e30, False), (-1e4, True), (0.0, False)])
masks = st.builds(lambda t, f: Mask(tuple(t), *f), st.lists(terms, max_size=4), fills)


def seen(mask):
    return visible(mask, B, N, T, S, OPERANDS)


@settings(deadline=None, derandomize=True)
@given(masks)
def test_visible_is_each_term_of_each_pair(mask):
    found = seen(mask)
    assert found.shape == (B, N, T, S) and found.dtype == bool
    assert all(found[at] == sees(mask, *at, OPERANDS) for at in np.ndindex(found.shape))


@settings(deadline=None, derandomize=True)
@given(masks, masks, masks)
def test_and_intersects_in_any_order(a, b, c):
    np.testing.assert_array_equal(seen(a & b), seen(a) & seen(b))
    assert (a & b).terms == (b & a).terms
    assert ((a & b) & c) == (a & (b & c))
    assert a & a == a
    assert (a & Mask()).terms == a.terms


@settings(deadline=None, derandomize=True)
@given(masks, masks)
def test_the_left_fill_holds_unless_the_left_hides_nothing(a, b):
    hides = any(not isinstance(t, Bias) for t in a.terms)
    assert ((a & b).fill, (a & b).additive) == ((a.fill, a.additive) if hides else (b.fill, b.additive))


@settings(deadline=None, derandomize=True)
@given(st.lists(terms, max_size=4), st.randoms())
def test_terms_are_a_set(found, random):
    shuffled = found + found[:1]
    random.shuffle(shuffled)
    assert Mask(tuple(found)) == Mask(tuple(shuffled)) and hash(Mask(tuple(found))) == hash(Mask(tuple(shuffled)))


@settings(deadline=None, derandomize=True)
@given(masks)
def test_json_round_trip(mask):
    text = json.dumps(mask.to_json(), allow_nan=False)
    assert Mask.from_json(json.loads(text)) == mask


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.builds(Causal, offsets), st.builds(Window, sides, sides, offsets)), max_size=3), st.integers(0, 6),
       st.integers(0, 6))  # fmt: skip
def test_pairs_counts_what_static_terms_leave(found, queries, keys):
    mask = Mask(tuple(found))
    assert pairs(mask, queries, keys) == visible(mask, 1, 1, queries, keys, {}).sum()


@pytest.mark.parametrize(
    "mask, kinds, operands",
    [
        (Mask(), set(), ()),
        (Mask((Causal(), Causal(3))), {"causal"}, ()),
        (Mask((Bias(), Window(4, 0))), {"bias", "window"}, ("bias",)),
        (Mask((Explicit(), Segments(), Lengths())), {"segments", "lengths", "explicit"},
         ("q_segment_ids", "kv_segment_ids", "kv_lengths", "keep")),
    ],
)  # fmt: skip
def test_kinds_and_operands(mask, kinds, operands):
    assert mask.kinds == kinds and mask.operands == operands


@pytest.mark.parametrize(
    "mask, rows",
    [
        (Mask((Causal(),)), ["x..", "xx.", "xxx"]),
        (Mask((Causal(1),)), ["xx.", "xxx", "xxx"]),
        (Mask((Causal(-1),)), ["...", "x..", "xx."]),
        (Mask((Window(0, 0),)), ["x..", ".x.", "..x"]),
        (Mask((Window(1, None),)), ["xxx", "xxx", ".xx"]),
        (Mask((Window(None, 0, -1),)), ["...", "x..", "xx."]),
        (Mask((Causal(), Window(1, 1))), ["x..", "xx.", ".xx"]),
    ],
)
def test_pictures(mask, rows):
    found = visible(mask, 1, 1, 3, 3, {})[0, 0]
    assert ["".join(".x"[int(see)] for see in row) for row in found] == rows
