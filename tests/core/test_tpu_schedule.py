"""Reading and running a TPU schedule, on a program written by hand in the compiler's notation."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kpt.errors import HardwareError
from kpt.tpu import GENERATIONS, ScheduleError, chart, generation, plot, schedule
from kpt.tpu.bundles import parse
from kpt.tpu.simulate import _words, simulate

# Five grid steps. Each fetches 64 granules and waits; step 2 skips region 3; the last bundle of the loop is its branch's fourth
# delay slot. Operands sit in their own bundle (sphi) and in memory (a spill), numbers are unsigned, comments have line breaks.
PROGRAM = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov 0  ;;  %7 = vsyncpa [#allocation1], 0  ;;  %p9_p9 = pmov 0 } /* Start region 1 */
   0x1 LB: > { %s9_s3 = sadd.s32 4294967295, %s2_s0  ;;  %s2_s0 = sphi %s1_s0, %s8_s0 /* iteration index */  ;;  %s5_s5 = scalar_lea.sflag [#allocation1], %s2_s0 } /* Start region 2 */
   0x2   : > { %20 = dma.hbm_to_vmem [thread:$0]  (!%p9_p9), /*hbm=*/%s7_s7, /*size_in_granules=*/64, /*vmem=*/%s6_s6, /*dst_syncflagno=*/%s5_s5, /*src_stride=*/%s4_s4 /* %1 = "x"
minor: 1 */ }
   0x3   : > { %30 = dma.done.wait %s5_s5, 64 /* wait */  ;;  %31 = sst [smem:[#allocation9_spill]] %s2_s0 }
   0x4   : > { %p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2  ;;  %v3_v0 = vadd.f32 %v1_v1, %v2_v2 }
   0x5   : > { %40 = sbr.rel (%p1_p1) target = $region3 }
   0x6   : > { %s6_s6 = smov (%p1_p1, %s2_s0), 7  ;;  %s7_s7 = scalar_select %p1_p1, 1, 2 }
   0x7   : > {}
   0x8   : > {}
   0x9   : > {}
   0xa   : > { %v4_v0 = vld [vmem:[%s6_s6] sm:$0xff] }
   0xb   : > { %v5_v0 = vld [vmem:[%s6_s6] sm:$0xff] }
   0xc PF: > { %s7_s1 = sld [smem:[#allocation9_spill]] } /* Start/End empty region 3 */
   0xd   : > { %s8_s0 = sadd.s32 1, %s7_s1 }
   0xe   : > { %p2_p0 = scmp.ge.s32.totalorder %s8_s0, 5 /* loop exit test */ }
   0xf   : > { %50 = sbr.rel (!%p2_p0) target = $region2 }
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  {}
  0x14   :  { %60 = vsyncpa [#allocation1], 1 } /* exit bundle */
"""
SLOTS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"


def utilization(bundles=21, loads=(10, 11)):
    rows = ["0 0 0 0 0 1 0 0 0 0" if i in loads else "1 0 0 0 0 0 0 0 0 2" for i in range(bundles)]
    return f"== CAPACTIY:\n{SLOTS}\n    4     3     4     2     1     3     3     1     1     2\n== UTILIZATION:\n" + "\n".join(rows)


def test_what_is_read():
    program = parse(PROGRAM, utilization())
    assert len(program.instructions) == 21
    assert program.regions == {1: 0, 2: 1, 3: 12}
    (dma,) = (i for i in program.instructions[2] if i.op == "dma.hbm_to_vmem")
    assert dma.operands == (64, "%s5_s5") and dma.predicate == ("p9_p9", False)
    assert [i.op for i in program.instructions[1]] == ["sphi", "sadd.s32", "scalar_lea.sflag"]
    assert program.instructions[1][1].operands[0] == -1
    assert program.instructions[4] == (program.instructions[4][0],)  # the vector unit's are left out


def test_every_bundle_is_counted():
    run = simulate(parse(PROGRAM, utilization()), bytes_per_cycle=1e9)
    assert run.issued.tolist() == [1, *[5] * 9, 4, 4, *[5] * 8, 1]
    assert run.cycles == run.issued.sum() and run.stalled < 1
    assert (run.read, run.written, run.transfers, run.unknown) == (5 * 64 * 32, 0, 5, 0)


