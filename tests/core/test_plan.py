"""Plans as data: levels, JSON in and out, files, words for people."""

import dataclasses
import json
import math
import re
import types

import numpy as np
import pytest

from kpt.errors import ConfigError, PlanError
from kpt.kernels import LEVELS as LEVEL_NAMES
from kpt.kernels import KernelRegistry, KernelSpec, registry
from kpt.kernels.spec import OtherHardware, elsewhere
from kpt.ops.base import Cost, Spec
from kpt.ops.mask import Causal, Mask, Window
from kpt.strategy import LEVELS, Plan, Site, choose
from kpt.validation import certify

CHIP = types.SimpleNamespace(
    name="test CPU", platform="cpu", architecture="x86-64", peak_flops={"float32": 1e11}, memory_bandwidth=2e10
)
X = Spec((2, 64, 4, 32), "float32")
CERTIFICATE = certify({"y": np.array([1.0, np.inf])}, {"y": np.array([1.0, 2.0])}, "float32", 4).to_json()

ATTENTION = Site(
    op="attention",
    kernel="attention.xla",
    version=1,
    path="layers.0.attn",
    source="model.py:41",
    reason="Estimated 1 ms against 2 ms for the original.",
    time_before=2e-3,
    time_after=1e-3,
    error=3.1e-7,
    error_gradient=5.2e-7,
    params={"mask": Mask((Causal(), Window(128, 0)), fill=-1e9), "scale": None, "logits_soft_cap": 50.0},
    specs={"q": X, "k": X, "v": X},
    fingerprint="9f2c",
    certificate=CERTIFICATE,
    alternatives={"attention.tpu": OtherHardware("runs on tpu, and test CPU is cpu"), "attention.slow": "runs on one core, and test CPU is cpu"},
)
DROPPED = Site(
    op="rms_norm",
    kernel="original",
    version=None,
    path="layers.0.norm",
    source="model.py:12",
    reason="Two axes are normalised, and rms_norm takes one; normalise over the last axis.",
    params={"eps": 1e-6},
)


def at(site, layer, **changes):
    return dataclasses.replace(site, path=re.sub(r"\d+", str(layer), site.path), **changes)


PLAN = Plan(
    function="train_step",
    level="balanced",
    hardware="test CPU",
    framework="jax",
    versions={"jax": "0.11.2", "kpt": "0.1"},
    sites=tuple(at(ATTENTION, i) for i in range(32)),
    skipped=(DROPPED,),
    notes=("Measured with two threads.",),
)


def test_json_brings_a_plan_back_whole():
    text = PLAN.to_json()
    assert Plan.from_json(text) == PLAN
    assert Plan.from_json(text).to_json() == text
    assert Plan.from_json(text).sites[0].params["mask"].terms == (Causal(), Window(128, 0))
    assert elsewhere(Plan.from_json(text).sites[0].alternatives) == ("attention.tpu",), "a kind, not words"


VALUES = [None, True, 3, 2.5, math.inf, -math.inf, "silu", (1, (2, 3)), [1, None], {"a": (1,)}, Mask((Causal(3),)),
          Mask((Window(None, 0),), additive=True, fill=-1e9), Spec((), "bool"), {"$float": 1, "b": 2}]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_kind_of_parameter_survives(value):
    plan = dataclasses.replace(PLAN, sites=(dataclasses.replace(ATTENTION, params={"value": value}),))
    assert Plan.from_json(plan.to_json()).sites[0].params["value"] == value
    assert type(Plan.from_json(plan.to_json()).sites[0].params["value"]) is type(value)


def test_numpy_scalars_become_numbers_and_arrays_are_refused():
    plan = dataclasses.replace(PLAN, sites=(dataclasses.replace(ATTENTION, params={"eps": np.float32(0.5)}),))
    assert Plan.from_json(plan.to_json()).sites[0].params == {"eps": 0.5}
    with pytest.raises(PlanError, match="ndarray"):
        dataclasses.replace(PLAN, sites=(dataclasses.replace(ATTENTION, params={"eps": np.ones(2)}),)).to_json()


def edited(**changes):
    return json.dumps(json.loads(PLAN.to_json()) | changes)


def without(name):
    return json.dumps({k: v for k, v in json.loads(PLAN.to_json()).items() if k != name})


def site_with(**changes):
    data = json.loads(PLAN.to_json())
    data["sites"][0] |= changes
    return json.dumps(data)


