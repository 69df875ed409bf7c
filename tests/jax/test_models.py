"""Whole models that nobody here wrote: every site found, the same numbers and gradients."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kpt.ops.mask import Causal, Explicit, Window
from tests.jax.plain_kernels import assert_same, rewritten

tf = pytest.importorskip("transformers", minversion="4.57")

L, T, VOCAB = 2, 16, 64
IDS = jnp.asarray(np.random.default_rng(0).integers(3, VOCAB, (2, T)))
PADDING = jnp.asarray([[1] * T, [1] * 10 + [0] * 6])
LLAMA = {"num_hidden_layers": L, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48,
         "vocab_size": VOCAB, "max_position_embeddings": 32}  # fmt: skip
GPT = {"n_layer": L, "n_head": 4, "n_embd": 32, "vocab_size": VOCAB, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
BERT = {"num_hidden_layers": L, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB,
        "max_position_embeddings": 40}  # fmt: skip
BART = {"encoder_layers": L, "decoder_layers": L, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB}  # fmt: skip
CAUSAL, PADDED = (Causal(), Explicit()), (Explicit(),)

# class, configuration class, its arguments, sites with a loss on top, the masks of its attentions
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, {"attention": L, "layer_norm": 2 * L + 1, "linear_act": L}, [CAUSAL] * L),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {"attention": L, "rms_norm": 2 * L + 1, "glu": L, "rope": 2 * L}, [CAUSAL] * L),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 8},
                {"attention": L, "rms_norm": 2 * L + 1, "glu": L, "rope": 2 * L}, [(Causal(), Window(8, None), Explicit())] * L),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA | {"num_key_value_heads": 1, "head_dim": 8},
              {"attention": L, "rms_norm": 2 * L + 1, "glu": L, "rope": 2 * L}, [CAUSAL] * L),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig",
                {"num_layers": L, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "hidden_size": 32, "window_size": 8,
                 "vocab_size": VOCAB, "max_position_embeddings": 32},
                {"attention": L, "layer_norm": 2 * L + 1, "linear_act": L}, [CAUSAL, (Causal(), Window(7, None), Explicit())]),
    "gpt_j": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4},
              {"attention": L, "layer_norm": L + 1, "linear_act": L, "rope": 2 * L}, [CAUSAL] * L),
    "opt": ("OPTForCausalLM", "OPTConfig", BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
            {"attention": L, "layer_norm": 2 * L + 1, "linear_act": L}, [CAUSAL] * L),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": L, "n_head": 4, "hidden_size": 32, "vocab_size": VOCAB},
              {"attention": L, "layer_norm": 2 * L + 2, "linear_act": L}, None),
    "xglm": ("XGLMForCausalLM", "XGLMConfig",
             {"num_layers": L, "attention_heads": 4, "d_model": 32, "ffn_dim": 48, "vocab_size": VOCAB, "max_position_embeddings": 32},
             {"attention": L, "layer_norm": 2 * L + 1, "linear_act": L}, [CAUSAL] * L),
    "bert": ("BertForMaskedLM", "BertConfig", BERT, {"attention": L, "layer_norm": 2 * L + 2, "linear_act": L + 1}, [PADDED] * L),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT, {"attention": L, "layer_norm": 2 * L + 2, "linear_act": L + 1}, [PADDED] * L),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART | {"max_position_embeddings": 32},
             {"attention": 3 * L, "layer_norm": 5 * L + 2, "linear_act": 2 * L}, [PADDED] * (2 * L) + [(Causal(),)] * L),
}  # fmt: skip
MODELS["mbart"] = ("MBartForConditionalGeneration", "MBartConfig", MODELS["bart"][2],
                   {"attention": 3 * L, "layer_norm": 5 * L + 4, "linear_act": 2 * L}, MODELS["bart"][4])  # fmt: skip
MODELS["xlm_roberta"] = ("XLMRobertaForMaskedLM", "XLMRobertaConfig", *MODELS["roberta"][2:])
MODELS["electra"] = ("ElectraForMaskedLM", "ElectraConfig", BERT | {"embedding_size": 32}, *MODELS["bert"][3:])
MODELS["albert"] = ("AlbertForMaskedLM", "AlbertConfig", BERT | {"embedding_size": 16}, *MODELS["bert"][3:])
DEFAULT = ("gpt2", "llama")


def build(name):
    cls, config, kwargs, sites, masks = MODELS[name]
    model = getattr(tf, "Flax" + cls)(getattr(tf, config)(**kwargs), seed=0)
    more = {"decoder_input_ids": IDS} if name in ("bart", "mbart") else {}

    def loss(params, ids, padding):
        logits = model(ids, attention_mask=padding, params=params, **more).logits
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return (each * padding[:, 1:]).sum() / padding[:, 1:].sum()

    def logits(params, ids, padding):
        return model(ids, attention_mask=padding, params=params, **more).logits

    return model, loss, logits, sites, masks


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in MODELS])
def test_training_loss(name):
    model, loss, _, sites, masks = build(name)
    args = (model.params, IDS, PADDING)
    found, fast = rewritten(loss, *args)
    assert collections.Counter(found.ops()) == sites | {"linear_cross_entropy": 1}, [m.reason for m in found.missed]
    got = [m.params["mask"].terms for m in found.sites if m.op == "attention"]
    if masks is not None:
        assert sorted(got, key=repr) == sorted(masks, key=repr)
    assert_same(loss, fast, args, length=4096)


@pytest.mark.parametrize("name", DEFAULT)
def test_inference_keeps_the_logits(name):
    model, _, logits, sites, _ = build(name)
    found, fast = rewritten(logits, model.params, IDS, PADDING)
    assert collections.Counter(found.ops()) == sites
    assert_same(logits, fast, (model.params, IDS, PADDING), length=4096, gradients=False)


def test_inside_remat_the_sites_are_the_same():
    model, loss, _, sites, _ = build("llama")
    found, fast = rewritten(jax.checkpoint(loss), model.params, IDS, PADDING)
    assert collections.Counter(found.ops()) == sites | {"linear_cross_entropy": 1}
    assert_same(loss, fast, (model.params, IDS, PADDING), length=4096)


SMALL = {"num_hidden_layers": L, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
T5 = {"num_layers": L, "num_decoder_layers": L, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48, "vocab_size": VOCAB,
      "decoder_start_token_id": 0}  # fmt: skip
_rng = np.random.default_rng(1)
IMAGES = jnp.asarray(_rng.normal(size=(2, 3, 16, 16)), jnp.float32)
SOUND = jnp.asarray(_rng.normal(size=(2, 8, 2 * T)), jnp.float32)


def t5(**more):
    model = tf.FlaxT5ForConditionalGeneration(tf.T5Config(**T5 | more), seed=0)
    return model, lambda p, ids, pad: model(ids, attention_mask=pad, decoder_input_ids=ids, params=p).logits, (IDS, PADDING)


def whisper():
    config = tf.WhisperConfig(**BART, num_mel_bins=8, max_source_positions=T, max_target_positions=32, pad_token_id=0, bos_token_id=1,
                              eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    model = tf.FlaxWhisperForConditionalGeneration(config, seed=0, input_shape=(1, 8, 2 * T))
    return model, lambda p, sound, ids: model(sound, decoder_input_ids=ids, params=p).logits, (SOUND, IDS)


def vit():
    model = tf.FlaxViTForImageClassification(tf.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=10), seed=0)
    return model, lambda p, images: model(images, params=p).logits, (IMAGES,)


def clip():
    text, vision = {"vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": 2}, {"image_size": 16, "patch_size": 4}
    model = tf.FlaxCLIPModel(tf.CLIPConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=16), seed=0)
    return model, lambda p, ids, images, pad: model(ids, images, attention_mask=pad, params=p).logits_per_image, (IDS, IMAGES, PADDING)


def distilbert():
    config = tf.DistilBertConfig(n_layers=L, n_heads=4, dim=32, hidden_dim=48, vocab_size=VOCAB, max_position_embeddings=40)
    model = tf.FlaxDistilBertForMaskedLM(config, seed=0)
    return model, lambda p, ids, pad: model(ids, attention_mask=pad, params=p).logits, (IDS, PADDING)


# name: (model, its logits, their arguments), and every site that must be found in them
BUILDERS = {
    "t5": (t5, {"attention": 3 * L, "rms_norm": 5 * L + 2, "linear_act": 2 * L}),
    "t5_gated": (lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False), {"attention": 3 * L, "rms_norm": 5 * L + 2, "glu": 2 * L}),
    "whisper": (whisper, {"attention": 3 * L, "layer_norm": 5 * L + 2, "linear_act": 2 * L}),
    "vit": (vit, {"attention": L, "layer_norm": 2 * L + 1, "linear_act": L}),
    "clip": (clip, {"attention": 2 * L, "layer_norm": 4 * L + 3, "linear_act": 2 * L}),
    "distilbert": (distilbert, {"attention": L, "layer_norm": 2 * L + 2, "linear_act": L + 1}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_every_site_of_a_model_that_is_no_plain_language_model(name, monkeypatch):
    real = jnp.clip  # T5's code calls it by a name of its argument that jax has given up
    monkeypatch.setattr(jnp, "clip", lambda *a, a_min=None, a_max=None, **more: real(
        *a, **more, **({} if a_min is None else {"min": a_min}), **({} if a_max is None else {"max": a_max})))  # fmt: skip
    make, sites = BUILDERS[name]
    model, logits, args = make()
    found, fast = rewritten(logits, model.params, *args)
    assert collections.Counter(found.ops()) == sites, [(m.op, m.reason) for m in found.missed]
    assert not [m for m in found.missed if not m.reason]
    assert_same(logits, fast, (model.params, *args), length=4096)