def test_delay_slots_are_issued_whether_the_branch_is_taken_or_not():
    """Of six, the bundles that step 2 skips behind four are the last two."""
    program = PROGRAM.replace("  0x14   :  {", "  0x14   :  {}\n  0x15   :  {}\n  0x16   :  {")
    run = simulate(parse(program, utilization(23)), bytes_per_cycle=1e9, delay_slots=6)
    assert run.issued.tolist() == [1, *[5] * 21, 1]


def test_a_branch_to_what_the_dump_has_no_bundle_for_ends_the_kernel():
    run = simulate(parse(PROGRAM.replace("$region3", "$region77"), utilization()), bytes_per_cycle=1e9)
    assert run.issued.tolist() == [1, *[3] * 9, 2, 2, *[2] * 8, 0]


@pytest.mark.parametrize("constant, steps", [(1, 1), (0, 5)])
def test_a_predicate_that_is_a_constant(constant, steps):
    program = PROGRAM.replace("%p2_p0 = scmp.ge.s32.totalorder %s8_s0, 5", f"%p3_p0 = scmp.ge.s32.totalorder %s8_s0, 5  ;;  %p4_p1 = pmov {constant}"
                              "  ;;  %p2_p0 = por %p3_p0, %p4_p1")  # fmt: skip
    assert simulate(parse(program, utilization()), bytes_per_cycle=1e9).issued[1] == steps


def test_a_wait_lasts_until_its_transfer_is_done():
    swift = simulate(parse(PROGRAM, utilization()), bytes_per_cycle=1e9)
    slow = simulate(parse(PROGRAM, utilization()), bytes_per_cycle=64.0, latency=100.0)
    assert slow.stalled > 5 * 100 and slow.cycles == pytest.approx(swift.cycles - swift.stalled + slow.stalled)


def test_a_branch_on_data_counts_what_it_may_skip():
    run = simulate(parse(PROGRAM.replace("scmp.eq.s32.totalorder %s2_s0, 2", "scmp.eq.s32.totalorder %s99_s9, 2"), utilization()), bytes_per_cycle=1e9)
    assert run.issued[10] == 5 and run.unknown == 5


def test_integers_in_scalar_memory_are_known_where_they_are_given():
    program = PROGRAM.replace(
        "%s1_s0 = smov 0  ;;", "%s1_s0 = smov 0  ;;  %s60_s1 = inlined_call_operand.hbm [shape: s32[5], index: 1, kind: input]  ;;  %s61_s1 = sshll.u32 %s60_s1, 4  ;;"
        "  %62 = dma.hbm_to_smem /*hbm=*/%s61_s1, /*size_in_granules=*/16, /*smem=*/[#allocation5], /*dst_syncflagno=*/[#allocation8]  ;;",
    ).replace("%p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2", "%s63_s1 = sld [smem:[#allocation5 + %s2_s0]]  ;;  %p1_p1 = scmp.eq.s32.totalorder %s63_s1, 2")  # fmt: skip
    bundles = parse(program, utilization())
    skips = np.array([2, 0, 2, 2, 0], np.int32)
    run = simulate(bundles, bytes_per_cycle=1e9, scalars=[None, skips])
    assert run.issued[10] == 2 and run.unknown == 0
    for scalars in [], [skips, None], [None, np.zeros(5, np.int64)], [None, np.zeros(200, np.int32)]:
        run = simulate(bundles, bytes_per_cycle=1e9, scalars=scalars)
        assert run.issued[10] == 5 and run.unknown == 5  # the last is a block of what is more


