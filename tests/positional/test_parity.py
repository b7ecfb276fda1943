"""Same weights, other implementations: transformers' own models where they have the encoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    T5Config,
)
from transformers.models.t5.modeling_t5 import T5Attention

from fixtures.problems import math_tokenizer
from models.layers import DecoderConfig, SelfAttention, score_mask, sinusoids
from models.positional import METHODS, PositionalConfig, PositionalForCausalLM, graft
from models.positional.t5_relative import T5Relative, buckets

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(BOUND)
SIZES: dict[str, Any] = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 128}

IDS = torch.randint(4, 100, (3, 40), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(3, 40, dtype=torch.long)
LEFT[1, :17] = 0
LEFT[2, :3] = 0


@contextlib.contextmanager
def float64_all_through() -> Iterator[None]:
    """Llama's norm and the softmax of Bloom, MPT and T5 go through float32 whatever the type: not here."""
    to, floated, softmax = Tensor.to, Tensor.float, torch.nn.functional.softmax

    def kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if x.dtype == torch.float64 and args == (torch.float32,) else to(x, *args, **kwargs)

    def soft(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return softmax(x, *args, dtype=x.dtype if x.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "to", kept)
        patched.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else floated(x))
        patched.setattr(torch.nn.functional, "softmax", soft)
        yield


def shaken(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Trained-like weights: norms not 1, biases not 0, scores that matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() == 1 else 0.08))
    return model.eval().to(dtype)


def largest_difference(ours: Any, theirs: Any, **theirs_too: Any) -> float:
    """Over logits of an unpadded and a left-padded batch, real tokens; both see the same positions."""
    with torch.no_grad(), float64_all_through():
        plain, padded = theirs(IDS).logits, theirs(IDS, attention_mask=LEFT, **theirs_too).logits
    with torch.no_grad():
        plain, padded = ours(IDS).logits - plain, ours(IDS, attention_mask=LEFT).logits - padded
    return max(float(plain.abs().max()), float(padded[LEFT.bool()].abs().max()))


def counted() -> Tensor:
    return (LEFT.cumsum(-1) - 1).clamp(min=0)


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.cat((query, key, value))


