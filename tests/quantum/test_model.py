"""The quantum model against its definition in complex numbers, and what its parts promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from models.quantum import QuantumConfig, QuantumForCausalLM
from models.quantum.modeling import Interference
from models.quantum.reference import complex_forward, parts
from models.quantum.system import SIZES, VOCABULARY, tiny


def model(seed: int = 0, **fields: Any) -> QuantumForCausalLM:
    """Tiny, in float64, no norm at 1 and no bias at 0."""
    torch.manual_seed(seed)
    made = QuantumForCausalLM(QuantumConfig(vocab_size=61, **SIZES["tiny"], **fields))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.double().eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"interference": True}, {"num_key_value_heads": 2}, {"attention_bias": False, "feed_forward_bias": False}],
    ids=["plain", "interference", "grouped", "unbiased"],
)
def test_real_arithmetic_is_the_complex_definition(fields: dict[str, Any], implementation: str) -> None:
    made = model(attn_implementation=implementation, **fields)
    ids = torch.randint(4, 61, (2, 40))
    logits, states = complex_forward(made, ids)
    assert states[0].dtype == torch.complex128
    output = made(ids, output_hidden_states=True)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-12)
    for ours, theirs in zip(output.hidden_states[:-1], states[:-1], strict=True):
        torch.testing.assert_close(ours, parts(theirs), rtol=0, atol=1e-12)


def test_attention_is_sdpa_by_default() -> None:
    assert tiny().config._attn_implementation == "sdpa"


class TestEmbedding:
    ids = torch.tensor([[7, 9, 11, 7]])

    def test_ratios_of_amplitudes_survive(self) -> None:
        made, changed = model(), model()
        changed.model.embedding.weight.data[7, 0] *= 2
        assert (made(self.ids).logits - changed(self.ids).logits).abs().max() > 1e-3

    def test_a_common_factor_does_not(self) -> None:
        made, changed = model(), model()
        changed.model.embedding.weight.data[:, : made.config.hidden_size // 2] *= 3
        torch.testing.assert_close(made(self.ids).logits, changed(self.ids).logits, rtol=0, atol=1e-4)

    def test_a_whole_turn_of_a_phase_changes_nothing(self) -> None:
        made, changed = model(), model()
        changed.model.embedding.weight.data[:, made.config.hidden_size // 2 :] += 2 * torch.pi
        torch.testing.assert_close(made(self.ids).logits, changed(self.ids).logits, rtol=0, atol=1e-12)

    def test_half_a_turn_is_the_opposite_wave(self) -> None:
        made = model().model
        polar = made.embedding(self.ids)
        turned = polar + torch.cat([torch.zeros(16), torch.full((16,), torch.pi)])
        wave, opposite = (made.encode(rows, None, self.ids, None, None) for rows in (polar, turned))
        torch.testing.assert_close(opposite, -wave, rtol=0, atol=1e-6)

    def test_fresh_waves_are_complex_normal(self) -> None:
        torch.manual_seed(0)
        polar = QuantumForCausalLM(QuantumConfig(vocab_size=4000, **SIZES["tiny"])).model.embedding.weight.detach()
        amplitude, phase = polar.chunk(2, dim=-1)
        wave = torch.cat([amplitude * phase.cos(), amplitude * phase.sin()])
        assert abs(float(wave.mean())) < 0.01
        assert abs(float(wave.std()) - 1) < 0.01
        assert abs(float(wave.pow(4).mean()) - 3) < 0.1

    def test_the_table_can_be_enlarged(self) -> None:
        made = model()
        before = made(self.ids).logits
        made.resize_token_embeddings(70)
        torch.testing.assert_close(made(self.ids).logits[..., :61], before, rtol=0, atol=1e-12)
        assert made(torch.tensor([[69]])).logits.isfinite().all()


class TestInterference:
    def layer(self, **fields: Any) -> Interference:
        torch.manual_seed(1)
        made = Interference(QuantumConfig(**SIZES["tiny"], **fields)).double()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return made

    def test_it_is_not_blind_to_the_sign(self) -> None:
        layer, states = self.layer(feed_forward_bias=False), torch.randn(5, 32).double()
        torch.testing.assert_close(layer(-states), -layer(states))
        assert (layer(states) < 0).any()
        assert (layer(states) > 0).any()

    def test_the_contrast_lies_between_dark_and_bright(self) -> None:
        """A reference equal to the wave doubles it, the opposite one puts it out."""
        layer, states = self.layer(feed_forward_bias=False), torch.randn(5, 32).double()
        layer.out.weight.data = torch.eye(32).double()
        layer.eps = 0.0
        for factor, expected in ((1.0, 2**0.5 * states), (-1.0, torch.zeros_like(states))):
            layer.reference.weight.data = factor * torch.eye(32).double()
            torch.testing.assert_close(layer(states), expected)

    def test_it_changes_what_the_model_says(self) -> None:
        made = model(interference=True)
        without = copy.deepcopy(made)
        for block in without.model.blocks:
            torch.nn.init.zeros_(block.feed_forward.interference.out.weight)
            torch.nn.init.zeros_(block.feed_forward.interference.out.bias)
        ids = torch.randint(4, 61, (2, 10))
        assert (made(ids).logits - without(ids).logits).abs().max() > 1e-3


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"hidden_size": 33, "num_attention_heads": 3}, "hidden_size 33 is odd"),
            ({"hidden_size": 30, "num_attention_heads": 2}, "head_dim 15 is odd"),
            ({"tie_word_embeddings": True}, "amplitudes and phases"),
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                "pair real parts with one another",
            ),
        ],
    )
    def test_sizes_that_are_no_complex_numbers_are_refused(self, fields: dict[str, Any], says: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=says):
            QuantumConfig(**fields)

    def test_tying_behind_its_back_is_refused(self) -> None:
        config = QuantumConfig()
        config.tie_word_embeddings = True
        with pytest.raises(ValueError, match="amplitudes and phases"):
            QuantumForCausalLM(config)

    def test_auto_classes_know_it(self) -> None:
        config = AutoConfig.for_model("quantum", **SIZES["tiny"])
        assert isinstance(AutoModelForCausalLM.from_config(config), QuantumForCausalLM)

    def test_sizes(self) -> None:
        with torch.device("meta"):
            count = {
                size: QuantumForCausalLM(QuantumConfig(vocab_size=VOCABULARY, **SIZES[size])).num_parameters()
                for size in ("small", "report")
            }
        assert tiny().num_parameters() < 100_000
        assert 1_000_000 < count["small"] < count["report"] < 5_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "layer"},
        {"norm_placement": "post"},
        {"gated": True},
        {"use_parallel_residual": True},
        {"embedding_norm": True},
        {"is_causal": False},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_the_reference_refuses_what_it_does_not_define(fields: dict[str, Any]) -> None:
    made = QuantumForCausalLM(QuantumConfig(**SIZES["tiny"], **fields))
    name = "rope_type" if "rope_parameters" in fields else next(iter(fields))
    with pytest.raises(ValueError, match=f"does not know {name}="):
        complex_forward(made, torch.tensor([[5]]))
