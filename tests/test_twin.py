"""Models written twice: equal to rounding in both frameworks, as written and through kpt; and what a planted difference is called."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kpt import cli, console
from kpt.errors import ValidationError
from kpt.twin import AdamW, Twin, compare
from kpt_jax.twin import Side as JaxSide
from kpt_torch.twin import Side as TorchSide
from tests.models import gpt, llama

MODELS = {"gpt": gpt.TWIN, "llama": llama.TWIN}


def both(twin: Twin, *, optimized: bool = False, steps: int = 0):
    return compare(twin, JaxSide(twin, optimized), TorchSide(twin), steps=steps)


@pytest.mark.parametrize("optimized", [pytest.param(False, id="as written", marks=pytest.mark.slow), pytest.param(True, id="through kpt")])
@pytest.mark.parametrize("model", MODELS)
def test_the_frameworks_agree_and_a_hundred_losses_coincide(model, optimized):
    found = both(MODELS[model], optimized=optimized, steps=100)
    assert found.passed, found.explain()
    assert {d.stage for d in found.differences} == {"forward", "loss", "gradient", "update", "training"}
    first, second = map(np.array, found.losses)
    assert len(first) == 100 and first[-1] < first[0] - 1
    assert np.abs(first - second).max() < 1e-4  # nats; chaos would show long before
    assert json.loads(found.to_json())["first"] is None and "rounding alone" in found.explain()


def halved(x):
    """Forwards as it is; its gradient is a half of what it should be."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g / 2

    return Half.apply(x)


def differing(name, change):
    """The GPT with one tapped value changed in PyTorch."""
    return dataclasses.replace(gpt.TWIN, torch=lambda w, batch, tap: gpt.torch_loss(w, batch, lambda n, v: tap(n, change(v) if n == name else v)))


@pytest.mark.parametrize(
    ("twin", "stage", "name"),
    [
        (differing("layers.1/up", lambda v: v * (1 + 1e-4)), "forward", "layers.1/up"),
        (differing("layers.0/attention", lambda v: v.bfloat16().float()), "forward", "layers.0/attention"),
        (differing("layers.1/norm2", lambda v: v.index_fill(-1, torch.tensor([5]), float("nan"))), "forward", "layers.1/norm2"),
        # The gradients of what comes after it in the model are untouched, and are compared first.
        (differing("layers.1/up", halved), "gradient", "layers.1.up.bias"),
    ],
    ids=["scaled", "rounded", "NaN", "gradient alone"],
)
def test_the_first_difference_is_named(twin, stage, name):
    found = both(twin)
    assert found.first is not None and (found.first.stage, found.first.name) == (stage, name)
    assert found.first.values[0] != found.first.values[1]
    assert f"{stage} of {name}" in found.explain()
    row = json.loads(found.to_json())["differences"][json.loads(found.to_json())["first"]]
    assert (row["stage"], row["name"], row["passed"]) == (stage, name, False)


def test_a_gradient_that_is_rounding_alone_is_no_difference():
    """What softmax does not see has a gradient of 0, of which each framework leaves another rounding."""
    def weights(seed):
        drawn = np.random.default_rng(seed).normal(size=(16, 16)).astype("float32") / 4
        return {"key": drawn, "key.bias": np.zeros(16, "float32")}

    def loss(softmax, mean):
        def run(w, batch, tap):
            x = batch["x"]
            scores = x @ (x @ w["key"] + w["key.bias"]).mT
            return mean((tap("weights", softmax(scores, -1)) @ x) ** 2)

        return run

    batch = {"x": np.random.default_rng(1).normal(size=(2, 8, 16)).astype("float32")}
    made = Twin("keys", weights, lambda step: batch, loss(jax.nn.softmax, jnp.mean), loss(torch.softmax, torch.mean))
    found = compare(made, JaxSide(made), TorchSide(made), steps=0)
    assert found.passed, found.explain()
    halves = dataclasses.replace(made, torch=loss(lambda s, axis: torch.softmax(halved(s), axis), torch.mean))
    assert (first := compare(halves, JaxSide(halves), TorchSide(halves), steps=0).first) and first.name == "key"


def test_a_small_gradient_is_held_to_itself():
    """However large another one is."""
    def loss(sign):
        return lambda w, batch, tap: 1e-7 * (sign(w["small"]) * batch["x"]).sum() + (w["large"] * batch["x"]).sum()

    batch = {"x": np.random.default_rng(1).normal(size=16).astype("float32")}
    made = Twin("small", lambda seed: dict.fromkeys(("small", "large"), np.ones(16, "float32")), lambda step: batch,
                loss(lambda w: w), loss(halved))  # fmt: skip
    found = compare(made, JaxSide(made), TorchSide(made), steps=0)
    assert found.first is not None and (found.first.stage, found.first.name) == ("gradient", "small")


def test_an_optimizer_that_differs_shows_in_the_update():
    twin = gpt.TWIN
    other = dataclasses.replace(twin, optimizer=AdamW(weight_decay=0.0))
    found = compare(twin, JaxSide(twin), TorchSide(other), steps=0)
    assert found.first is not None and found.first.stage == "update"


def test_a_difference_does_not_hide_in_a_deep_model():
    """Each value is made from the other side's one before it, so that the bound does not grow with depth."""
    found = both(gpt.TWIN)
    bounds = {d.name: d.allowed for d in found.differences if d.stage == "forward"}
    assert bounds["layers.1/attention"] == bounds["layers.0/attention"] < 1e-5


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, batch, tap: gpt.torch_loss(w, batch, lambda n, v: v if n == "logits" else tap(n, v)),
        differing("layers.0/up", lambda v: v[..., None]).torch,
    ],
    ids=["a tap is missing", "another shape"],
)
def test_what_cannot_be_compared(loss):
    twin = dataclasses.replace(gpt.TWIN, torch=loss)
    with pytest.raises((ValidationError, RuntimeError)) as error:
        both(twin)
    assert "tap" in str(error.value).lower() or "shape" in str(error.value).lower()


SCALED = differing("layers.1/up", lambda v: 1.01 * v)


def test_command_line(tmp_path):
    chart = tmp_path / "losses.svg"
    same = CliRunner().invoke(cli.app, ["twin", "tests.models.gpt:TWIN", "--steps", "3", "--plot", str(chart), "--json"])
    assert same.exit_code == console.OK and len(json.loads(same.stdout)["losses"][1]) == 3
    assert "jax" in chart.read_text() and "torch" in chart.read_text()
    other = CliRunner().invoke(cli.app, ["twin", "tests.test_twin:SCALED", "--steps", "0"])
    assert other.exit_code == console.NO and "forward of layers.1/up[" in other.stdout
    wrong = CliRunner().invoke(cli.app, ["twin", "tests.test_twin:MODELS"])
    assert wrong.exit_code == console.REFUSED and "kpt.twin.Twin" in wrong.output
