"""Measurements: kept by key, best of several kernels, and moved between machines without being believed at once."""

import dataclasses
import json
import math

import pytest

from kpt.errors import StoreError
from kpt.ops.base import Spec
from kpt.ops.mask import Causal, Mask, Segments
from kpt.tuning import Key, Measurement, Measurements, bucket, export_json, import_json

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
    """Another machine's table: ten rows of one environment, one of another."""
    made = Measurements(tmp_path / "there")
    made.put(*(of(dataclasses.replace(KEY, shape=f"x[{2**i}]"), 1e-3 * (i + 1), block=i) for i in range(10)))
    made.put(of(dataclasses.replace(KEY, chip="a100")))
    return made


def test_an_import_is_kept_with_its_provenance_and_not_believed(table, there):
    told = import_json(table, export_json(there))
    assert (told.rows, told.added, told.verified, told.disagreements) == (11, 11, 0, ())
    row = table.all()[0]
    assert not row.verified and row.origin == told.origin and "exported 20" in told.origin and "by kpt" in told.origin
    assert table.best(row.key) is None
    assert [dataclasses.replace(m, origin="", verified=True) for m in table.all()] == there.all()


def test_a_sample_that_agrees_verifies_the_rows_of_its_environment_and_no_others(table, there):
    asked = []

    def measure_again(m):
        if m.key.chip != "h100-sxm":
            return None
        asked.append(m)
        return m.seconds * 1.2

    told = import_json(table, export_json(there), measure_again)
    assert (len(asked), told.verified, told.disagreements) == (5, 10, ())
    assert {m.key.chip for m in table.all() if m.verified} == {"h100-sxm"}
    assert table.best(asked[0].key) == dataclasses.replace(asked[0], verified=True)


@pytest.mark.parametrize("factor", [0.5, 1.3])
def test_one_disagreement_leaves_all_rows_unverified(table, there, factor):
    answers = iter([1.0, 1.0, factor, 1.0, 1.0])
    with pytest.warns(UserWarning, match="by the import"):
        told = import_json(table, export_json(there), lambda m: m.seconds * next(answers) if m.key.chip == "h100-sxm" else None)
    assert told.verified == 0 and len(told.disagreements) == 1


def test_too_few_rows_that_can_be_measured_here_verify_nothing(table, there):
    told = import_json(table, export_json(there), lambda m: m.seconds if m.config.get("block", 9) < 4 else None)
    assert told.verified == 0


def test_an_import_can_be_verified_later(table, there):
    text = export_json(there)
    assert import_json(table, text).verified == 0
    again = import_json(table, text, lambda m: m.seconds)
    assert (again.added, again.verified) == (0, 11)


def test_what_was_measured_here_outlives_an_import_and_replaces_it(table, there):
    mine = of(dataclasses.replace(KEY, shape="x[1]"), 7e-3, block=0)
    table.put(mine)
    import_json(table, export_json(there))
    assert table.get(mine.key) == [mine]
    replaced = of(dataclasses.replace(KEY, shape="x[2]"), 8e-3, block=1)
    table.put(replaced)
    assert table.get(replaced.key) == [replaced]


def test_an_import_is_not_exported_again(table, there):
    table.put(of(FAST))
    import_json(table, export_json(there))
    assert [r["kernel"] for r in json.loads(export_json(table))["rows"]] == ["attention.gpu"]


def edited(**changes):
    return lambda data: data | changes


def row_edited(**changes):
    return lambda data: data | {"rows": [data["rows"][0] | changes, *data["rows"][1:]]}


@pytest.mark.parametrize(
    "edit",
    [edited(kind="kpt.plan"), edited(format=2), edited(rows=3), edited(rows=[{}]), lambda d: [d], lambda d: {},
     row_edited(seconds=-1.0), row_edited(seconds="fast"), row_edited(kernel=3), row_edited(passes="both"), row_edited(measured="then"),
     row_edited(config=3)],
)  # fmt: skip
def test_what_is_no_export_is_refused_as_a_whole(table, there, edit):
    with pytest.raises(StoreError):
        import_json(table, json.dumps(edit(json.loads(export_json(there)))))
    with pytest.raises(StoreError):
        import_json(table, export_json(there)[:-40])
    assert table.all() == []
