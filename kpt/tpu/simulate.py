"""How often each bundle of a TPU kernel is issued, and how long its DMAs are waited for: the scalar unit's program, run.

    cycles = sum over bundles of how often each is issued  +  what DMA waits stall

The grid of a Pallas kernel is a loop of the scalar unit, and so are its branches: a causal block that is skipped, an
accumulator that is zeroed once in a while. Their values follow from constants, so that running the scalar instructions
counts every bundle exactly. Integers in scalar memory count where their values are given. What depends on other data (a number that the
vector unit hands over) is unknown: a branch on it is not taken, so that what it would have skipped counts, and `Run.unknown` says
how often that was.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kpt.tpu.bundles import Bundles, Instruction, ScheduleError

DELAY_SLOTS = 4
"""Bundles that most generations issue after a branch before it takes effect."""
MOST = 50_000_000  # bundles with scalar instructions

Value = Any  # an int, a bool, (allocation, offset), a quotient and remainder in a list, or None where it is not known
Step = Callable[[], Any]

_ADDRESS = re.compile(r"\[(?:\w+:)?\[?(#\w+)(?: \+ \$(0x[0-9a-f]+))?")
_INDEXED = re.compile(r"\[\w+:\[?(#?%?\w+)\]? \+ (%\w+)\]*")
_OPERAND = "operand "
_INTEGER: dict[str, Callable[[int, int], int]] = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "smulhi.u32": lambda a, b: (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF) >> 32,
    "srem.u32": lambda a, b: (a & 0xFFFFFFFF) % (b & 0xFFFFFFFF) if b else 0,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, b: a << (b & 31),
    "sshrl.u32": lambda a, b: (a & 0xFFFFFFFF) >> (b & 31),
    "sshra.s32": lambda a, b: a >> (b & 31),
    "smin.u32": lambda a, b: min(a & 0xFFFFFFFF, b & 0xFFFFFFFF),
    "smax.u32": lambda a, b: max(a & 0xFFFFFFFF, b & 0xFFFFFFFF),
}
_LOGIC: dict[str, Callable[[bool, bool], bool]] = {
    "por": lambda a, b: a or b,
    "pand": lambda a, b: a and b,
    "pxor": operator.ne,
    "pnor": lambda a, b: not (a or b),
    "pnand": lambda a, b: not (a and b),
}
_DECIDES = {"por": True, "pnor": True, "pand": False, "pnand": False}  # one such operand is enough


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a kernel's schedule on one TensorCore.

    Attributes:
      issued: `[bundles]`, how often each was issued.
      cycles: in all, stalls included.
      stalled: of those, cycles that waited for a DMA.
      read, written: bytes between HBM and the core, each way.
      transfers: DMAs to and from HBM.
      unknown: branches and DMAs whose predicate, and DMAs whose size, depends on data.
    """

    issued: np.ndarray
    cycles: float
    stalled: float
    read: int
    written: int
    transfers: int
    unknown: int


def simulate(
    bundles: Bundles,
    *,
    bytes_per_cycle: float,
    latency: float = 0.0,
    granule: int = 32,
    delay_slots: int = DELAY_SLOTS,
    scalars: Sequence[np.ndarray | None] = (),
    core: int = 0,
) -> Run:
    """Runs the scalar instructions of a schedule beside an HBM.

    Args:
      scalars: the kernel's operands; None for one that is not known, or is no integers.
      core: which of those that share the grid runs.
      bytes_per_cycle: that the HBM moves for this core.
      latency: cycles between the end of a transfer and the moment a wait for it may pass.
      granule: bytes in which DMA instructions count.
      delay_slots: bundles issued after a branch before it takes effect.

    Raises:
      ScheduleError: a loop whose end depends on data, a branch to a place that the dump does not name, or more than
        50 million bundles with scalar instructions.
    """
    it = _Core(bundles, bytes_per_cycle, latency, granule, delay_slots, scalars, core)
    it.run()
    return Run(np.cumsum(it.edges[:-1]), it.now, it.stalled, it.read, it.written, it.transfers, it.unknown)


