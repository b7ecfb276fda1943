"""graft, and what transformers does with the result: save, load, train, adapters, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Model

from fixtures.problems import PROBLEMS, math_tokenizer
from fixtures.subjects import positional
from models.positional import BASES, METHODS, graft

IDS = torch.randint(4, 100, (2, 20), generator=torch.Generator().manual_seed(5))
COMBINATIONS = [
    pytest.param(base, variant, id=f"{base}_{variant}") for base in positional.BASES for variant in positional.VARIANTS
]


def grafted(base: str, method: str, **how: Any) -> Any:
    torch.manual_seed(0)
    return graft(positional.base_model(base).eval(), method, tokenizer=math_tokenizer(), **how)


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
@torch.no_grad()
def test_round_trip_through_the_auto_classes(base: str, variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = positional.build(base, variant).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.to_diff_dict() == model.config.to_diff_dict()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_base_is_untouched_and_shares_nothing(base: str, method: str) -> None:
    torch.manual_seed(0)
    theirs = positional.base_model(base).eval()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    model = graft(theirs, method, tokenizer=math_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())
    own = {name for name in model.state_dict() if not name.startswith("encoding.")}
    assert own == set(before) - {"transformer.wpe.weight"}
    assert not any("wpe" in name or "rotary" in name for name in model.state_dict())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_type_and_mode_are_the_base_s(base: str, dtype: torch.dtype) -> None:
    theirs = positional.base_model(base).to(dtype).train()
    model = graft(theirs, "sinusoidal")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.training
    assert not grafted(base, "alibi").training


def test_gpt2_stays_tied() -> None:
    model = grafted("gpt2", "alibi")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_grafts_from_a_directory(tmp_path: Path) -> None:
    positional.base_model("llama").save_pretrained(tmp_path)
    assert graft(tmp_path, "rope").config.model_type == "positional_llama"


def test_rope_can_be_given_other_parameters() -> None:
    parameters = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    model = grafted("gpt_neox", "rope", rope_parameters=parameters)
    assert model.encoding.tables.inv_freq.shape == (4,)
    assert model.config.rope_parameters["rope_theta"] == 500.0


def test_rope_keeps_the_share_of_the_base() -> None:
    assert grafted("gpt_neox", "rope").encoding.tables.inv_freq.shape == (2,)  # a quarter of 16, in pairs
    assert grafted("llama", "rope").encoding.tables.inv_freq.shape == (6,)
    assert grafted("gpt2", "rope").encoding.tables.inv_freq.shape == (6,)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)), "not BloomForCau"),
        (lambda: GPT2Model(positional.base_model("gpt2").config), "not GPT2Model"),
    ],
)
def test_other_models_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        graft(make(), "alibi")


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'learned' is none of rope"):
        graft(positional.base_model("gpt2"), "learned")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_checkpointed_gradients_are_the_same(base: str, variant: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = positional.build(base, variant).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("base", "variant"),
    [
        pytest.param(base, variant, id=f"{base}_{variant}", marks=[] if base == "own" else [pytest.mark.slow])
        for base in positional.BASES
        for variant in positional.VARIANTS
    ],
)
def test_memorises_a_problem(base: str, variant: str) -> None:
    torch.manual_seed(0)
    model = positional.build(base, variant).train()
    text = f"{PROBLEMS[10].question} {PROBLEMS[10].answer}"
    ids = torch.tensor([math_tokenizer().encode(text)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.eval()
    start = ids[:, :8]
    made = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=ids.shape[1] - 8, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert math_tokenizer().decode(made[0]) == math_tokenizer().decode(ids[0])


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
def test_adapters_start_inert_train_and_merge(base: str, variant: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = positional.build(base, variant).eval()
    expected = model(IDS).logits.detach()
    targets = {"own": ["qkv"], "gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "llama": ["q_proj", "v_proj"]}
    how = LoraConfig(r=4, target_modules=targets[base], task_type="CAUSAL_LM", fan_in_fan_out=base == "gpt2")
    adapted = get_peft_model(model, how)
    torch.testing.assert_close(adapted(IDS).logits, expected)  # a frozen bias takes another kernel: not bit for bit
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    trained = adapted(IDS).logits.detach()
    assert not torch.allclose(trained, expected)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, trained, rtol=1e-4, atol=1e-5)
