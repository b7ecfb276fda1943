"""Logits and hidden-state scale beside transformers' GPT-2, for any shape: the same function, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fixtures.subjects.adaptive import gpt2
from models.adaptive import AdaptiveForCausalLM
from models.adaptive.parity import compare_hidden_states, plot

pytestmark = pytest.mark.adaptive

LOGITS = {torch.float32: 1e-5, torch.float64: 1e-10}
RATIO = 1e-5


@st.composite
def gpt2s(draw: st.DrawFn) -> GPT2LMHeadModel:
    """A GPT-2 of any width, depth and head count, every parameter away from 1 and 0."""
    heads = draw(st.integers(1, 8), label="heads")
    config = GPT2Config(
        vocab_size=draw(st.integers(5, 120), label="vocabulary"),
        n_positions=64,
        n_embd=heads * draw(st.integers(1, 16), label="width of a head"),
        n_layer=draw(st.integers(1, 6), label="layers"),
        n_head=heads,
        n_inner=draw(st.none() | st.integers(1, 100), label="inner width"),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu"]), label="activation"),
        scale_attn_weights=draw(st.booleans(), label="scaled"),
        scale_attn_by_inverse_layer_idx=draw(st.booleans(), label="scaled by layer"),
        tie_word_embeddings=draw(st.booleans(), label="tied"),
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(draw(st.integers(0, 1000), label="seed"))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@settings(max_examples=25, deadline=None)
@given(
    base=gpt2s(), skips=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]), time=st.integers(1, 40)
)
def test_any_gpt2_keeps_its_logits_and_its_scale(
    base: GPT2LMHeadModel, skips: bool, dtype: torch.dtype, time: int
) -> None:
    base = base.to(dtype)
    ours = AdaptiveForCausalLM.from_gpt2(base, skips=skips)
    parity = compare_hidden_states(ours, base, torch.randint(base.config.vocab_size, (2, time)))
    assert parity.logits_difference <= LOGITS[dtype]
    assert parity.worst_ratio <= RATIO
    assert parity.same_top_token == 1


class TestHiddenStateScale:
    """RMS of every hidden state over GPT-2's at the same layer."""

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("layer", range(5))
    def test_ratio_is_one_at_layer(self, layer: int, implementation: str) -> None:
        base = gpt2()
        base.set_attn_implementation(implementation)
        ours = AdaptiveForCausalLM.from_gpt2(base)
        found = compare_hidden_states(ours, base, torch.randint(64, (3, 50))).layers[layer]
        assert found.rms_ratio == pytest.approx(1, abs=RATIO)
        assert found.difference <= 1e-5

    def test_ratio_is_one_in_train_mode_with_the_same_dropout(self) -> None:
        base = gpt2().train()
        ours = AdaptiveForCausalLM.from_gpt2(base)
        ids = torch.randint(64, (2, 30))
        states = []
        for model in (base, ours):
            torch.manual_seed(0)
            states.append(model(ids, output_hidden_states=True).hidden_states)
        for theirs, mine in zip(*states):
            torch.testing.assert_close(mine, theirs)

    @pytest.mark.parametrize("factor", [0.3, 0.99])
    def test_a_scaled_stream_shows_in_the_ratio(self, factor: float) -> None:
        base = gpt2()
        ours = AdaptiveForCausalLM.from_gpt2(base)
        ours.transformer.h[1].register_forward_hook(lambda module, args, output: output * factor)
        parity = compare_hidden_states(ours, base, torch.randint(64, (3, 50)))
        assert parity.layers[1].rms_ratio == pytest.approx(1, abs=RATIO)
        assert parity.layers[2].rms_ratio == pytest.approx(factor, rel=0.01)

    def test_exact_gelu_shows_in_the_logits(self) -> None:
        base = gpt2()
        ours = AdaptiveForCausalLM.from_gpt2(base)
        for block in ours.transformer.h:
            block.mlp.act = torch.nn.GELU()
        assert compare_hidden_states(ours, base, torch.randint(64, (3, 50))).logits_difference > 1e-5

    def test_gates_of_nine_tenths_show_in_every_layer(self) -> None:
        base = gpt2()
        ours = AdaptiveForCausalLM.from_gpt2(base)
        ours.gates.data.fill_(0.9)
        parity = compare_hidden_states(ours, base, torch.randint(64, (3, 50)))
        assert parity.worst_ratio > RATIO
        assert all(layer.difference > 1e-3 for layer in parity.layers[1:])

    def test_is_drawn_by_layer(self, tmp_path: Path) -> None:
        base = gpt2()
        ours = AdaptiveForCausalLM.from_gpt2(base)
        parity = compare_hidden_states(ours, base, torch.randint(64, (1, 8)))
        plot({"adaptive": parity}, tmp_path / "parity.png")
        assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")

    def test_refuses_models_of_different_depth(self) -> None:
        base = gpt2()
        other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_head=2, n_layer=2)).eval()
        with pytest.raises(ValueError, match="2 layers beside 4"):
            compare_hidden_states(other, base, torch.randint(64, (1, 8)))


class TestFromGPT2:
    def test_takes_a_path(self, tmp_path: Path) -> None:
        gpt2().save_pretrained(tmp_path)
        ours = AdaptiveForCausalLM.from_gpt2(tmp_path)
        ids = torch.randint(64, (2, 20))
        torch.testing.assert_close(ours(ids).logits, gpt2()(ids).logits, rtol=0, atol=1e-5)

    def test_leaves_the_source_alone(self) -> None:
        base = gpt2()
        ours = AdaptiveForCausalLM.from_gpt2(base)
        ours.gates.data.zero_()
        ours.prune_heads()
        for ours_, theirs in zip(base.parameters(), gpt2().parameters()):
            torch.testing.assert_close(ours_, theirs, rtol=0, atol=0)

    def test_every_gate_is_exactly_one(self) -> None:
        assert bool((AdaptiveForCausalLM.from_gpt2(gpt2()).gates == 1).all())

    @pytest.mark.parametrize("mode", [True, False])
    def test_takes_over_the_mode(self, mode: bool) -> None:
        assert AdaptiveForCausalLM.from_gpt2(gpt2().train(mode)).training is mode

    def test_generates_what_gpt2_generates(self) -> None:
        base = gpt2()
        ids = torch.randint(4, 64, (3, 6))
        settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        for beams in (1, 3):
            made = [
                model.generate(ids, num_beams=beams, **settings)
                for model in (AdaptiveForCausalLM.from_gpt2(base), base)
            ]
            assert made[0].tolist() == made[1].tolist()

    def test_refuses_another_kind_of_model(self) -> None:
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        with pytest.raises(TypeError, match="not LlamaForCausalLM"):
            AdaptiveForCausalLM.from_gpt2(llama)

    def test_refuses_another_kind_of_checkpoint(self, tmp_path: Path) -> None:
        LlamaConfig(vocab_size=8).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="type 'llama', not of GPT-2"):
            AdaptiveForCausalLM.from_gpt2(tmp_path)

    def test_refuses_cross_attention(self) -> None:
        config = GPT2Config(vocab_size=8, n_embd=8, n_head=2, n_layer=1, add_cross_attention=True, is_decoder=True)
        with pytest.raises(ValueError, match="cross-attention"):
            AdaptiveForCausalLM.from_gpt2(GPT2LMHeadModel(config))
