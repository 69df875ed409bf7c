"""Measurements: kept by key, best of several kernels, and moved between machines without being believed at once."""

import dataclasses
import json
import math

import pytest

from kpt.errors import StoreError
from kpt.ops.base import Spec
from kpt.ops.mask import Causal, Mask, Segments
from kpt.store import Store
from kpt.tuning import Key, Measurement, Measurements, bucket, export_json, import_json, measurements

KEY = Key("attention.xla", 2, "h100-sxm", "570.1", "jax 0.11.2", "bfloat16", "k[4,4096] q[4,4096]", "causal")
FAST = dataclasses.replace(KEY, kernel="attention.gpu", version=1)


def of(key=KEY, seconds=1e-3, **config):
    return Measurement(key, seconds, seconds * 0.9, seconds * 1.1, 20, config)


@pytest.fixture
def table(tmp_path):
    return Measurements(tmp_path / "here")


@pytest.mark.parametrize(
    ("specs", "params", "expected"),
    [
        ({"a": Spec((3, 4096), "bfloat16"), "b": Spec((4096, 5000), "int8")}, {}, "bfloat16 a[4,4096] b[4096,8192]"),
        ({"x": Spec((0, 1), "float32")}, {"eps": 1e-6}, "float32 x[1,1]"),
        ({"q": Spec((7,), "float32")}, {"mask": Mask((Segments(), Causal(3)))}, "float32 q[8] causal segments"),
    ],
)  # fmt: skip
def test_a_bucket_is_dtype_powers_of_two_and_kinds_of_masks(specs, params, expected):
    assert str(bucket(specs, params)) == expected


def test_what_is_put_comes_back_the_fastest_first(table):
    slow, fast = of(seconds=2e-3, block_q=64), of(seconds=1e-3, block_q=128, split=[1, 2])
    table.put(slow, fast)
    assert Measurements(table.store.path.parent).get(KEY) == [fast, slow]
    assert table.get(FAST) == []


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Key)])
def test_every_part_of_the_key_counts(table, field):
    table.put(of())
    other = {"version": 3, "passes": "forward and backward"}.get(field, "other")
    assert table.get(dataclasses.replace(KEY, **{field: other})) == []


def test_a_later_measurement_takes_the_place_of_an_earlier_one(table):
    table.put(of(seconds=2e-3, block_q=64))
    table.put(of(seconds=3e-3, block_q=64))
    assert [m.seconds for m in table.get(KEY)] == [3e-3]


def test_the_best_of_several_kernels(table):
    table.put(of(seconds=2e-3), of(FAST, 1e-3), of(FAST, 3e-3, block=1))
    assert table.best(KEY, FAST) == table.get(FAST)[0]
    assert table.best(KEY).seconds == 2e-3
    assert table.best() is table.best(dataclasses.replace(KEY, chip="cpu")) is None


def test_a_measurement_from_samples_has_their_median_and_quartiles():
    made = Measurement.of(KEY, [5.0, 1.0, 2.0, 4.0, 3.0])
    assert (made.low, made.seconds, made.high, made.samples) == (2.0, 3.0, 4.0, 5)
    assert Measurement.of(KEY, [2.0]).low == 2.0


@pytest.mark.parametrize(
    ("seconds", "low", "high", "samples"),
    [(0.0, 0.0, 1.0, 3), (1.0, 2.0, 3.0, 3), (1.0, 0.5, math.inf, 3), (math.nan, 1.0, 1.0, 3), (1.0, 1.0, 1.0, 0)],
)
def test_figures_that_cannot_be_are_refused(seconds, low, high, samples):
    with pytest.raises(StoreError):
        Measurement(KEY, seconds, low, high, samples)


@pytest.fixture
def there(tmp_path):
    """Another machine's table: two kernels at ten calls of one environment, of which the same one wins always, and at one of another."""
    made = Measurements(tmp_path / "there")
    for i in range(10):
        call = {"shape": f"x[{2**i}]"}
        made.put(of(dataclasses.replace(KEY, **call), 2e-3 * (i + 1)), of(dataclasses.replace(FAST, **call), 1e-3 * (i + 1)))
    made.put(of(dataclasses.replace(KEY, chip="a100")), of(dataclasses.replace(FAST, chip="a100"), 5e-4))
    return made