class _Core:
    """The scalar unit: each instruction compiled to a function that reads and writes `values`."""

    def __init__(
        self, bundles: Bundles, bytes_per_cycle: float, latency: float, granule: int, delay_slots: int,
        scalars: Sequence[np.ndarray | None], core: int,
    ):  # fmt: skip
        self.regions, self.rate, self.latency, self.granule = bundles.regions, bytes_per_cycle, latency, granule
        self.delay_slots, self.scalars = delay_slots, scalars
        self.values: list[Value] = []
        self.defined: list[int] = []  # when each was, for phis
        self.popped: Counter[int] = Counter()  # of each division, how many instructions read it
        self.place: dict[str | int, int] = {}
        self.memory: dict[Value, Value] = {("#allocation0", 0): core}
        self.flags: dict[Value, list[float]] = defaultdict(list)  # when each DMA on a sync flag is done
        self.now = self.stalled = self.hbm_free = 0.0
        self.read = self.written = self.transfers = self.unknown = self.clock = 0
        self.size = n = len(bundles.instructions)
        self.leaving = False  # a branch was taken and has not yet taken effect: another one is nothing
        self.edges = np.zeros(n + 1, np.int64)  # issue counts, as differences
        self.steps = {at: [self._compile(i, at) for i in found] for at, found in enumerate(bundles.instructions) if found}
        busy = sorted(self.steps)
        self.next_busy = [*(busy[k] if k < len(busy) else n for k in np.searchsorted(busy, np.arange(n))), n]

    def run(self) -> None:
        counts: dict[tuple[int, int], int] = defaultdict(int)  # straight stretches, and how often each was issued
        start = pc = target = 0
        until = -1  # where a branch that was taken takes effect
        while pc < self.size:
            at = self.next_busy[pc]
            if 0 <= until <= at:
                counts[start, until] += 1
                self.now += until - pc
                start = pc = target
                until, self.leaving = -1, False
                continue
            self.now += at - pc
            if at == self.size:
                pc = at
                break
            self.now += 1
            self.clock += 1
            for step in self.steps[at]:
                taken = step()
                if taken is not None and until < 0:
                    until, target, self.leaving = at + 1 + self.delay_slots, taken, True
            pc = at + 1
            if self.clock > MOST:
                raise ScheduleError("A TPU schedule was run", f"It issues over {MOST} bundles of the scalar unit", "Use a smaller shape")
        counts[start, self.size] += 1
        for (first, last), times in counts.items():
            self.edges[first] += times
            self.edges[last] -= times

    # From instructions to functions ------------------------------------------------------------------------------

    def _at(self, operand: str | int) -> int:
        """Where the value of an operand lies; constants have places of their own."""
        key = operand.lstrip("!") if isinstance(operand, str) else operand
        if key not in self.place:
            value: Value = None
            if isinstance(key, int):
                value = key
            elif not key.startswith("%") and (m := _ADDRESS.match(key)):
                value = m[1], int(m[2] or "0", 16)
            self.place[key] = len(self.values)
            self.values.append(value)
            self.defined.append(-1)
        return self.place[key]

    def _compile(self, i: Instruction, at: int) -> Step:
        step = self._unconditional(i, at)
        if i.predicate is None:
            return step
        where, wanted, values, branch = self._at("%" + i.predicate[0]), i.predicate[1], self.values, i.op == "sbr.rel"
        moves, stores, compares = i.op.startswith("dma."), i.op == "sst", i.op.startswith("scmp.")
        changed = self._at(i.operands[0] if stores else "%" + i.result)

        def conditional() -> Any:
            holds = values[where]
            if holds == wanted:
                return step()
            if holds is not None:
                if compares:  # one that is not issued is false: on it, without that predicate, branches and waits rely
                    values[changed] = False
                return None
            self.unknown += moves
            if branch:
                return self._guess(i, at)
            step()
            if stores:
                self.memory[values[changed]] = None
            else:
                values[changed] = None  # it is this, or what it was before
            return None

        return conditional

    def _guess(self, i: Instruction, at: int) -> None:
        if self.leaving:
            return
        if self._target(i) <= at:
            found = f"Data decides when the loop that ends at bundle {at:#x} ends"
            advice = "Pass the integers that decide it as arrays (--args-from), which count as known, or fix the loop's length"
            raise ScheduleError("A TPU schedule was run", found, advice)
        self.unknown += 1

    def _target(self, i: Instruction) -> int:
        if not i.operands:
            raise ScheduleError("A TPU schedule was run", f"%{i.result} branches to a place that is not named", "Dump it again")
        # The dump names regions beside their first bundle; the one that has none is what comes after the last.
        return self.regions.get(int(i.operands[0]), self.size)

    def _unconditional(self, i: Instruction, at: int) -> Step:
        values, defined, op = self.values, self.defined, i.op
        if op == "sbr.rel":
            target = self._target(i)
            return lambda: target
        if op == "vdelay":
            return self._delay(i.operands[0] if i.operands and isinstance(i.operands[0], int) else 0)
        if op == "sld" and isinstance(i.operands[0], str) and (m := _INDEXED.fullmatch(i.operands[0])):
            return self._load(self._at(m[1] if m[1].startswith("%") else f"[{m[1]}]"), self._at(m[2]), self._at("%" + i.result))
        places = [self._at(o) for o in i.operands]
        if op.startswith("operand"):
            self.values[self._at("%" + i.result)] = self._operand(i.operands, handed=op == "operand")
            return lambda: None
        negated = [isinstance(o, str) and o.startswith("!") for o in i.operands]
        if op == "dma.done.wait":
            return lambda: self._wait(values[places[0]])
        if op.endswith("_to_smem"):
            return lambda: self._fill(*(values[p] for p in (places[0], *places[2:])))
        if op.startswith("dma."):
            return (lambda: self._transfer(op, values[places[0]], values[places[1]])) if "hbm" in op else lambda: None
        if op == "sst":
            return lambda: self.memory.__setitem__(values[places[0]], values[places[1]])
        compute = self._computation(op, places, negated)
        result = self._at("%" + i.result)

        def assign() -> None:
            values[result] = compute()
            defined[result] = self.clock

        return assign

    def _operand(self, index: tuple[Any, ...], handed: bool) -> Value:
        """An operand of the kernel: its address, or what it is where one integer is handed over in a register."""
        if not index:
            return None
        table = self.scalars[index[0]] if index[0] < len(self.scalars) else None
        return int(table.reshape(-1)[0]) if handed and table is not None and table.size == 1 else (f"{_OPERAND}{index[0]}", 0)

    def _fill(self, size: Value, source: Value, target: Value) -> None:
        """Integers come to scalar memory: a whole operand, or a block of it, of which nothing is known."""
        if type(target) is not tuple:
            return
        table = None
        if type(source) is tuple and str(source[0]).startswith(_OPERAND) and source[1] == 0:
            index = int(source[0].removeprefix(_OPERAND))
            table = self.scalars[index] if index < len(self.scalars) else None
        if table is not None and type(size) is int and size * self.granule >= table.nbytes:
            self.memory |= {(target[0], target[1] + place): word for place, word in _words(table)}
        else:
            self.memory = {at: word for at, word in self.memory.items() if at is None or at[0] != target[0]}

    def _load(self, base: int, index: int, result: int) -> Step:
        values, defined = self.values, self.defined

        def load() -> None:
            at, by = values[base], values[index]
            values[result] = self.memory.get((at[0], at[1] + by)) if type(at) is tuple and type(by) is int else None
            defined[result] = self.clock

        return load

    def _delay(self, cycles: int) -> Step:
        def delay() -> None:
            self.now += cycles

        return delay

    def _computation(self, op: str, places: list[int], negated: list[bool]) -> Callable[[], Value]:
        values, defined = self.values, self.defined
        if op == "sphi":  # of the ways that lead here, the one taken defined its value last
            return lambda: values[max(places, key=defined.__getitem__)]
        if op == "sld":
            return lambda: self.memory.get(values[places[0]])
        if op in ("smov", "scalar_select") and len(places) == 3:
            # `smov (%p, %a), b` is b where p holds; `scalar_select %p, %a, %b` is a.
            p, yes, no = (places[0], places[2], places[1]) if op == "smov" else (places[0], places[1], places[2])
            wanted = not negated[0]

            def choose() -> Value:
                holds = values[p]
                return None if holds is None else values[yes if holds == wanted else no]

            return choose
        if op == "spop.drf" and len(places) == 1:
            which = self.popped[places[0]] = self.popped[places[0]] + 1

            def pop() -> Value:
                found = values[places[0]]
                return found if type(found) is not list else found[which - 1] if which <= len(found) else None

            return pop
        if len(places) == 1 and (op == "smov" or op.startswith("int_to_ptr")):
            return lambda: values[places[0]]
        if op == "pmov" and len(places) == 1:
            return lambda: None if values[places[0]] is None else bool(values[places[0]]) != negated[0]
        if op == "pneg":
            return lambda: None if values[places[0]] is None else not values[places[0]]
        if len(places) != 2:
            return lambda: None
        a, b = places
        if op in _LOGIC:
            logic, decides = _LOGIC[op], _DECIDES.get(op)
            na, nb = negated

            def combine() -> Value:
                x, y = values[a], values[b]
                x, y = (x if x is None or not na else not x), (y if y is None or not nb else not y)
                if x is None or y is None:
                    return logic(decides, decides) if decides is not None and decides in (x, y) else None
                return logic(x, y)

            return combine
        if op.startswith("scalar_lea"):

            def offset() -> Value:
                base, by = values[a], values[b]
                return (base[0], base[1] + by) if type(base) is tuple and type(by) is int else None

            return offset
        if op.startswith("scmp."):
            kind, _, sort = op[5:].partition(".")
            test, mask = getattr(operator, kind), sort.startswith("u32")

            def compare() -> Value:
                x, y = values[a], values[b]
                if type(x) is not int or type(y) is not int:
                    return test(x, y) if x is not None and type(x) is type(y) and kind in ("eq", "ne") else None
                return test(x & 0xFFFFFFFF, y & 0xFFFFFFFF) if mask else test(x, y)

            return compare
        if op == "sdivrem.u32":  # the quotient is read first

            def divide() -> Value:
                x, y = values[a], values[b]
                return list(divmod(x & 0xFFFFFFFF, y & 0xFFFFFFFF)) if type(x) is type(y) is int and y else None

            return divide
        if op in _INTEGER:
            integer = _INTEGER[op]

            def arithmetic() -> Value:
                x, y = values[a], values[b]
                if type(x) is not int or type(y) is not int:
                    # An address of an operand in other units is still its address.
                    return x if op == "sshll.u32" and type(x) is tuple and str(x[0]).startswith(_OPERAND) else None
                n = integer(x, y) & 0xFFFFFFFF
                return n - (1 << 32) if n >> 31 else n

            return arithmetic
        return lambda: None

    # The HBM -----------------------------------------------------------------------------------------------------

    def _transfer(self, op: str, size: Value, flag: Value) -> None:
        if type(size) is not int:  # nobody knows what it takes, and the run says so
            self.unknown += 1
            return
        size *= self.granule
        if op.endswith("_to_hbm"):
            self.written += size
        else:
            self.read += size
        self.transfers += 1
        self.hbm_free = max(self.hbm_free, self.now) + size / self.rate
        self.flags[flag].append(self.hbm_free + self.latency)

    def _wait(self, flag: Value) -> None:
        if done := self.flags[flag]:
            ready = done.pop(0)
            self.stalled += max(0.0, ready - self.now)
            self.now = max(self.now, ready)


