"""`kpt demo`: one model trained twice on the same text, as written and through kpt, step by step in turn."""

from __future__ import annotations

import dataclasses
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import kpt_jax
from kpt.errors import KptError
from kpt.hardware import planned_elsewhere
from kpt.strategy import Plan
from kpt_jax.demo_model import Config, LanguageModel, next_token_loss
from kpt_jax.devices import here

STEPS = 200
SEED = 0
BATCH = 1
LEARNING_RATE = 2e-3
WARMUP = 20
TEXT_BYTES = 4 << 20

TOLERANCE = 1e-3
"""Largest difference of the two losses at any step, in nats, at which the curves count as the same.

Rounding alone, amplified by 200 steps, comes to less than a hundredth of it (docs/benchmarks/cpu-demo.json).
"""


@dataclasses.dataclass
class Variant:
    """One of the two trainings.

    Attributes:
      name: "as written" or "through kpt".
      step: compiled `(params, optimizer_state, tokens) -> (params, optimizer_state, loss)`.
      state: parameters and optimizer state.
      temporary_bytes: what the compiled step needs besides its arguments and results, by XLA's own account.
      compile_seconds: of XLA; tracing, matching and certifying are not in it.
      losses: in nats per byte, one a step.
      seconds: wall time, one a step.
    """

    name: str
    step: Callable[..., Any]
    state: tuple[Any, Any]
    temporary_bytes: int
    compile_seconds: float
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Median over the steps; the first of them, which touch fresh memory, weigh no more than others."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        return {
            "temporary_bytes": self.temporary_bytes,
            "compile_seconds": self.compile_seconds,
            "step_seconds_median": self.step_seconds,
            "step_seconds_quartiles": list(self.quartiles),
            "step_seconds": self.seconds,
            "loss": self.losses,
        }


@dataclasses.dataclass
class Demo:
    """Both trainings and what was planned; `train` fills in the curves."""

    config: Config
    parameters: int
    steps: int
    plan: Plan
    plan_seconds: float
    before: Variant
    after: Variant
    text: bytes

    @property
    def max_difference(self) -> float:
        """Largest difference of the losses at one step; NaN if either loss is."""
        return float(np.max(np.abs(np.subtract(self.before.losses, self.after.losses))))

    @property
    def coincide(self) -> bool:
        return self.max_difference <= TOLERANCE

    @property
    def speedup(self) -> float:
        return self.before.step_seconds / self.after.step_seconds

    @property
    def memory_ratio(self) -> float:
        return self.before.temporary_bytes / max(self.after.temporary_bytes, 1)

    def to_json(self) -> dict[str, Any]:
        import json

        return {
            "kind": "kpt.demo",
            "hardware": self.plan.hardware,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
            "model": dataclasses.asdict(self.config) | {"parameters": self.parameters},
            "steps": self.steps,
            "batch": BATCH,
            "plan": json.loads(self.plan.to_json()),
            "plan_seconds": self.plan_seconds,
            "as_written": self.before.to_json(),
            "through_kpt": self.after.to_json(),
            "speedup": self.speedup,
            "memory_ratio": self.memory_ratio,
            "max_loss_difference": self.max_difference,
            "loss_tolerance": TOLERANCE,
            "coincide": self.coincide,
        }


def prepare(steps: int = STEPS, config: Config | None = None, announce: Callable[[str], None] = lambda _: None) -> Demo:
    """Plans the model's loss and compiles both training steps. `announce` is told what is being done."""
    config = config or Config()
    text = standard_library_source(TEXT_BYTES)
    graphdef, params = nnx.split(LanguageModel(config, nnx.Rngs(SEED)), nnx.Param)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, max(steps, WARMUP + 1)))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_loss(nnx.merge(graphdef, params), tokens)

    hardware = here()
    planned_elsewhere(hardware)
    fast_loss = kpt_jax.optimize(loss, hardware=hardware)
    tokens = next(batches(text, config.context, 1))
    announce("planning: match, choose, certify")
    start = time.perf_counter()
    plan = fast_loss.plan(params, tokens)
    plan_seconds = time.perf_counter() - start

    def compiled(name: str, loss: Callable[..., jax.Array]) -> Variant:
        announce(f"compiling the training step {name}")
        # Each training owns its parameters: a step donates them.
        state = (own := jax.tree.map(lambda x: x.copy(), params)), optimizer.init(own)
        lowered = training_step(loss, optimizer).lower(*state, tokens)
        start = time.perf_counter()
        step = lowered.compile()
        seconds = time.perf_counter() - start
        return Variant(name, step, state, step.memory_analysis().temp_size_in_bytes, seconds)

    count = sum(x.size for x in jax.tree.leaves(params))
    before, after = compiled("as written", loss), compiled("through kpt", fast_loss)
    return Demo(config, count, steps, plan, plan_seconds, before, after, text)


def train(demo: Demo) -> Iterator[int]:
    """Trains both variants on the same batches; yields the number of steps done.

    They take turns, step by step, and in turn go first, so that whatever else the machine does meets both.
    """
    for i, tokens in enumerate(batches(demo.text, demo.config.context, demo.steps)):
        order = (demo.before, demo.after) if i % 2 == 0 else (demo.after, demo.before)
        for variant in order:
            start = time.perf_counter()
            *state, loss = jax.block_until_ready(variant.step(*variant.state, tokens))
            variant.seconds.append(time.perf_counter() - start)
            variant.state = (state[0], state[1])
            variant.losses.append(float(loss))
        yield i + 1


def training_step(loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation) -> Any:
    """The jitted step that a user would write around `loss`."""

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def batches(text: bytes, context: int, steps: int) -> Iterator[np.ndarray]:
    """`steps` batches of `context + 1` bytes from random places, the same at every call; int32."""
    data = np.frombuffer(text, np.uint8)
    rng = np.random.default_rng(SEED)
    for _ in range(steps):
        starts = rng.integers(0, len(data) - context, BATCH)
        yield np.stack([data[s : s + context + 1] for s in starts]).astype(np.int32)


def standard_library_source(limit: int) -> bytes:
    """The sources of Python's standard library, in order of their paths, up to `limit` bytes.

    Raises:
      KptError: they are not there as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if {"site-packages", "dist-packages", "test", "tests"}.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
        if len(text) >= limit:
            return bytes(text[:limit])
    if len(text) < 1 << 18:
        raise KptError(
            f"The demo looked for Python's own sources under {root}",
            f"Only {len(text)} bytes of .py files are there",
            "Use a Python that has its standard library as files",
        )
    return bytes(text)


def versions() -> dict[str, str]:
    """Versions of what the demo's numbers depend on."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
