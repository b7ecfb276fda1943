"""Gates and physical pruning: a head with its gate at 0 and a head that is gone give the same logits."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from fixtures.subjects.adaptive import PRUNED, gpt2
from models.adaptive import AdaptiveConfig, AdaptiveForCausalLM

pytestmark = pytest.mark.adaptive

LAYERS, HEADS = 4, 4
PLACES = list(itertools.product(range(LAYERS), range(HEADS)))


@pytest.fixture
def model() -> AdaptiveForCausalLM:
    return AdaptiveForCausalLM.from_gpt2(gpt2(), skips=True)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 64, (3, 40), generator=torch.Generator().manual_seed(1))


@settings(max_examples=20, deadline=None)
@given(closed=st.sets(st.sampled_from(PLACES)), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_removing_heads_equals_closing_their_gates(closed: set[tuple[int, int]], dtype: torch.dtype) -> None:
    model = AdaptiveForCausalLM.from_gpt2(gpt2().to(dtype))
    ids = torch.randint(64, (2, 33))
    for place in closed:
        model.gates.data[place] = 0
    gated = model(ids).logits
    removed = model.prune_heads()
    torch.testing.assert_close(model(ids).logits, gated, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    for layer in range(LAYERS):
        heads = {head for of, head in closed if of == layer}
        gone = removed.get(layer, [])
        assert set(gone) <= heads
        assert len(gone) == min(len(heads), HEADS - 1)  # the last head of a layer stays


def test_a_head_times_its_gate_is_what_the_projection_reads(model: AdaptiveForCausalLM, ids: Tensor) -> None:
    """Closed form: the attention's output is bias + sum over heads of gate * head @ its rows of the projection."""
    attn = model.transformer.h[1].attn
    hidden = torch.randn(2, 9, 32)
    gates = torch.tensor([0.5, 0.0, -2.0, 1.0])
    mixed, _ = attn(hidden, gates)
    query, key, value = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in attn.c_attn(hidden).chunk(3, -1))
    scores = (query @ key.mT / 8**0.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    heads = scores.softmax(-1) @ value  # [batch, head, time, 8]
    expected = attn.c_proj.bias + sum(
        gates[head] * heads[:, head] @ attn.c_proj.weight[8 * head : 8 * (head + 1)] for head in range(4)
    )
    torch.testing.assert_close(mixed, expected)


def test_a_closed_layer_still_adds_its_bias(model: AdaptiveForCausalLM) -> None:
    attn = model.transformer.h[0].attn
    mixed, _ = attn(torch.randn(1, 5, 32), torch.zeros(4))
    torch.testing.assert_close(mixed, attn.c_proj.bias.expand(1, 5, 32))


@pytest.mark.parametrize("place", PLACES[::3], ids=lambda place: f"layer{place[0]}-head{place[1]}")
def test_every_gate_moves_the_logits(model: AdaptiveForCausalLM, ids: Tensor, place: tuple[int, int]) -> None:
    before = model(ids).logits
    model.gates.data[place] = 0
    assert (model(ids).logits - before).abs().max() > 1e-3


class TestPruned:
    @pytest.fixture
    def pruned(self, model: AdaptiveForCausalLM) -> AdaptiveForCausalLM:
        model.prune_heads(PRUNED)
        return model

    def test_has_smaller_matrices(self, pruned: AdaptiveForCausalLM) -> None:
        for layer, heads in PRUNED.items():
            attn = pruned.transformer.h[layer].attn
            left = 8 * (HEADS - len(heads))
            assert attn.c_attn.weight.shape == (32, 3 * left)
            assert attn.c_attn.bias.shape == (3 * left,)
            assert attn.c_proj.weight.shape == (left, 32)
            assert attn.c_proj.bias.shape == (32,)

    def test_is_loaded_as_it_was_saved(self, pruned: AdaptiveForCausalLM, ids: Tensor, tmp_path: Path) -> None:
        pruned.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(loaded, AdaptiveForCausalLM)
        assert loaded.config.kept_heads == [[0, 2, 3], [1, 3], [0, 1, 2, 3], [2]]
        torch.testing.assert_close(loaded(ids).logits, pruned(ids).logits, rtol=0, atol=0)

    def test_can_be_pruned_again(self, pruned: AdaptiveForCausalLM, ids: Tensor) -> None:
        pruned.gates.data[0, 2] = pruned.gates.data[1, 3] = 0
        gated = pruned(ids).logits
        assert pruned.prune_heads() == {0: [2], 1: [3]}
        torch.testing.assert_close(pruned(ids).logits, gated, rtol=0, atol=1e-5)
        assert pruned.config.kept_heads == [[0, 3], [1], [0, 1, 2, 3], [2]]

    def test_caches_fewer_heads(self, pruned: AdaptiveForCausalLM, ids: Tensor) -> None:
        cache = pruned(ids, use_cache=True).past_key_values
        assert [layer.keys.shape[1] for layer in cache.layers] == [3, 2, 4, 1]

    def test_generates_the_same_with_a_static_cache(self, pruned: AdaptiveForCausalLM, ids: Tensor) -> None:
        settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids[:, :6])}
        dynamic = pruned.generate(ids[:, :6], **settings)
        static = pruned.generate(ids[:, :6], cache_implementation="static", disable_compile=True, **settings)
        assert static.tolist() == dynamic.tolist()

    def test_follows_a_cast_and_a_copy(self, pruned: AdaptiveForCausalLM, ids: Tensor) -> None:
        double = copy.deepcopy(pruned).double()
        torch.testing.assert_close(double(ids).logits.float(), pruned(ids).logits, rtol=0, atol=1e-4)

    def test_gradients_are_those_of_the_gated_model(self, ids: Tensor) -> None:
        gated, pruned = (AdaptiveForCausalLM.from_gpt2(gpt2().double()) for _ in range(2))
        for layer, heads in PRUNED.items():
            gated.gates.data[layer, heads] = 0
        pruned.prune_heads(PRUNED)
        for model in (gated, pruned):
            model(ids, labels=ids).loss.backward()
        torch.testing.assert_close(gated.transformer.wte.weight.grad, pruned.transformer.wte.weight.grad)
        for index, (one, other) in enumerate(zip(gated.transformer.h, pruned.transformer.h)):
            rows = one.attn.c_proj.weight.grad.unflatten(0, (4, 8))[pruned.config.heads_of(index)].flatten(0, 1)
            torch.testing.assert_close(rows, other.attn.c_proj.weight.grad)

    def test_frozen_weights_stay_frozen(self, model: AdaptiveForCausalLM) -> None:
        model.requires_grad_(False)
        model.prune_heads(PRUNED)
        assert not any(parameter.requires_grad for parameter in model.parameters())


