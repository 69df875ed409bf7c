"""Numbers in place of sizes that may change: two settings, in which every size is told from every other number.

They are such that what the program asks of its sizes holds: where it cuts a length into pieces of 8, both lengths are multiples of 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from kpt.errors import GraphError
from kpt_torch.apply import is_symbolic
from kpt_torch.capture import Sizes

_TIMES = 256  # as many times a prime, at most
_BESIDE = 64  # numbers that are looked at where there is no such multiple


def other_sizes(module: fx.GraphModule) -> tuple[Sizes, Sizes]:
    """Both settings; empty ones where all sizes are known.

    Primes, so that no product is taken for another, or small multiples of them where the program asks for such; and no two of them as far
    apart in one setting as in the other, so that a difference of sizes (the offset of a causal mask) shows. Where the program asks that
    products of sizes be equal (labels that are flattened beside logits), those that are equal now are one from here on: Dynamo guards it.

    Raises:
      GraphError: what the program asks of its sizes leaves no two settings.
    """
    symbols: dict[Any, Any] = {}  # the environment that says what is known of it
    numbers: dict[Any, Any] = {}
    taken = {1, 2, 3}
    for n in module.graph.nodes:
        val = n.meta.get("val")
        dims: list[Any] = list(val.shape) if isinstance(val, torch.Tensor) else [val]
        for s in dims:
            if is_symbolic(s):
                numbers.setdefault(s.node.expr, s)
                for symbol in s.node.expr.free_symbols if s.node.hint is not None else ():  # else it depends on data
                    symbols.setdefault(symbol, s.node.shape_env)
            elif isinstance(s, int):
                taken.add(int(s))
    try:
        return _settings(symbols, taken)
    except GraphError:
        if not any(_tied(env, numbers) for env in set(symbols.values())):
            raise
    return other_sizes(module)


def _tied(env: Any, numbers: Mapping[Any, Any]) -> bool:
    """Makes one of sizes that are equal now, of those on both sides of an equality that the program asks for; whether there were any."""
    found = False
    for equal in [g.expr for g in env.guards if isinstance(g.expr, sympy.Eq)]:
        sides = [sorted(side.free_symbols & numbers.keys(), key=lambda s: (len(s.name), s.name)) for side in equal.args]
        for left in sides[0]:
            right = next((s for s in sides[1] if s != left and env.size_hint(s) == env.size_hint(left)), None)
            if right is not None:
                sides[1].remove(right)
                found = bool(numbers[left] == numbers[right]) or found
    return found


def _settings(symbols: Mapping[Any, Any], taken: set[int]) -> tuple[Sizes, Sizes]:
    first: dict[Any, int] = {}
    second: dict[Any, int] = {}
    for symbol, env in symbols.items():
        hint = int(env.size_hint(symbol))
        first[symbol] = _chosen(symbol, env, hint, taken, first, [])
        second[symbol] = _chosen(symbol, env, first[symbol] + 1, taken, second, [(first[symbol] - first[s], second[s]) for s in second])
    return Sizes(first), Sizes(second)


def _chosen(symbol: Any, env: Any, least: int, taken: set[int], so_far: Mapping[Any, int],
            apart: Sequence[tuple[int, int]]) -> int:  # fmt: skip
    """A number for the symbol, which is taken then.

    Args:
      so_far: those of other symbols.
      apart: differences that it is to have from none of these numbers, unless what the program asks ties them.
    """
    guards = [g.expr for g in env.guards if symbol in g.expr.free_symbols and g.expr.free_symbols <= {symbol, *so_far}]
    at = {s: sympy.Integer(n) for s, n in so_far.items()}
    holds = lambda n: all(g.xreplace(at | {symbol: sympy.Integer(n)}) != sympy.false for g in guards)  # noqa: E731
    tied = None
    for n, prime in _candidates(least, taken):
        if not holds(n):
            continue
        if any(n - other == difference for difference, other in apart):
            tied = tied or (n, prime)
            continue
        break
    else:
        if tied is None:
            asked = ", ".join(dict.fromkeys(map(str, guards)))
            raise GraphError(f"A size that may change ({symbol}) was to be another number than {least}",
                             f"The program asks too much of it: {asked[:200]}",
                             "Give it inputs of one size (padded, or the last batch dropped), or ask less of their sizes")  # fmt: skip
        n, prime = tied
    taken.update((n, prime))
    return n


def _candidates(least: int, taken: set[int]) -> Iterator[tuple[int, int]]:
    """Numbers that are not taken, and the prime in each: primes from `least` on, their multiples, smaller ones, and any numbers at all."""
    for low, times in itertools.chain(((least, k) for k in range(1, _TIMES + 1)), ((5, k) for k in range(1, least // 5 + 1))):
        prime = max(-(-low // times), 5)
        for _ in range(3):
            prime = _prime(prime, taken)
            if times * prime not in taken:
                yield times * prime, prime
            prime += 1
    yield from ((n, n) for n in range(least, least + _BESIDE) if n not in taken)


def _prime(n: int, taken: set[int]) -> int:
    while n in taken or any(n % k == 0 for k in range(2, int(n**0.5) + 1)):
        n += 1
    return n
