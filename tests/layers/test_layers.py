"""The shared layers against their definitions, written out naively."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from models.layers import (
    Decoder,
    DecoderBlock,
    DecoderConfig,
    DecoderForCausalLM,
    FeedForward,
    GatedFeedForward,
    RotaryEmbedding,
    SelfAttention,
    default_positions,
    key_positions,
    norm,
    score_mask,
    sinusoids,
    turn,
)

VARIANTS = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "parallel": {"use_parallel_residual": True},
    "grouped": {"num_key_value_heads": 2, "norm": "rms", "gated": True, "hidden_act": "silu"},
    "wide heads": {"head_dim": 20, "attention_bias": False},
    "tied": {"tie_word_embeddings": True, "embedding_norm": True},
}


def config(**changes: Any) -> DecoderConfig:
    made = DecoderConfig(**changes)
    made._attn_implementation = "sdpa"
    return made


class DistanceBiased(Decoder):
    """Scores fall with distance, by another slope in every head."""

    def score_bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.config.num_attention_heads + 1, device=query.device)
        distance = key[:, None, None, :] - query[:, None, :, None]
        return (slopes[:, None, None] * distance).to(dtype)


class DistanceBiasedForCausalLM(DecoderForCausalLM):
    decoder_class = DistanceBiased


def biased(**changes: Any) -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = DistanceBiasedForCausalLM(DecoderConfig(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # scores large enough to see
            parameter.mul_(4)
    return model


def batch(time: int = 13) -> Tensor:
    return torch.randint(4, 97, (3, time), generator=torch.Generator().manual_seed(time))


def padded_mask(side: str, time: int = 13) -> Tensor:
    mask = torch.ones(3, time, dtype=torch.long)
    for row, pads in ((1, 5), (2, 2)):
        mask[row, slice(0, pads) if side == "left" else slice(time - pads, time)] = 0
    return mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_attention_is_softmax_of_scaled_scores(implementation: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    made = config(num_key_value_heads=kv_heads)
    made._attn_implementation = implementation
    attention = SelfAttention(made, 0).eval()
    x = torch.randn(2, 7, 48)
    bias = torch.randn(1, 4, 7, 7)
    mask = score_mask(made, None, bias, 0).mask
    q, k, v = attention.qkv(x).split((48, 12 * kv_heads, 12 * kv_heads), dim=-1)
    expected = torch.zeros(2, 7, 48)
    for head in range(4):
        columns, shared = slice(12 * head, 12 * head + 12), slice(12 * (head * kv_heads // 4), None)
        key, value = k[..., shared][..., :12], v[..., shared][..., :12]
        scores = q[..., columns] @ key.mT / math.sqrt(12) + bias[0, head]
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        expected[..., columns] = scores.softmax(-1) @ value
    torch.testing.assert_close(attention(x, attention_mask=mask)[0], attention.out(expected))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_learned_bias_gets_the_gradient_of_sdpa(kv_heads: int) -> None:
    """Training takes another way through attention than evaluation where the bias is learned."""
    made = config(num_key_value_heads=kv_heads)
    attention = SelfAttention(made, 0).double().eval()
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    mask = score_mask(made, None, bias, 0).mask
    q, k, v = (part.unflatten(-1, (-1, 12)).transpose(1, 2) for part in attention.qkv(x).split(
        (48, 12 * kv_heads, 12 * kv_heads), dim=-1
    ))  # fmt: skip
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    expected = attention.out(plain.transpose(1, 2).flatten(2))
    found, weights = attention(x, attention_mask=mask)
    assert weights is None
    torch.testing.assert_close(found, expected)
    parts = [bias, attention.qkv.weight]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), parts, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), parts),
    )


@given(
    batch_size=st.integers(1, 3), heads=st.integers(1, 4), time=st.integers(1, 9), past=st.integers(0, 5),
    seed=st.integers(0, 99), ready=st.sampled_from(["none", "boolean", "additive"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_bias_is_folded_where_a_query_may_look(
    batch_size: int, heads: int, time: int, past: int, seed: int, ready: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(1, heads, time, past + time, generator=generator)
    causal = torch.ones(time, past + time, dtype=torch.bool).tril(past)
    visible = causal[None, None].expand(batch_size, 1, -1, -1)
    given_mask = {"none": None, "boolean": visible, "additive": torch.where(visible, 0.0, torch.finfo().min)}[ready]
    folded = score_mask(config(), given_mask, bias, past).mask
    expected = bias.expand(folded.shape[0], -1, -1, -1)
    assert torch.equal(folded[causal.expand_as(folded)], expected[causal.expand_as(folded)])
    assert (folded[~causal.expand_as(folded)] < -1e38).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_entries_stay_finite_under_scores(dtype: torch.dtype) -> None:
    folded = score_mask(config(), None, torch.zeros(1, 2, 5, 5, dtype=dtype), 0).mask
    assert folded.dtype == dtype
    assert (folded - 1000).isfinite().all()
    assert folded.double().softmax(-1).triu(1).eq(0).all()


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    counted = default_positions(mask, 3, 4, 0, torch.device("cpu"))
    assert [row[real.bool()].tolist() for row, real in zip(counted, mask)] == [[0, 1, 2, 3], [0, 1], [0, 1]]
    assert default_positions(mask, 3, 1, 3, torch.device("cpu")).tolist() == [[3], [1], [1]]
    assert default_positions(None, 3, 2, 5, torch.device("cpu")).tolist() == [[5, 6]]


@given(
    past=st.integers(0, 6), time=st.integers(1, 6), room=st.integers(0, 3), start=st.integers(-50, 50),
    padded=st.lists(st.booleans(), min_size=12, max_size=12),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_key_positions_continue_those_of_the_queries(
    past: int, time: int, room: int, start: int, padded: list[bool]
) -> None:
    """Whatever is padding, a cached key stands as far from a new token as there are real tokens between them."""
    mask = torch.tensor([[not gap for gap in padded[: past + time]]]).long()
    mask[0, past] = 1
    truth = mask.cumsum(-1) - 1 + start
    keys = key_positions(truth[:, past:], mask, past + time + room, past)
    real = mask[0].bool()
    assert keys.shape == (1, past + time + room)
    assert keys[0, : past + time][real].tolist() == truth[0][real].tolist()


def test_explicit_positions_hold_among_new_tokens() -> None:
    assert key_positions(torch.tensor([[7, 9, 20]]), None, 5, 2).tolist() == [[5, 6, 7, 9, 20]]
    assert key_positions(torch.tensor([[7], [30]]), None, 3, 2).tolist() == [[5, 6, 7], [28, 29, 30]]


@pytest.mark.parametrize("rotated", [1.0, 0.5])
@torch.no_grad()
def test_turning_keeps_lengths_and_depends_on_distance(rotated: float) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": rotated}
    tables = RotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=parameters))
    q, k = torch.randn(2, 1, 3, 1, 16).unbind()
    turned = {}
    for at in (0, 3, 10, 13):
        cos, sin = tables(q, torch.tensor([[at]]))
        turned[at] = turn(q, cos, sin), turn(k, cos, sin)
    torch.testing.assert_close(turned[13][0].norm(dim=-1), q.norm(dim=-1))
    near, far = turned[3][0] @ turned[0][1].mT, turned[13][0] @ turned[10][1].mT
    torch.testing.assert_close(near, far)
    assert not torch.allclose(near, turned[13][0] @ turned[0][1].mT)
    assert torch.equal(turned[13][0][..., int(16 * rotated) :], q[..., int(16 * rotated) :])


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_frequencies_stay_float32(cast: str) -> None:
    tables = RotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    exact = tables.inv_freq.clone()
    getattr(tables, cast)()
    assert tables.inv_freq.dtype == torch.float32
    assert torch.equal(tables.inv_freq, exact)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scalings_are_those_of_transformers(kind: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    made = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=scaling)
    positions, x = torch.arange(200)[None], torch.zeros(1)
    for ours, theirs in zip(RotaryEmbedding(made)(x, positions), LlamaRotaryEmbedding(made)(x, positions)):
        assert torch.equal(ours, theirs)


def test_unknown_scaling_is_refused() -> None:
    made = LlamaConfig(hidden_size=64, num_attention_heads=4)
    made.rope_parameters = {"rope_type": "magic", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'magic' is none of default"):
        RotaryEmbedding(made)


@given(st.integers(1, 40), st.integers(0, 5000))
@settings(max_examples=30, deadline=None)
def test_sinusoids_are_the_closed_form(size: int, position: int) -> None:
    expected = [(math.sin if i % 2 == 0 else math.cos)(position / 10_000 ** (2 * (i // 2) / size)) for i in range(size)]
    actual = sinusoids(torch.tensor([position]), size)[0].double()
    rounding = torch.finfo(torch.float32).eps * (position + 1)  # of the angle, which grows with the position
    torch.testing.assert_close(actual, torch.tensor(expected).double(), atol=rounding, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "gated"])
@torch.no_grad()
def test_feed_forward_is_its_formula(kind: str) -> None:
    x = torch.randn(2, 3, 48)
    if kind == "plain":
        plain = FeedForward(config(hidden_act="gelu"))
        expected = plain.down(torch.nn.functional.gelu(plain.up(x)))
        torch.testing.assert_close(plain(x), expected)
        return
    gated = GatedFeedForward(config(hidden_act="silu", feed_forward_bias=False))
    gate, up = gated.gate_up.weight.split(192)
    expected = (torch.nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ gated.down.weight.mT
    torch.testing.assert_close(gated(x), expected)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_is_over_features(kind: str) -> None:
    x = 5 * torch.randn(2, 3, 48) + 2
    made = config(norm=kind)
    centred = x.double() - (x.double().mean(-1, keepdim=True) if kind == "layer" else 0)
    expected = centred / (centred.square().mean(-1, keepdim=True) + made.norm_eps).sqrt()
    torch.testing.assert_close(norm(made)(x).double(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_block_orders_norm_and_residual_as_stated() -> None:
    x = torch.randn(2, 5, 48)
    blocks = {name: DecoderBlock(config(**VARIANTS[name]), 0).eval() for name in ("pre", "post", "parallel")}
    pre, post, parallel = blocks.values()
    middle = x + pre.attention(pre.attention_norm(x))[0]
    torch.testing.assert_close(pre(x), middle + pre.feed_forward(pre.feed_forward_norm(middle)))
    middle = post.attention_norm(x + post.attention(x)[0])
    torch.testing.assert_close(post(x), post.feed_forward_norm(middle + post.feed_forward(middle)))
    both = parallel.attention(parallel.attention_norm(x))[0] + parallel.feed_forward(parallel.feed_forward_norm(x))
    torch.testing.assert_close(parallel(x), x + both)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(variant: str, side: str) -> None:
    model, ids, mask = biased(**VARIANTS[variant]), batch(), padded_mask(side)
    logits = model(ids, attention_mask=mask).logits
    for row in range(3):
        alone = model(ids[row][mask[row].bool()][None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_cached_equals_uncached(variant: str, kind: str, side: str) -> None:
    model, ids = biased(**VARIANTS[variant]), batch()
    mask = padded_mask(side)
    whole = model(ids, attention_mask=mask).logits
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    parts, seen = [], 0
    for size in (4, 1, 5, 3):
        chunk = slice(seen, seen + size)
        output = model(ids[:, chunk], attention_mask=mask[:, : seen + size], past_key_values=cache, use_cache=True)
        parts.append(output.logits)
        seen += size
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("other", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])  # compiles
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_attention_functions_agree(other: str, side: str) -> None:
    model, ids = biased(), batch()
    mask = None if side == "none" else padded_mask(side)
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(other)
    actual = model(ids, attention_mask=mask).logits
    real = torch.ones(3, 13).bool() if mask is None else mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bidirectional_config_lifts_the_causal_mask() -> None:
    model, ids = biased(), batch()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] - 4 + 1) % 93 + 4
    first = model(ids).logits[:, 0], model(changed).logits[:, 0]
    assert torch.equal(*first)
    model.config.is_causal = False
    assert not torch.equal(model(ids).logits[:, 0], model(changed).logits[:, 0])


@torch.no_grad()
def test_logits_to_keep_and_hidden_states() -> None:
    model, ids = biased(), batch()
    full = model(ids, output_hidden_states=True)
    assert len(full.hidden_states) == 3
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full.logits[:, [0, 5]])


def test_deeper_models_start_with_smaller_residual_projections() -> None:
    torch.manual_seed(0)
    model = DecoderForCausalLM(DecoderConfig(num_hidden_layers=8, hidden_size=64))
    block = model.model.blocks[0]
    for inner in (block.attention.qkv, block.feed_forward.up):
        assert inner.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for outer in (block.attention.out, block.feed_forward.down):
        assert outer.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_tied_as_configured(tied: bool) -> None:
    model = biased(tie_word_embeddings=tied)
    assert (model.head.weight is model.model.embedding.weight) == tied


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 50}, "50 is no multiple of 4"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"norm": "batch"}, '"layer" or "rms"'),
        ({"norm_placement": "middle"}, '"pre" or "post"'),
        ({"norm_placement": "post", "use_parallel_residual": True}, "pre-norm blocks"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        DecoderConfig(**changes)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [({}, "exactly one"), ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "sequence is empty")],
)
def test_impossible_inputs_are_refused(inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        biased()(**inputs)


def test_parallel_residual_set_after_validation_is_refused() -> None:
    made = config(norm_placement="post")
    made.use_parallel_residual = True
    with pytest.raises(ValueError, match="pre-norm blocks"):
        DecoderForCausalLM(made)