MALFORMED = [
    ("", "no JSON"),
    (PLAN.to_json()[:200], "no JSON"),
    ("[1, 2]", "something else"),
    ('{"kind": "bundle"}', "something else"),
    (edited(format=99), "Upgrade kpt"),
    (edited(format="1"), "format"),
    (edited(sites=3), "malformed"),
    (edited(sites=["attention"]), "malformed"),
    (edited(function=None), "'function' is None"),
    (without("level"), "'level' is None"),
    (without("skipped"), "malformed"),
    (site_with(op=3), "'op'"),
    (site_with(version="one"), "'version'"),
    (site_with(version=None), "every kernel has one"),
    (site_with(kernel="original", version=None), "sites"),
    (site_with(reason=""), "no reason"),
    (site_with(params={"mask": {"$mask": {"terms": [{"kind": "no_such"}]}}}), "malformed"),
    (site_with(time_before="slow"), "'time_before'"),
    (site_with(specs={"q": 3}), "'specs'"),
    (site_with(alternatives={"a": 3}), "'alternatives'"),
    (site_with(elsewhere="a"), "'elsewhere'"),
    (edited(versions=5), "'versions'"),
    (edited(versions={"jax": 0.11}), "'versions'"),
    (edited(notes="word"), "'notes'"),
]


@pytest.mark.parametrize(("text", "words"), MALFORMED)
def test_what_is_no_plan_is_a_plan_error_with_advice(text, words):
    with pytest.raises(PlanError, match=words) as caught:
        Plan.from_json(text)
    assert caught.value.advice or caught.value.possible


@pytest.mark.parametrize(
    ("text", "name"), [(edited(colour="red"), "colour"), (site_with(colour="red"), "sites.colour")]
)
def test_unknown_fields_are_left_out_with_a_note(text, name):
    assert any(name in note for note in Plan.from_json(text).notes)


@pytest.mark.parametrize("text", [site_with(kernel="attention.other"), site_with(params={}), edited(level="aggressive")])
def test_an_edited_plan_says_so(text):
    assert any("edited" in note for note in Plan.from_json(text).notes)
    assert not any("edited" in note for note in Plan.from_json(PLAN.to_json()).notes)


HASHES = [
    # changes of the plan, whether it is another plan
    ({"notes": ()}, False),
    ({"skipped": ()}, False),
    ({"versions": {}}, False),
    ({"sites": tuple(dataclasses.replace(s, time_after=1.0, error=0.5, reason="Other.") for s in PLAN.sites)}, False),
    ({"sites": PLAN.sites[:-1]}, True),
    ({"sites": (*PLAN.sites[:-1], dataclasses.replace(PLAN.sites[-1], version=2))}, True),
    ({"sites": (*PLAN.sites[:-1], dataclasses.replace(PLAN.sites[-1], params={"mask": Mask()}))}, True),
    ({"sites": (*PLAN.sites[:-1], dataclasses.replace(PLAN.sites[-1], fingerprint="00"))}, True),
    ({"level": "aggressive"}, True),
    ({"framework": "torch"}, True),
]


@pytest.mark.parametrize(("changes", "differs"), HASHES)
def test_the_hash_is_what_the_plan_does(changes, differs):
    assert (dataclasses.replace(PLAN, **changes).hash != PLAN.hash) is differs


def test_explain_tells_people_everything_once():
    lines = str(PLAN).splitlines()
    assert lines[0] == f"Plan {PLAN.hash} for train_step"
    assert "balanced" in lines[1] and "test CPU" in lines[1] and "jax 0.11.2" in lines[1]
    assert lines[2] == "  32 sites with a kernel, 1 left as written"
    text = str(PLAN)
    for words in (
        "attention × 32  attention.xla v1  layers.{0..31}.attn  model.py:41",
        "Estimated 1 ms against 2 ms for the original.",
        "relative L2 error: forward 3.1e-07, gradients 5.2e-07; 2 ms → 1 ms each (2.00×)",
        "rms_norm  original  layers.0.norm  model.py:12",
        "Two axes are normalised",
        "Measured with two threads.",
    ):
        assert text.count(words) == 1, words
    assert max(map(len, lines)) <= 100


def test_explain_shows_the_worst_error_of_a_group_and_keeps_different_reasons_apart():
    sites = (ATTENTION, at(ATTENTION, 1, error=4e-3), at(ATTENTION, 7, reason="Another reason."))
    text = dataclasses.replace(PLAN, sites=sites).explain()
    assert "attention × 2  attention.xla v1  layers.{0..1}.attn" in text
    assert "forward 4.0e-03" in text
    assert "layers.7.attn" in text


def test_a_norm_of_a_sum_is_named_as_one():
    norms = [at(DROPPED, i, specs={"x": X} | ({"residual": X} if i else {})) for i in range(3)]
    text = dataclasses.replace(PLAN, sites=(), skipped=tuple(norms)).explain()
    assert "  rms_norm               original  layers.0.norm" in text and "  rms_norm of a sum × 2  original  layers.{1..2}.norm" in text


def test_an_empty_plan_reads_well():
    text = Plan("f", "balanced", "test CPU", "jax").explain()
    assert "0 sites with a kernel, 0 left as written" in text


SITES = [
    ({"kernel": "original"}, "no version"),
    ({"version": None}, "every kernel has one"),
    ({"reason": ""}, "no reason"),
]


