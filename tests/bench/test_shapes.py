"""Architectures of transformers in a stated shape."""

from __future__ import annotations

import pytest

from lmconform.bench.shapes import SHAPES, Shape, of_transformers
from lmconform.subject import BuildError

SMALL = Shape(vocabulary=120, width=48, layers=3, heads=6, hidden=96, context=64)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "bloom", "mpt", "mistral", "qwen3"])
def test_comes_in_the_shape(model_type: str) -> None:
    model = of_transformers(model_type, SMALL)
    text = model.config
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (120, 48, 3, 6)
    assert not model.training
    assert model(input_ids=model.dummy_inputs["input_ids"]).logits.shape[-1] == 120


def test_the_seed_draws_the_weights() -> None:
    one, same, other = (next(of_transformers("llama", SMALL, seed).parameters()) for seed in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


def test_124m_is_gpt2_small() -> None:
    from transformers import GPT2Config

    small, shape = GPT2Config(), SHAPES["124m"]
    assert (shape.vocabulary, shape.width, shape.layers, shape.heads, shape.context) == (
        small.vocab_size, small.n_embd, small.n_layer, small.n_head, small.n_positions
    )  # fmt: skip
    assert shape.hidden == 4 * small.n_embd


@pytest.mark.parametrize(
    ("model_type", "text"), [("lama", "did you mean 'llama'"), ("gemma3", "does not come in the shape")]
)
def test_what_does_not_come_in_a_shape_is_refused(model_type: str, text: str) -> None:
    with pytest.raises(BuildError, match=text):
        of_transformers(model_type, SMALL)