def _words(table: np.ndarray) -> Iterator[tuple[int, int]]:
    """Places and values of 32-bit words in scalar memory. A tile is 128 columns of 8 rows, of the next power of two where there are fewer,
    and one row of tiles follows the other. Of int8, a word is four rows, and one line of it lies there as four rows of 128.

    None of what has no such layout, which then counts as unknown.
    """
    if table.dtype.itemsize == 4:
        *lead, rows, columns = (1, 1, *table.shape)
        tile = min(8, 1 << (rows - 1).bit_length())
        tiles = np.zeros((int(np.prod(lead)), -(-rows // tile) * tile, -(-columns // 128) * 128), "<i4")
        tiles[:, :rows, :columns] = table.reshape(-1, rows, columns).view("<i4")
        yield from enumerate(tiles.reshape(-1, tile, tiles.shape[-1] // 128, 128).swapaxes(1, 2).reshape(-1).tolist())
    elif table.dtype.itemsize == 1 and table.ndim == 1:
        tiles = np.zeros(-(-table.size // 512) * 512, np.uint8)
        tiles[: table.size] = table.view(np.uint8)
        words = np.ascontiguousarray(tiles.reshape(-1, 4, 128).swapaxes(1, 2)).view("<i4")[..., 0]
        yield from enumerate(words.reshape(-1).tolist())
    elif table.dtype.itemsize == 1 and table.shape[-1] <= 128:
        *lead, rows, columns = table.shape
        tiles = np.zeros((int(np.prod(lead)), -(-rows // 8) * 8, columns), np.uint8)
        tiles[:, :rows] = table.reshape(-1, rows, columns).view(np.uint8)
        words = np.ascontiguousarray(tiles.reshape(-1, 4, columns).swapaxes(1, 2)).view("<i4")[..., 0]
        yield from ((n * 128 + c, word) for n, line in enumerate(words.tolist()) for c, word in enumerate(line))
