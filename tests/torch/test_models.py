"""Models from transformers, random weights, as their authors wrote them: the sites they must give, and the same numbers with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kpt_torch
from kpt.validation import compare
from kpt_torch.capture import to_numpy

transformers = pytest.importorskip("transformers")

V, T = 64, 12
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(**SMALL, vocab_size=V, num_key_value_heads=2, max_position_embeddings=64)
IDS = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}
PADDED = TEXT | {"attention_mask": (torch.arange(T) < torch.tensor([[T], [7]])).long()}
LEFT = TEXT | {"attention_mask": (torch.arange(T) >= torch.tensor([[0], [5]])).long()}  # whose first queries see no key, and have a loss
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "labels": torch.tensor([0, 1])}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
ROTARY = {"rms_norm": 5, "rope": 4}

# name: (model, config, its settings, attention implementation, inputs, sites in eval, sites in train; per two layers)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64), "sdpa", TEXT, {"attention": 2}, {}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, "sdpa", TEXT, ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),
    "llama eager": ("LlamaForCausalLM", "LlamaConfig", LLAMA, "eager", TEXT, ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),
    "llama padded": ("LlamaForCausalLM", "LlamaConfig", LLAMA, "sdpa", PADDED, ROTARY, ROTARY),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | dict(sliding_window=5), "eager", TEXT, ROTARY | {"attention": 2},
                ROTARY | {"attention": 2}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA, "sdpa", TEXT, ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL | dict(vocab_size=V, max_position_embeddings=64), "eager", PADDED, {"attention": 2}, {}),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(vocab_size=V, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                                               max_position_embeddings=64, word_embed_proj_dim=32), "sdpa", TEXT, {}, {}),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                                          decoder_start_token_id=0), "eager", TEXT, {"attention": 6, "rms_norm": 12}, None),
    "vit": ("ViTForImageClassification", "ViTConfig", SMALL | dict(image_size=16, patch_size=4), "eager", PIXELS, {"attention": 2},
            {"attention": 2}),
    "gpt2 eager": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0), "eager", TEXT,
                   {"attention": 2}, {"attention": 2}),  # its triangle is in a buffer
    "gptj": ("GPTJForCausalLM", "GPTJConfig", dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **TOKENS), "eager",
             TEXT, {"rope": 4, "attention": 2}, {"rope": 4, "attention": 2}),  # its scale is a tensor
    # Scores are capped: of the kernels for PyTorch, the one in Triton can.
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA | dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8, **TOKENS), "eager", TEXT,
               {"rms_norm": 9, "rope": 4}, {"rms_norm": 9, "rope": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA | dict(head_dim=8, sliding_window=5, **TOKENS), "eager", TEXT,
               {"rms_norm": 13, "rope": 4, "attention": 2}, {"rms_norm": 13, "rope": 4, "attention": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | dict(head_dim=8, **TOKENS), "eager", TEXT,
              {"rms_norm": 9, "rope": 4, "attention": 2}, {"rms_norm": 9, "rope": 4, "attention": 2}),  # norms over heads
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA | dict(partial_rotary_factor=0.5, **TOKENS), "eager", TEXT, {"rope": 4, "attention": 2},
            {"rope": 4, "attention": 2}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | dict(vocab_size=V, max_position_embeddings=64, rotary_pct=0.5, **TOKENS), "eager", TEXT,
             {"rope": 4, "attention": 2}, {"rope": 4, "attention": 2}),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, **TOKENS), "eager", PADDED,
              {"attention": 2}, {"attention": 2}),  # its mask is written into a view
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", SMALL | dict(vocab_size=V, max_position_embeddings=64, relative_attention=True,
                                                                        pos_att_type=["p2c", "c2p"]), "eager", TEXT, {"attention": 2}, {}),
    "deberta padded": ("DebertaV2ForMaskedLM", "DebertaV2Config", SMALL | dict(vocab_size=V, max_position_embeddings=64, relative_attention=True,
                                                                               pos_att_type=["p2c", "c2p"]), "eager", PADDED, {"attention": 2}, {}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA | dict(original_max_position_embeddings=64, **TOKENS), "eager", PADDED,
             ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),
    "falcon": ("FalconForCausalLM", "FalconConfig", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **TOKENS), "eager",
               PADDED, {"rope": 4, "attention": 2}, {"rope": 4, "attention": 2}),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA | TOKENS, "eager", LEFT, {"layer_norm": 3, "rope": 4, "attention": 2},
               {"layer_norm": 3, "rope": 4, "attention": 2}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", LLAMA | dict(attention_multiplier=0.3, logits_scaling=2.0, **TOKENS), "eager", LEFT,
                ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),
    "granite moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", LLAMA | dict(num_local_experts=4, num_experts_per_tok=2, **TOKENS), "eager", TEXT,
                    ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),  # sizes that depend on data
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA | TOKENS, "eager", TEXT, {"rms_norm": 9, "rope": 4, "attention": 2},
              {"rms_norm": 9, "rope": 4, "attention": 2}),
    "glm": ("GlmForCausalLM", "GlmConfig", LLAMA | dict(head_dim=8, **TOKENS), "eager", TEXT, ROTARY | {"attention": 2}, ROTARY | {"attention": 2}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", SMALL | dict(vocab_size=V, max_position_embeddings=64, local_attention=4,
                                                                             global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=1,
                                                                             reference_compile=False, **TOKENS), "eager", PADDED,
                   {"rope": 4, "attention": 2}, {"rope": 4, "attention": 2}),  # padded queries see padded keys alone
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA | dict(head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=8,
                                                                     **TOKENS), "eager", TEXT, {"rms_norm": 9, "rope": 4, "attention": 2},
               {"rms_norm": 9, "rope": 4, "attention": 2}),  # turns by complex numbers
    "mpt": ("MptForCausalLM", "MptConfig", dict(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "eager", PADDED, {"attention": 2},
            {"attention": 2}),  # ALiBi
    "falcon alibi": ("FalconForCausalLM", "FalconConfig", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
                                                               multi_query=True, **TOKENS), "eager", PADDED, {"attention": 2}, {"attention": 2}),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", LLAMA | TOKENS, "eager", TEXT, {"rms_norm": 7, "rope": 4, "attention": 2},
                  {"rms_norm": 7, "rope": 4, "attention": 2}),
    "swin": ("SwinForImageClassification", "SwinConfig", dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
             "eager", PIXELS, {"attention": 4}, {"attention": 4}),
    "swin v2": ("Swinv2ForImageClassification", "Swinv2Config", dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
                                                                     window_size=4, drop_path_rate=0.0), "eager", PIXELS, {"attention": 4},
                {"attention": 4}),  # cosines, and a scale for each head
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", LLAMA | dict(head_dim=8, **TOKENS), "eager", LEFT,
                {"rms_norm": 9, "rope": 4, "attention": 2}, {"rms_norm": 9, "rope": 4, "attention": 2}),  # norms of what was rotated
    "deepseek v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", LLAMA | dict(num_key_value_heads=4, first_k_dense_replace=2, q_lora_rank=16,
                                                                              kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
                                                                              head_dim=8, **TOKENS), "eager", LEFT,
                    {"rms_norm": 9, "rope": 4, "attention": 2}, {"rms_norm": 9, "rope": 4, "attention": 2}),
    # A mask from outside meets the model's own in a sum, and a query may be shown no key: it stays as it was written.
    "gpt neo": ("GPTNeoForCausalLM", "GPTNeoConfig", dict(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, window_size=5, max_position_embeddings=64,
                                                          attention_types=[[["global", "local"], 1]], **TOKENS), "eager", PADDED, {}, {}),
    "beit": ("BeitForImageClassification", "BeitConfig", SMALL | dict(image_size=16, patch_size=4, use_relative_position_bias=True, out_indices=[1]),
             "eager", PIXELS, {"attention": 2}, {"attention": 2}),
}  # fmt: skip
QUICK = ("gpt2", "gpt2 eager", "llama eager", "bert", "vit", "qwen3")


def make(name):
    kind, config, settings, attention, inputs, evaluated, trained = MODELS[name]
    settings = transformers.__dict__.get(config) or getattr(transformers, config)
    torch.manual_seed(0)
    made = settings(**MODELS[name][2])
    made._attn_implementation = attention
    return getattr(transformers, kind)(made), inputs, {False: evaluated, True: trained}


def numbers(model, inputs):
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**inputs)
    out.loss.backward()
    made = {"loss": out.loss, "logits": out.logits} | {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: to_numpy(t.clone()) for n, t in made.items()}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_model(name, train):
    model, inputs, expected = make(name)
    model.train(train)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    fast = kpt_torch.optimize(model)
    want, got = numbers(model, inputs), numbers(fast, inputs)
    for n in [n for n in want if n.endswith(("key.bias", "key_proj.bias"))]:  # 0 but for rounding, as softmax does not see what is added to every key
        assert max(abs(want.pop(n)).max(), abs(got.pop(n)).max()) < 1e-6
    verdict = compare(got, want, "float32", 4096, gradients=[n for n in want if n.startswith("d")])
    assert verdict.passed, verdict.summary()
    assert list(fast.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in fast.state_dict().items())
    plans = fast._kpt_backend.plans
    found: dict[str, int] = {}
    for site in (s for p in plans for s in p.sites):
        found[site.op] = found.get(site.op, 0) + 1
        assert site.error is not None
    if expected[train] is not None:
        assert found == expected[train], "\n".join(p.explain() for p in plans)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama padded", "deberta", "opt", "swin"])
def test_model_under_autocast(name):
    """No further from float32 than the model itself is under autocast, all graphs planned."""
    model, inputs, _ = make(name)
    model.train()
    exact, fast = numbers(model, inputs), kpt_torch.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        own, got = numbers(model, inputs), numbers(fast, inputs)
    for n, true in exact.items():
        size = np.linalg.norm(true)
        assert np.linalg.norm(got[n] - true) <= 2 * np.linalg.norm(own[n] - true) + 1e-2 * size + 1e-6, n
    assert not [n for p in fast._kpt_backend.plans for n in p.notes if "as it was written" in n]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_model_by_torch_compile(name):
    from kpt_torch.backend import kpt

    model, inputs, _ = make(name)
    model.eval()
    fast = torch.compile(model, backend=kpt, options={"inner": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