def by_head(rows: Tensor, heads: int) -> Tensor:
    """Rows grouped (head, q k v, feature), as in GPT-NeoX and Bloom -> (q k v, head, feature)."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def ours_with(config: PositionalConfig, state: dict[str, Tensor], dtype: torch.dtype) -> PositionalForCausalLM:
    model = PositionalForCausalLM(config).to(dtype).eval()
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=True)
    return model


SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_own_against_llama(dtype: torch.dtype, scaling: str) -> None:
    parameters = SCALINGS[scaling]
    made = LlamaConfig(
        **SIZES, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2, rope_parameters=dict(parameters)
    )
    theirs = shaken(LlamaForCausalLM(made), dtype)
    config = PositionalConfig(
        **SIZES, pe_method="rope", num_attention_heads=4, num_key_value_heads=2, intermediate_size=112,
        norm="rms", norm_eps=1e-6, gated=True, hidden_act="silu", attention_bias=False, feed_forward_bias=False,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    state = {
        "model.embedding.weight": theirs.model.embed_tokens.weight,
        "model.final_norm.weight": theirs.model.norm.weight,
        "head.weight": theirs.lm_head.weight,
    }
    for index, layer in enumerate(theirs.model.layers):
        at = f"model.blocks.{index}."
        attention = layer.self_attn
        state |= {
            at + "attention.qkv.weight": fused(
                attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
            ),
            at + "attention.out.weight": attention.o_proj.weight,
            at + "attention_norm.weight": layer.input_layernorm.weight,
            at + "feed_forward_norm.weight": layer.post_attention_layernorm.weight,
            at + "feed_forward.gate_up.weight": torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)),
            at + "feed_forward.down.weight": layer.mlp.down_proj.weight,
        }
    ours = ours_with(config, state, dtype)
    assert largest_difference(ours, theirs, position_ids=counted()) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
def test_rope_own_against_gpt_neox(dtype: torch.dtype, share: float, parallel: bool) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share}
    made = GPTNeoXConfig(
        **SIZES, intermediate_size=192, num_attention_heads=3, rope_parameters=dict(parameters),
        use_parallel_residual=parallel,
    )  # fmt: skip
    theirs = shaken(GPTNeoXForCausalLM(made), dtype)
    config = PositionalConfig(
        **SIZES, pe_method="rope", num_attention_heads=3, intermediate_size=192, use_parallel_residual=parallel,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    state = {
        "model.embedding.weight": theirs.gpt_neox.embed_in.weight,
        "model.final_norm.weight": theirs.gpt_neox.final_layer_norm.weight,
        "model.final_norm.bias": theirs.gpt_neox.final_layer_norm.bias,
        "head.weight": theirs.lm_head.weight,
    }
    for index, layer in enumerate(theirs.gpt_neox.layers):
        at = f"model.blocks.{index}."
        for kind in ("weight", "bias"):
            state |= {
                at + f"attention.qkv.{kind}": by_head(getattr(layer.attention.query_key_value, kind), 3),
                at + f"attention.out.{kind}": getattr(layer.attention.dense, kind),
                at + f"attention_norm.{kind}": getattr(layer.input_layernorm, kind),
                at + f"feed_forward_norm.{kind}": getattr(layer.post_attention_layernorm, kind),
                at + f"feed_forward.up.{kind}": getattr(layer.mlp.dense_h_to_4h, kind),
                at + f"feed_forward.down.{kind}": getattr(layer.mlp.dense_4h_to_h, kind),
            }
    ours = ours_with(config, state, dtype)
    assert largest_difference(ours, theirs, position_ids=counted()) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [4, 8, 6])
def test_alibi_own_against_bloom(dtype: torch.dtype, heads: int) -> None:
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size")}
    made = BloomConfig(
        **sizes, n_layer=3, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=True
    )
    theirs = shaken(BloomForCausalLM(made), dtype)
    config = PositionalConfig(
        **SIZES, pe_method="alibi", num_attention_heads=heads, hidden_act="gelu_pytorch_tanh", embedding_norm=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    state = {"model.embedding.weight": theirs.transformer.word_embeddings.weight}
    state["head.weight"] = state["model.embedding.weight"]
    for kind in ("weight", "bias"):
        state[f"model.embedding_norm.{kind}"] = getattr(theirs.transformer.word_embeddings_layernorm, kind)
        state[f"model.final_norm.{kind}"] = getattr(theirs.transformer.ln_f, kind)
    for index, layer in enumerate(theirs.transformer.h):
        at = f"model.blocks.{index}."
        for kind in ("weight", "bias"):
            state |= {
                at + f"attention.qkv.{kind}": by_head(getattr(layer.self_attention.query_key_value, kind), heads),
                at + f"attention.out.{kind}": getattr(layer.self_attention.dense, kind),
                at + f"attention_norm.{kind}": getattr(layer.input_layernorm, kind),
                at + f"feed_forward_norm.{kind}": getattr(layer.post_attention_layernorm, kind),
                at + f"feed_forward.up.{kind}": getattr(layer.mlp.dense_h_to_4h, kind),
                at + f"feed_forward.down.{kind}": getattr(layer.mlp.dense_4h_to_h, kind),
            }
    ours = ours_with(config, state, dtype)
    bound = BOUND[dtype]
    if dtype == torch.float64:  # Bloom's slopes are float32 (exact for 4 and 8), its sqrt(2 / pi) has eight digits
        bound = 1e-5 if heads == 6 else 1e-9
    assert largest_difference(ours, theirs) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_own_against_mpt(dtype: torch.dtype, heads: int) -> None:
    made = MptConfig(vocab_size=101, d_model=48, n_layers=3, n_heads=heads, expansion_ratio=4, max_seq_len=128)
    theirs = shaken(MptForCausalLM(made), dtype)
    config = PositionalConfig(
        **SIZES, pe_method="alibi", num_attention_heads=heads, norm_bias=False, attention_bias=False,
        feed_forward_bias=False, tie_word_embeddings=True,
    )  # fmt: skip
    state = {
        "model.embedding.weight": theirs.transformer.wte.weight,
        "head.weight": theirs.transformer.wte.weight,
        "model.final_norm.weight": theirs.transformer.norm_f.weight,
    }
    for index, layer in enumerate(theirs.transformer.blocks):
        at = f"model.blocks.{index}."
        state |= {
            at + "attention.qkv.weight": layer.attn.Wqkv.weight,
            at + "attention.out.weight": layer.attn.out_proj.weight,
            at + "attention_norm.weight": layer.norm_1.weight,
            at + "feed_forward_norm.weight": layer.norm_2.weight,
            at + "feed_forward.up.weight": layer.ffn.up_proj.weight,
            at + "feed_forward.down.weight": layer.ffn.down_proj.weight,
        }
    ours = ours_with(config, state, dtype)
    bound = BOUND[dtype] if heads == 4 or dtype == torch.float32 else 1e-5  # MPT too keeps its slopes in float32
    assert largest_difference(ours, theirs) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [5, 40, 200])
@torch.no_grad()
def test_t5_relative_against_the_decoder_of_t5(dtype: torch.dtype, time: int) -> None:
    made = T5Config(d_model=48, d_kv=12, num_heads=4, is_decoder=True, dropout_rate=0.0)
    made._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = T5Attention(made, has_relative_attention_bias=True, layer_idx=0).eval().to(dtype)
    config = DecoderConfig(hidden_size=48, num_attention_heads=4, attention_bias=False, attention_scale=1.0)
    config._attn_implementation = "sdpa"
    ours = SelfAttention(config, 0).eval().to(dtype)
    ours.qkv.weight.copy_(fused(theirs.q.weight, theirs.k.weight, theirs.v.weight))
    ours.out.weight.copy_(theirs.o.weight)
    encoding = T5Relative(PositionalConfig(pe_method="t5_relative", num_attention_heads=4)).to(dtype)
    encoding.weight.weight.copy_(theirs.relative_attention_bias.weight)
    x = torch.randn(2, time, 48, dtype=dtype)
    positions = torch.arange(time)[None]
    mask = score_mask(config, None, encoding.bias(positions, positions, dtype), 0).mask
    future = torch.ones(time, time).triu(1).bool()
    causal = torch.zeros(1, 1, time, time, dtype=dtype).masked_fill(future, torch.finfo(dtype).min)
    with float64_all_through():
        expected = theirs(x, mask=causal)[0]
    assert float((ours(x, attention_mask=mask)[0] - expected).abs().max()) < BOUND[dtype]


@pytest.mark.parametrize(("count", "longest"), [(32, 128), (16, 64), (8, 20), (4, 128)])
def test_t5_relative_buckets_are_those_of_t5(count: int, longest: int) -> None:
    distance = torch.arange(longest + 1)
    expected = T5Attention._relative_position_bucket(-distance, False, count, longest)
    assert torch.equal(buckets(count, longest), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_sinusoidal_is_its_closed_form(dtype: torch.dtype) -> None:
    """The own decoder on embeddings to which the formula was added by hand equals the model's own."""
    config = PositionalConfig.sized("tiny", "sinusoidal", vocab_size=101)
    ours = shaken(PositionalForCausalLM(config), dtype)
    scale = ours.model.encoding.scale.clone()
    positions = torch.arange(40)[None]
    added = scale * (config.pe_options["amplitude"] * sinusoids(positions, 48)).to(dtype)
    expected = ours(IDS).logits
    ours.model.encoding.scale.zero_()
    by_hand = ours(inputs_embeds=ours.model.embedding(IDS) + added).logits
    assert float((by_hand - expected).abs().max()) < BOUND[dtype]