ROUNDS = 21


def machine(times, chip="h100-sxm", measurable=lambda contest: True, noise=0.0):
    """What measures again, on a clock that says whatever it is told: `times(contest)` is the seconds that each kernel takes."""
    asked = []

    def again(environment, contests, count):
        if environment[0] != chip:
            return "this machine is another"
        chosen = [c for c in contests if measurable(c)][:count]
        asked.extend(chosen)
        rounds = [1 + noise * math.cos(i * i) for i in range(ROUNDS)]
        return [(c, {n: [s * r for r in rounds] for n, s in times(c).items()}) for c in chosen]

    again.asked = asked
    return again


def as_there(contest, **factors):
    """The seconds that the import says, each kernel's times its factor: xla=, gpu=."""
    return {m.key.kernel: m.seconds * factors.get(m.key.kernel.rpartition(".")[2], 1.0) for m in contest}


def test_an_import_is_kept_with_its_provenance_and_not_believed(table, there):
    told = import_json(table, export_json(there))
    assert (told.rows, told.added, told.verified) == (22, 22, 0)
    assert told.notes[1] == "20 measurements of h100-sxm, 570.1, jax 0.11.2: kept, not verified and not used; nothing was measured again."
    row = table.all()[0]
    assert not row.verified and row.origin == told.origin and "exported 20" in told.origin and "by kpt" in told.origin
    assert table.best(row.key) is None
    assert [dataclasses.replace(m, origin="", verified=True) for m in table.all()] == there.all()


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_a_sample_with_the_same_winners_verifies_the_rows_of_its_environment_and_no_others(table, there, slower):
    """Clocks may differ; who wins may not."""
    again = machine(lambda c: as_there(c, xla=slower, gpu=slower))
    told = import_json(table, export_json(there), again)
    assert (len(again.asked), told.verified) == (5, 20)
    assert told.notes == (
        "2 measurements of a100, 570.1, jax 0.11.2: kept, not verified and not used; this machine is another.",
        "20 measurements of h100-sxm, 570.1, jax 0.11.2: used; 5 of 10 calls were measured again here, with the same winner.",
    )
    assert {m.key.chip for m in table.all() if m.verified} == {"h100-sxm"}
    (first, *_) = again.asked
    assert table.best(*(m.key for m in first)).key.kernel == "attention.gpu"


@pytest.mark.parametrize("seed", range(3))
def test_one_call_with_another_winner_leaves_all_rows_unverified(table, there, seed):
    turns = iter([1.0, 1.0, 3.0, 1.0, 1.0])
    told = import_json(table, export_json(there), machine(lambda c: as_there(c, gpu=next(turns)), noise=0.05), seed)
    assert told.verified == 0 and "attention.gpu won there, and attention.xla is 1.50x faster here." in told.notes[1]
    assert table.best(KEY, FAST) is None


@pytest.mark.parametrize(
    ("gpu", "noise", "verified"),
    [(2.1, 0.0, 20), (2.3, 0.0, 20), (2.6, 0.0, 0)],  # the rows' quartiles are 10% from their medians: that is their noise
)
def test_a_winner_that_loses_within_the_noise_of_both_is_no_disagreement(table, there, gpu, noise, verified):
    told = import_json(table, export_json(there), machine(lambda c: as_there(c, gpu=gpu), noise=noise))
    assert told.verified == verified


def test_noise_here_counts_too(table, tmp_path):
    other = Measurements(tmp_path / "there")
    other.put(Measurement(KEY, 2e-3, 2e-3, 2e-3, 20), Measurement(FAST, 1e-3, 1e-3, 1e-3, 20))  # without noise there
    wild = [0.3 if i % 2 else 1.7 for i in range(ROUNDS)]

    def again(environment, contests, count):
        # The loser's rounds scatter widely around 10% less than the winner's.
        return [(c, {"attention.gpu": [1.0] * ROUNDS, "attention.xla": [0.9 * w for w in wild]}) for c in contests]

    assert import_json(table, export_json(other), again).verified == 2
    steady = lambda *_: [(c, {"attention.gpu": [1.0] * ROUNDS, "attention.xla": [0.9] * ROUNDS}) for c in _[1]]  # noqa: E731
    assert "won there" in import_json(Measurements(tmp_path / "third"), export_json(other), steady).notes[0]