@pytest.mark.parametrize(("changes", "words"), SITES)
def test_a_site_has_a_kernel_with_a_version_and_a_reason(changes, words):
    with pytest.raises(PlanError, match=words):
        dataclasses.replace(ATTENTION, **changes)


@pytest.mark.parametrize("lists", [{"sites": (DROPPED,)}, {"skipped": (ATTENTION,)}])
def test_a_site_is_in_the_list_it_belongs_to(lists):
    with pytest.raises(PlanError, match="listed"):
        dataclasses.replace(PLAN, **lists)


KERNEL = KernelSpec("attention.xla", "attention", 1, "xla", "jax", ("cpu",), "m:f", ("float32",))


@pytest.mark.parametrize(
    ("kernels", "words"),
    [([KERNEL], None), ([dataclasses.replace(KERNEL, version=2)], "version 2 is installed"), ([], "not installed")],
)
def test_a_plan_made_with_an_older_kernel_says_so(kernels, words):
    found = dataclasses.replace(PLAN, sites=(ATTENTION,)).outdated(KernelRegistry(kernels))
    assert len(found) == (words is not None)
    assert words is None or (words in found[0] and "attention at layers.0.attn: attention.xla v1" in found[0])


def test_save_and_load(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_failed_save_leaves_the_old_plan(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    with pytest.raises(PlanError):
        dataclasses.replace(PLAN, sites=(dataclasses.replace(ATTENTION, params={"eps": object()}),)).save(path)
    assert Plan.load(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", PLAN.to_json()[:-10].encode(), None])
def test_a_corrupt_file_is_a_plan_error_and_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match="plan.json"):
        Plan.load(path)
    assert content is None or path.read_bytes() == content


def test_levels_are_ordered_each_allows_what_the_lower_one_does():
    assert tuple(LEVELS) == LEVEL_NAMES == ("conservative", "balanced", "aggressive")
    assert LEVELS["conservative"].ops < LEVELS["balanced"].ops
    assert LEVELS["aggressive"].ops is None
    for kernel in registry.kernels():
        lowest = next(level for level in LEVELS.values() if level.ops is None or kernel.op in level.ops)
        assert kernel.level == lowest.name, f"{kernel.name} and the table of levels disagree"


def spec(name, **changes):
    cost = lambda specs, params: Cost(1.0, 1.0)  # noqa: E731
    return dataclasses.replace(KERNEL, name=name, op=name.split(".")[0], cost=cost, **changes)


CHOICES = [
    # op, kernels, call, chosen, words of the reason
    ("glu", [spec("glu.xla")], {}, "glu.xla", "estimated to be faster|Estimated|accepts"),
    ("glu", [spec("glu.xla")], {"level": "conservative"}, None, "Pass level='balanced'"),
    ("fft", [spec("fft.theirs")], {}, None, "Pass level='aggressive'"),
    ("fft", [spec("fft.theirs")], {"level": "aggressive"}, "fft.theirs", "accepts"),
    ("glu", [], {}, None, "No kernel for glu in jax is registered"),
    ("glu", [spec("glu.theirs", framework="torch")], {}, None, "No kernel for glu in jax is registered"),
    ("glu", [spec("glu.gpu", platforms=("cuda",))], {}, None, r"accepts this call \(1 for other hardware\)\.$"),
    ("glu", [spec("glu.gpu", platforms=("cuda",)), spec("glu.tpu", platforms=("tpu",)), spec("glu.xla"), spec("glu.theirs", framework="torch")],
     {"measurements": {"original": 1.0, "glu.xla": 2.0}}, None, r"\(glu.xla measured 2 s against 1 s for the choice; 2 for other hardware\)\.$"),
    ("glu", [spec("glu.fp8", level="aggressive")], {}, None, "pass level='aggressive'"),
    ("glu", [spec("glu.xla")], {"measurements": {"original": 1.0, "glu.xla": 2.0}}, None, "glu.xla measured 2 s"),
    (
        "glu",
        [spec("glu.xla")],
        {"measurements": {"original": 2.0, "glu.xla": 1.0}},
        "glu.xla",
        "Measured 1 s against 2 s",
    ),
]


@pytest.mark.parametrize(("op", "kernels", "call", "chosen", "words"), CHOICES)
def test_choose_gives_a_reason_to_act_on(op, kernels, call, chosen, words):
    specs = {"x": Spec((8, 64), "float32"), "w_gate": Spec((64, 32), "float32"), "w_up": Spec((64, 32), "float32")}
    kernel, reason, alternatives = choose(op, specs, {}, hardware=CHIP, registry=KernelRegistry(kernels), **call)
    assert (kernel.name if kernel else None) == chosen
    assert re.search(words, reason)
    assert reason[0].isupper() and reason.endswith(".")
    assert chosen not in alternatives


def test_choose_knows_its_levels():
    with pytest.raises(ConfigError, match="conservative"):
        choose("glu", {"x": X}, {}, hardware=CHIP, level="reckless")
