"""Tiny models: their sizes, and that every architecture runs, learns and is reproducible."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lmconform import shrinking
from lmconform.shrinking import UnknownType, Unshrinkable, causal_types, tiny_config, tiny_model

# One type for each structural family: layout of heads, positions, experts, recurrence, composites.
FAMILIES = [
    "llama",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "bloom",
    "mpt",
    "bert",
    "bart",
    "xlnet",
    "reformer",
    "mixtral",
    "dbrx",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "llama4",
    "gemma2",
    "gemma3n_text",
    "gemma4_text",
    "mamba",
    "mamba2",
    "rwkv",
    "xlstm",
    "recurrent_gemma",
    "jamba",
    "zamba2",
    "nemotron_h",
    "qwen3_next",
    "kimi_linear",
    "musicgen",
]

UNREACHED = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant"}


@pytest.fixture(autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _check_runs(model_type: str) -> None:
    model = tiny_model(model_type)
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (2, 20), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (2, 20, vocab)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    model.train()
    # A cache that is written in place cannot be differentiated through (xlstm), and training needs none.
    model.config.use_cache = False
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tiny_model_runs_forward_and_backward(model_type: str) -> None:
    _check_runs(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_types())
def test_every_type_runs_or_says_why_not(model_type: str) -> None:
    try:
        tiny_config(model_type)
    except Unshrinkable as error:
        pytest.skip(str(error))
    _check_runs(model_type)


@pytest.mark.slow
def test_nearly_all_types_are_reached() -> None:
    unreached = set()
    for model_type in causal_types():
        try:
            tiny_model(model_type)
        except Unshrinkable:
            unreached.add(model_type)
    assert len(causal_types()) - len(unreached) >= 0.9 * len(causal_types())
    assert unreached >= UNREACHED & set(causal_types())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tiny_model_is_small(model_type: str) -> None:
    assert sum(parameter.numel() for parameter in tiny_model(model_type).parameters()) < 1_000_000


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2", "qwen3", "gpt_oss", "cohere2"])
def test_sizes_tell_dimensions_apart(model_type: str) -> None:
    config = tiny_config(model_type)
    assert config.vocab_size == shrinking.VOCAB
    assert config.num_hidden_layers == shrinking.LAYERS
    assert config.num_attention_heads == shrinking.HEADS
    assert config.num_key_value_heads == shrinking.KV_HEADS
    assert config.hidden_size == shrinking.HIDDEN
    assert config.intermediate_size == shrinking.INTERMEDIATE
    assert config.max_position_embeddings == shrinking.POSITIONS
    sizes = {config.vocab_size, config.hidden_size, config.intermediate_size, config.max_position_embeddings}
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("gemma2", {"sliding_attention", "full_attention"}),
        ("lfm2", {"conv", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("bamba", {"linear_attention", "full_attention"}),
        ("jamba", {"linear_attention", "full_attention"}),
        ("recurrent_gemma", {"linear_attention", "sliding_attention"}),
        ("nemotron_h", {"linear_attention", "moe", "full_attention", "mlp"}),
        ("zamba2", {"linear_attention", "hybrid"}),
    ],
)
def test_every_layer_kind_is_present(model_type: str, kinds: set[str]) -> None:
    config = tiny_config(model_type)
    assert set(config.layer_types) == kinds
    assert len(config.layer_types) == config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"])
def test_experts_are_four_of_which_two_act(model_type: str) -> None:
    config = tiny_config(model_type)
    assert config.num_experts_per_tok == shrinking.EXPERTS_PER_TOKEN
    named = ("num_local_experts", "num_experts", "n_routed_experts")
    assert shrinking.EXPERTS in [getattr(config, name, None) for name in named]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_special_tokens_lie_inside_the_vocabulary(model_type: str) -> None:
    config = tiny_config(model_type).get_text_config(decoder=True)
    tokens = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    used = [token for token in tokens if token is not None]
    assert all(isinstance(token, int) and 0 <= token < config.get_text_config().vocab_size for token in used)
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba2", "deepseek_v3"])
def test_the_seed_decides_the_weights(model_type: str) -> None:
    first, again, other = (tiny_model(model_type, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_random_state_of_the_caller_is_untouched() -> None:
    before = torch.get_rng_state()
    tiny_model("llama", seed=7)
    assert torch.equal(before, torch.get_rng_state())


def test_tiny_model_is_in_eval_mode() -> None:
    model = tiny_model("gpt2")
    assert not any(module.training for module in model.modules())


def test_a_mistyped_name_gets_suggestions() -> None:
    with pytest.raises(UnknownType, match="mixtral"):
        tiny_config("mixtrall")
    with pytest.raises(LookupError, match="'gpt2'"):
        tiny_model("gpt-2")


def test_an_impossible_type_says_why_in_one_sentence() -> None:
    with pytest.raises(Unshrinkable) as caught:
        tiny_config("gemma4_assistant")
    assert caught.value.model_type == "gemma4_assistant"
    assert "hidden states" in caught.value.reason
    assert "\n" not in str(caught.value)
    assert caught.value.reason.endswith(".")


def test_every_adjustment_gives_its_reason() -> None:
    for model_type, entry in shrinking._adjustments().items():
        assert ("why" in entry) != ("unshrinkable" in entry), model_type


def test_importing_the_module_is_cheap() -> None:
    code = "import sys, lmconform.shrinking; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