def test_too_few_calls_that_can_be_measured_here_verify_nothing(table, there):
    again = machine(as_there, measurable=lambda c: c[0].seconds < 5e-3)
    told = import_json(table, export_json(there), again)
    assert told.verified == 0 and "5 of 10 calls were to be measured again, and 4 could be" in told.notes[1]


def test_rows_of_one_kernel_alone_say_nothing_of_who_wins(table, tmp_path):
    alone = Measurements(tmp_path / "there")
    alone.put(of(), of(FAST_ELSEWHERE))
    told = import_json(table, export_json(alone), machine(as_there))
    assert told.verified == 0 and "nothing to choose by them" in told.notes[0]


FAST_ELSEWHERE = dataclasses.replace(FAST, shape="x[8]")


def test_an_import_can_be_verified_later(table, there):
    text = export_json(there)
    assert import_json(table, text).verified == 0
    again = import_json(table, text, machine(as_there))
    assert (again.added, again.verified) == (0, 20)


def test_what_was_measured_here_outlives_an_import_and_replaces_it(table, there):
    mine = of(dataclasses.replace(KEY, shape="x[1]"), 7e-3)
    table.put(mine)
    import_json(table, export_json(there))
    assert table.get(mine.key) == [mine]
    replaced = of(dataclasses.replace(KEY, shape="x[2]"), 8e-3)
    table.put(replaced)
    assert table.get(replaced.key) == [replaced]


def test_an_import_is_not_exported_again(table, there):
    table.put(of(FAST))
    import_json(table, export_json(there))
    assert [r["kernel"] for r in json.loads(export_json(table))["rows"]] == ["attention.gpu"]


def test_a_file_of_the_first_version_keeps_its_rows(table, monkeypatch):
    first = dataclasses.replace(measurements.SCHEMA, steps=measurements.SCHEMA.steps[:1])
    row = of(block_q=64)
    figures = (row.seconds, row.low, row.high, row.samples, row.measured, row.kpt, "", 1)
    Store(table.store.path, first).write(
        lambda c: c.execute(f"INSERT INTO measurement VALUES ({', '.join('?' * 18)})", (*dataclasses.astuple(KEY), '{"block_q": 64}', *figures))
    )
    assert table.all() == [row] and not table.all()[0].call


def test_the_call_that_was_measured_travels(table, there):
    row = dataclasses.replace(of(), call={"op": "rms_norm", "specs": {"x": {"$spec": [[4, 8], "float32"]}}, "params": {"eps": 1e-6}})
    there.put(row)
    import_json(table, export_json(there))
    assert table.get(KEY)[0].call == row.call


def edited(**changes):
    return lambda data: data | changes


def row_edited(**changes):
    return lambda data: data | {"rows": [data["rows"][0] | changes, *data["rows"][1:]]}


@pytest.mark.parametrize(
    "edit",
    [edited(kind="kpt.plan"), edited(format=2), edited(rows=3), edited(rows=[{}]), lambda d: [d], lambda d: {},
     row_edited(seconds=-1.0), row_edited(seconds="fast"), row_edited(kernel=3), row_edited(passes="both"), row_edited(measured="then"),
     row_edited(config=3), row_edited(call=3), row_edited(version=float("inf")), row_edited(samples=10**30), row_edited(kernel="\ud800"),
     edited(machine="\ud800")],
)  # fmt: skip
def test_what_is_no_export_is_refused_as_a_whole(table, there, edit):
    with pytest.raises(StoreError):
        import_json(table, json.dumps(edit(json.loads(export_json(there)))))
    with pytest.raises(StoreError):
        import_json(table, export_json(there)[:-40])
    assert table.all() == []