BASES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=3, intermediate_size=192)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=112)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["gpt_neox", "llama"])
def test_rope_grafted_onto_a_rotary_base_is_the_base(base: str, dtype: torch.dtype) -> None:
    theirs = shaken(BASES[base](), dtype)
    with float64_all_through():  # a graft keeps its base's norms
        assert largest_difference(graft(theirs, "rope"), theirs, position_ids=counted()) < BOUND[dtype]


def neutral(model: Any) -> Any:
    """Silences the grafted encoding: what is left is the base without any."""
    encoding = model.encoding
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.zero_()
        if hasattr(encoding, "slopes"):
            encoding.slopes.zero_()
        if hasattr(encoding, "amplitude"):
            encoding.amplitude = 0.0
        if hasattr(encoding, "tables") and isinstance(encoding.tables, torch.nn.Module):
            encoding.tables.inv_freq.zero_()
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_nothing_of_the_base_encoding_is_left(base: str, method: str, dtype: torch.dtype) -> None:
    """With the new encoding silenced, a graft equals its base with the position table zeroed, or at position 0."""
    theirs = shaken(BASES[base](), dtype)
    bare = neutral(graft(theirs, method, tokenizer=math_tokenizer()))
    if base == "gpt2":
        theirs.transformer.wpe.weight.zero_()
        expected = theirs(IDS).logits
    else:  # a rotary embedding at position 0 turns nothing; the mask keeps equal positions from reading as packed texts
        expected = theirs(IDS, attention_mask=torch.ones_like(IDS), position_ids=torch.zeros_like(IDS)).logits
    assert float((bare(IDS).logits - expected).abs().max()) < BOUND[dtype]
