"""Never slower, as a fact: `kpt.auto_optimize` on the calls of `kpt_torch.bench`, large and tiny, and on whole models, measured again.

    python -m kpt_torch.bench_auto [--budget 10s] [--json docs/benchmarks/auto-torch-h200.json]

Each case is a loss whose inputs or parameters have gradients. The second measurement is made after the first, in rounds of its own; a case
is slower if that says so by more than 2%, the noise of the ratio taken off. The models are those of transformers, with random weights,
where it is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kpt.tuning import rounds
from kpt.tuning.again import Case, run
from kpt.tuning.measurements import FORWARD
from kpt.tuning.trials import Trial
from kpt_torch.bench import PLAIN
from kpt_torch.shapes import CPU_SHAPES, PARAMS, SHAPES, specs_of
from kpt_torch.trials import arrays_of, sample

ON = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = ("gpt2", "llama", "bert", "vit")
"""Two decoders, an encoder, a vision model."""


def cases() -> Iterator[Case]:
    for op, shapes in (SHAPES if ON.type == "cuda" else CPU_SHAPES).items():
        if op == "swiglu":
            continue  # is a part of glu
        tiny = tuple(max(1, n // 8) if i < len(shapes[0]) - 1 else n for i, n in enumerate(shapes[0]))
        for size, dims in (("large", shapes[0]), ("tiny", tiny)):
            specs = specs_of(op, dims, "bfloat16" if ON.type == "cuda" else "float32")
            tensors = arrays_of(Trial(op, specs, PARAMS.get(op, {}), {}, FORWARD, ON.type), ON)
            torch.compiler.reset()  # what all cases call is one function, which Dynamo captures a limited number of times
            yield f"{op} {size} {'x'.join(map(str, dims))}", functools.partial(_loss, PLAIN[op]), [_moving(t) for t in tensors.values()]
    if importlib.util.find_spec("transformers"):
        for name in MODELS:
            torch.compiler.reset()
            yield f"model {name}", *_model(name)


def _moving(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def _loss(fn: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    return fn(*tensors).float().square().mean()


def _model(name: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    t = importlib.import_module("transformers")
    large = ON.type == "cuda"
    width, layers, length, vocab = (2048, 4, 2048, 32000) if large else (256, 2, 256, 2048)
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    torch.manual_seed(0)
    if name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=length, vocab_size=vocab,
                                               resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip
    elif name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**common, intermediate_size=11 * width // 4, vocab_size=vocab))
    elif name == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        common |= {"intermediate_size": 4 * width, "max_position_embeddings": length}
        model = t.BertForMaskedLM(t.BertConfig(**common, **still, vocab_size=vocab))
    else:
        model = t.ViTForImageClassification(t.ViTConfig(**common, intermediate_size=4 * width, num_labels=10))
        return _Loss(model.to(ON), "pixel_values"), [torch.randn(2, 3, 224, 224, device=ON), torch.tensor([1, 2], device=ON)]
    tokens = torch.randint(vocab, (2, length), device=ON)
    return _Loss(model.to(ON), "input_ids"), [tokens, tokens]


class _Loss(torch.nn.Module):
    """A model that returns the loss alone; in bfloat16 by autocast on a GPU."""

    def __init__(self, model: torch.nn.Module, given: str):
        super().__init__()
        self.model, self.given = model, given

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ON.type, torch.bfloat16, enabled=ON.type == "cuda"):
            return self.model(**{self.given: x}, labels=labels).loss


def again(original: Callable[..., Any], kept: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Sequence[float], Sequence[float]]:
    weights = list(original.parameters()) if isinstance(original, torch.nn.Module) else []
    moving = [t for t in (*weights, *inputs) if t.requires_grad]

    def once(fn: Callable[..., Any]) -> Any:
        return torch.autograd.grad(fn(*inputs), moving, allow_unused=True)

    found = rounds({n: functools.partial(sample, functools.partial(once, fn), ON) for n, fn in (("original", original), ("kept", kept))})
    return found["original"], found["kept"]


if __name__ == "__main__":
    device = torch.cuda.get_device_name() if ON.type == "cuda" else "cpu"
    run(__doc__, "python -m kpt_torch.bench_auto", cases(), again, {"device": device, "torch": torch.__version__})