class TestSkips:
    def test_change_nothing_until_trained(self, ids: Tensor) -> None:
        plain, skipping = (AdaptiveForCausalLM.from_gpt2(gpt2(), skips=skips) for skips in (False, True))
        torch.testing.assert_close(skipping(ids).logits, plain(ids).logits, rtol=0, atol=0)

    def test_stand_in_the_upper_half(self, model: AdaptiveForCausalLM) -> None:
        assert [block.skip is not None for block in model.transformer.h] == [False, False, True, True]

    @pytest.mark.parametrize(("upper", "lower"), [(2, 1), (3, 0)])
    def test_bring_the_output_of_the_mirrored_layer(
        self, model: AdaptiveForCausalLM, ids: Tensor, upper: int, lower: int
    ) -> None:
        seen: dict[int, Tensor] = {}
        skip = model.transformer.h[upper].skip
        skip.register_forward_pre_hook(lambda module, args: seen.update({upper: args[1]}))
        model.transformer.h[lower].register_forward_hook(lambda module, args, output: seen.update({lower: output}))
        model(ids)
        torch.testing.assert_close(seen[upper], seen[lower], rtol=0, atol=0)

    def test_add_scale_times_a_mix_of_both(self, model: AdaptiveForCausalLM) -> None:
        skip = model.transformer.h[3].skip
        skip.scale.data.fill_(0.5)
        x, lower = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        weight = skip.mix.weight
        expected = x + 0.5 * (x @ weight[:, :32].T + lower @ weight[:, 32:].T + skip.mix.bias)
        torch.testing.assert_close(skip(x, lower), expected)

    def test_learn_from_the_first_step(self, model: AdaptiveForCausalLM, ids: Tensor) -> None:
        model(ids, labels=ids).loss.backward()
        assert all(block.skip.scale.grad.abs().item() > 0 for block in model.transformer.h[2:])

    def test_an_odd_depth_leaves_the_middle_alone(self) -> None:
        config = AdaptiveConfig(vocab_size=8, n_embd=8, n_head=2, n_layer=5, skips=True)
        blocks = AdaptiveForCausalLM(config).transformer.h
        assert [block.skip is not None for block in blocks] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("heads", "message"),
    [({4: [0]}, "no layer 4"), ({-1: [0]}, "no layer -1"), ({0: [4]}, "layer 0 has no head 4")],
    ids=["layer", "negative layer", "head"],
)
def test_refuses_what_is_not_there(model: AdaptiveForCausalLM, heads: dict[int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.prune_heads(heads)
    assert model.config.kept_heads is None
    assert bool((model.gates == 1).all())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_embd": 30}, "no multiple of n_head"),
        ({"kept_heads": [[0]]}, "names 1 layers"),
        ({"kept_heads": [[0], [], [0], [0]]}, "layer 1 is"),
        ({"kept_heads": [[0], [1, 0], [0], [0]]}, "layer 1 is"),
        ({"kept_heads": [[0], [4], [0], [0]]}, "from 0 to 3"),
    ],
    ids=["width", "layers", "empty layer", "order", "range"],
)
def test_refuses_a_config_that_does_not_fit(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        AdaptiveConfig(**{"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 8} | wrong)


def test_refuses_more_tokens_than_positions(model: AdaptiveForCausalLM) -> None:
    with pytest.raises(ValueError, match="129 tokens at once: the model has 128 positions"):
        model(torch.zeros(1, 129, dtype=torch.long))


def test_refuses_ids_and_embeddings_together(model: AdaptiveForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(3, 40, 32))
    with pytest.raises(ValueError, match="exactly one"):
        model()