@pytest.mark.parametrize("rows, tile", [(1, 1), (2, 2), (3, 4), (5, 8), (9, 8)])
def test_rows_of_integers_lie_in_tiles(rows, tile):
    """As libtpu addresses an s32[rows, 300] in scalar memory: tiles of 128 columns of so many rows, three tiles side by side."""
    table = np.arange(rows * 300, dtype=np.int32).reshape(rows, 300)
    words = dict(_words(table))
    for r, c in np.ndindex(rows, 300):
        assert words[((r // tile) * 3 + c // 128) * tile * 128 + (r % tile) * 128 + c % 128] == table[r, c]


def test_bytes_share_a_word_with_those_of_the_next_three_rows():
    table = np.arange(-3, 12, dtype=np.int8).reshape(5, 3)
    words = dict(_words(table))
    for r, c in np.ndindex(5, 3):
        assert (words[(r // 4) * 128 + c] >> 8 * (r % 4)) & 0xFF == int(table[r, c]) & 0xFF


@pytest.mark.parametrize("change, says", [
    (("%s8_s0, 5", "%s99_s9, 5"), "Data decides when the loop"),
    (("target = $region2", "target = %s1_s1"), "a place that is not named"),
    (("   0x3 ", "   0x4 "), "numbered"),
])  # fmt: skip
def test_what_cannot_be_run(change, says):
    with pytest.raises(ScheduleError, match=says):
        simulate(parse(PROGRAM.replace(*change), utilization()), bytes_per_cycle=1.0)


@pytest.mark.parametrize("bundles, use", [("", utilization()), (PROGRAM, utilization(20)), (PROGRAM, "nothing")])
def test_what_cannot_be_read(bundles, use):
    with pytest.raises(ScheduleError):
        parse(bundles, use)


def test_a_schedule():
    made = schedule("kernel.1", generation("v5e"), PROGRAM, utilization(), vmem=4096)
    assert made.cores == 1 and made.bundles == 21 and made.vmem == 4096 and made.spills == 0
    assert made.seconds == pytest.approx(made.cycles / 1.5e9, rel=0.01)
    assert made.bound == "DMA latency" and 0 < made.stalled < made.cycles
    assert made.occupancy["load"] == pytest.approx(8 / (3 * made.cycles))
    assert sum(s.bundles for s in made.stretches) == 21
    assert sum(s.bundles * s.issued for s in made.stretches) == pytest.approx(made.cycles - made.stalled)
    assert "bundle" in chart(made) and made.to_json()["kernel"] == "kernel.1"


def test_levels_of_loops_join_what_runs_equally_often():
    made = schedule("kernel.1", generation("v5e"), PROGRAM, utilization())
    # The loop of five steps, around what the third of them skips.
    assert [(level.start, level.bundles, level.issued) for level in made.loops] == [(0, 1, 1), (1, 9, 5), (10, 2, 4), (12, 8, 5), (20, 1, 1)]
    loads = sum(level.occupancy["load"] * level.bundles * level.issued for level in made.loops)
    assert loads == pytest.approx(sum(s.occupancy["load"] * s.bundles * s.issued for s in made.stretches))


def test_a_kernel_that_asks_for_its_core_shares_the_chip():
    asks = PROGRAM.replace("%s1_s0 = smov 0 ", "%s1_s0 = smov 0  ;;  %s70_s9 = sld [smem:[#allocation0]] ")
    assert [schedule("k", generation(g), asks, utilization()).cores for g in ("v4", "v5e", "v5p", "v7x")] == [2, 1, 2, 1]


def test_a_core_that_is_sent_to_the_end_shares_nothing():
    """As libtpu compiles a grid that it does not split: whoever is not core 0 branches over all of it."""
    entry = ("%s70_s9 = sld [smem:[#allocation0]]  ;;  %p70_p0 = scmp.ne.s32.totalorder %s70_s9, 0  ;;  "
             "%71 = sbr.rel (%p70_p0) target = $region77  ;;  ")  # fmt: skip
    slots = "".join(f"  {n:#x}   :  {{}}\n" for n in range(1, 5))
    body = re.sub(r"^( *)(?:0x)?([0-9a-f]+)( .*?:)", lambda m: f"{m[1]}{int(m[2], 16) + 5:#x}{m[3]}", PROGRAM, flags=re.MULTILINE)
    whole = body.replace("     0x5   :", "     0   :  { " + entry.removesuffix("  ;;  ") + " }\n" + slots + "     0x5   :")
    made = schedule("k", generation("v5p"), whole, utilization(26, loads=(15, 16)))
    split = schedule("k", generation("v5p"), PROGRAM.replace("%s1_s0 = smov 0 ", "%s1_s0 = smov 0  ;;  %s70_s9 = sld [smem:[#allocation0]] "), utilization())
    assert (made.cores, split.cores) == (1, 2) and made.read == split.read
    assert made.stalled < split.stalled  # it has the HBM for itself


@pytest.mark.parametrize("instruction", ["%s8_s0 = smov (%p8_p8), 7", "%s8_s0 = sld [smem:[#allocation9_spill]]"])
def test_what_may_have_been_assigned_is_not_known(instruction):
    """A predicate that depends on data: whether %s8 is 7 or what it was, the branch on it depends on data too."""
    maybe = instruction if "(" in instruction else instruction.replace("sld ", "sld (%p8_p8), ")
    program = PROGRAM.replace("%p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2", f"%p8_p8 = scmp.eq.s32.totalorder %s99_s9, 2  ;;  {maybe.replace('%s8_s0', '%s80_s0')}"
                              "  ;;  %p1_p1 = scmp.eq.s32.totalorder %s80_s0, 2")  # fmt: skip
    run = simulate(parse(program, utilization()), bytes_per_cycle=1e9)
    assert run.unknown == 5 and run.issued[10] == 5


@pytest.mark.parametrize("decides, skips, unknown", [("%s99_s9, 2", 0, 5), ("%s2_s0, 77", 1, 0), ("%s2_s0, %s2_s0", 0, 0)])
def test_a_store_that_a_predicate_decides(decides, skips, unknown):
    """The iteration is stored, and then 7 where the predicate holds: by data, never, always. Iteration 2 skips."""
    program = PROGRAM.replace("%p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2", f"%p8_p8 = scmp.eq.s32.totalorder {decides}"
                              "  ;;  %82 = sst [smem:[#allocation8]] %s2_s0  ;;  %81 = sst [smem:[#allocation8]] (%p8_p8), 7"
                              "  ;;  %s80_s0 = sld [smem:[#allocation8]]  ;;  %p1_p1 = scmp.eq.s32.totalorder %s80_s0, 2")  # fmt: skip
    run = simulate(parse(program, utilization()), bytes_per_cycle=1e9)
    assert (5 - run.issued[10], run.unknown) == (skips, unknown)


def test_waits_that_the_mxus_fill_are_no_stalls():
    """2,000 products in a step of four cycles each, more than the waits last: the MXUs are busy all the time."""
    products = "  ;;  ".join(f"%{900 + i} = vmatmul.mubr.bf16.gmra.mxu0 %v1_v1" for i in range(2000))
    made = schedule("k", generation("v5e"), PROGRAM.replace("{ %30 = dma.done.wait", f"{{ {products}  ;;  %30 = dma.done.wait"), utilization())
    few = schedule("k", generation("v5e"), PROGRAM, utilization())
    assert few.bound == "DMA latency" and few.stalled > 0.2 * few.cycles
    assert made.bound == "MXU" and made.occupancy["MXU"] == 1 and made.stalled == 0


def test_clocks():
    assert {n: round(g.clock / 1e9, 2) for n, g in GENERATIONS.items()} == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "v7x": 2.2}
    for name in "v8", "h100", "":
        with pytest.raises(HardwareError, match="v4, v5e, v5p, v6e, v7x"):
            generation(name)


@pytest.mark.parametrize("name", ["v5e", "V5E", "tpu-v5e", "TPU_v5e", " v5e ", "v5litepod"])
def test_a_generation_has_the_names_of_its_profile(name):
    assert generation(name).name == "v5e"


def test_an_mxu_is_never_more_than_busy():
    """Three products of four cycles each keep it busy for twelve bundles, of those that are issued as often."""
    products = "  ;;  ".join(f"%{90 + i} = vmatmul.mubr.bf16.gmra.mxu0 %v1_v1" for i in range(3))
    made = schedule("k", generation("v5e"), PROGRAM.replace("{ %30 = dma.done.wait", f"{{ {products}  ;;  %30 = dma.done.wait"), utilization())
    busy = {s.start: s.occupancy["MXU"] for s in made.stretches}
    assert [busy[b] for b in range(1, 12)] == [0, 0, *[1] * 7, 0, 0]
    assert all(share <= 1 for s in made.stretches for share in s.occupancy.values())


@pytest.mark.parametrize("name, starts", [("units.svg", b"<svg"), ("units.png", b"\x89PNG")])
def test_a_plot_says_what_it_shows(tmp_path, name, starts):
    if name.endswith("png"):
        pytest.importorskip("matplotlib")
    made = schedule("kernel.1", generation("v5e"), PROGRAM, utilization())
    plot(made, tmp_path / name)
    written = (tmp_path / name).read_bytes()
    assert written.startswith(starts)
    if name.endswith("svg"):
        shown = {element.text for element in ET.fromstring(written).iter("{http://www.w3.org/2000/svg}text")}
        fullest = sorted(made.occupancy, key=lambda unit: -made.occupancy[unit])
        assert set(fullest[:3]) <= shown and fullest[3] not in shown and any("kernel.1 on TPU v5e" in text for text in shown) and any("%" in text for text in shown)


def test_a_transfer_that_depends_on_data_is_counted_as_unknown():
    honest = simulate(parse(PROGRAM, utilization()), bytes_per_cycle=1e9)
    unsized = PROGRAM.replace("/*size_in_granules=*/64", "/*size_in_granules=*/%s99_s9")
    found = simulate(parse(unsized, utilization()), bytes_per_cycle=1e9)
    assert found.unknown == 5 and found.read == 0 and honest.unknown == 0
    on_data = PROGRAM.replace("%p9_p9 = pmov 0", "%p9_p9 = scmp.eq.s32.totalorder %s99_s9, 2")
    assert simulate(parse(on_data, utilization()), bytes_per_cycle=1e9).unknown == 5


def test_what_remains_of_a_division_is_known():
    """On a v7x: the iteration modulo 3, through a queue. Iteration 2 skips."""
    program = PROGRAM.replace("%p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2", "%363 = sdivrem.u32 %s2_s0, 3 /* kRem */  ;;  %s80_s0 = spop.drf %363"
                              "  ;;  %p1_p1 = scmp.eq.s32.totalorder %s80_s0, 2")  # fmt: skip
    run = simulate(parse(program, utilization()), bytes_per_cycle=1e9)
    assert run.issued[10] == 4 and run.unknown == 0
    other = simulate(parse(program.replace("kRem", "kOther"), utilization()), bytes_per_cycle=1e9)
    assert other.issued[10] == 5 and other.unknown == 5


@pytest.mark.parametrize("read, wanted, issued", [(79, 1, 3), (80, 2, 4), (80, 0, 3)])
def test_a_quotient_and_its_remainder_come_through_one_queue(read, wanted, issued):
    """On a v5e, of five iterations: the quotient by 3 comes first (0 0 0 1 1), then the remainder (0 1 2 0 1)."""
    program = PROGRAM.replace("%p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2", "%363 = sdivrem.u32 %s2_s0, 3 /* kDivAndRem */  ;;  %s79_s0 = spop.drf %363"
                              f"  ;;  %s80_s0 = spop.drf %363  ;;  %p1_p1 = scmp.eq.s32.totalorder %s{read}_s0, {wanted}")  # fmt: skip
    run = simulate(parse(program, utilization()), bytes_per_cycle=1e9)
    assert run.issued[10] == issued and run.unknown == 0


def test_a_branch_on_data_behind_one_that_is_taken_is_nothing():
    """In its delay slots: whatever its predicate, which was not computed, it does not count."""
    program = PROGRAM.replace("   0x7   : > {}", "   0x7   : > { %41 = sbr.rel (%p98_p9) target = $region3 }")
    always = program.replace("scmp.eq.s32.totalorder %s2_s0, 2", "scmp.eq.s32.totalorder %s2_s0, %s2_s0")
    assert simulate(parse(always, utilization()), bytes_per_cycle=1e9).unknown == 0
    assert simulate(parse(program, utilization()), bytes_per_cycle=1e9).unknown == 4


def test_a_comparison_that_is_not_issued_is_false():
    program = PROGRAM.replace("%p1_p1 = scmp.eq.s32.totalorder %s2_s0, 2", "%p8_p8 = pmov 0  ;;  %p1_p1 = scmp.eq.s32.totalorder (%p8_p8), %s2_s0, 2")
    run = simulate(parse(program, utilization()), bytes_per_cycle=1e9)
    assert run.issued[10] == 5 and run.unknown == 0


def test_numbers_in_hexadecimal():
    program = parse(PROGRAM.replace("%s2_s0, 2", "%s2_s0, 0x2"), utilization())
    assert program.instructions[4][0].operands == ("%s2_s0", 2)
