"""Each encoding by itself and inside models: it acts, it is relative where it says so, whatever the shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixtures.subjects import positional
from models.positional import METHODS, PositionalConfig, PositionalForCausalLM, make_encoding
from models.positional.alibi import slopes
from models.positional.diet import DietAbs, DietRel

IDS = torch.randint(4, 100, (2, 30), generator=torch.Generator().manual_seed(5))
COMBINATIONS = [
    pytest.param(base, variant, id=f"{base}_{variant}") for base in positional.BASES for variant in positional.VARIANTS
]
RELATIVE = ("rope", "t5_relative", "diet", "alibi")


def loud(base: str, variant: str) -> Any:
    torch.manual_seed(2)
    model = positional.build(base, variant).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def encoding(variant: str, **sizes: Any) -> Any:
    method, options = positional.VARIANTS[variant]
    torch.manual_seed(0)
    return make_encoding(PositionalConfig(pe_method=method, pe_options=options, **sizes))


def all_at_zero(model: Any) -> Tensor:
    """Logits when every token stands at position 0; the mask keeps equal positions from reading as packed texts."""
    return model(IDS, attention_mask=torch.ones_like(IDS), position_ids=torch.zeros_like(IDS)).logits


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
@torch.no_grad()
def test_positions_change_the_logits(base: str, variant: str) -> None:
    """No method is a no-op: without positions the logits are others, and not by rounding."""
    model = loud(base, variant)
    logits = model(IDS).logits
    change = (logits - all_at_zero(model)).abs().amax(-1)[:, 1:]
    assert change.mean() > 1e-2 * logits.std()


@pytest.mark.parametrize("base", positional.BASES)
@torch.no_grad()
def test_methods_differ_from_each_other(base: str) -> None:
    """rope, sinusoidal, t5_relative, diet, alibi, math_adaptive: six different models of the same weights."""
    made = {}
    for variant in positional.VARIANTS:
        model = loud(base, variant)
        made[variant] = model(IDS).logits
    names = list(made)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            assert (made[first] - made[second]).abs().max() > 1e-2 * made[first].std(), f"{first} acts like {second}"


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
@torch.no_grad()
def test_shifting_all_positions(base: str, variant: str) -> None:
    """Relative methods do not see it, absolute ones do."""
    model = loud(base, variant)
    here = torch.arange(30)[None]
    change = (model(IDS, position_ids=here + 71).logits - model(IDS, position_ids=here).logits).abs().max()
    assert (change < 1e-4) == (variant in RELATIVE)


@pytest.mark.parametrize(("base", "variant"), COMBINATIONS)
@torch.no_grad()
def test_order_in_one_layer(base: str, variant: str) -> None:
    """Two earlier tokens swapped change the last logit, in a model whose first layer alone is left."""
    model = loud(base, variant)
    inner = model.base_model
    for name in ("blocks", "h", "layers"):
        if hasattr(inner, name):
            setattr(inner, name, getattr(inner, name)[:1])
    model.config.num_hidden_layers = 1
    swapped = IDS[:, [*range(27), 28, 27, 29]]
    change = (model(swapped, use_cache=False).logits - model(IDS, use_cache=False).logits)[:, -1].abs().max()
    assert change > 1e-4


shapes = given(
    heads=st.integers(1, 6), half=st.integers(1, 6), batch=st.integers(1, 3), time=st.integers(1, 12),
    past=st.integers(0, 9), start=st.integers(0, 40),
)  # fmt: skip


@pytest.mark.parametrize("variant", ["t5_relative", "diet", "diet_abs", "alibi"])
@shapes
@settings(max_examples=25, deadline=None)
def test_bias_has_a_row_a_query_whatever_the_shape(
    variant: str, heads: int, half: int, batch: int, time: int, past: int, start: int
) -> None:
    made = encoding(variant, hidden_size=2 * half * heads, num_attention_heads=heads)
    key = (torch.arange(past + time) + start).expand(batch, -1)
    bias = made.bias(key[:, past:], key, torch.float32)
    assert bias.shape == (batch, heads, time, past + time)
    assert bias.isfinite().all()
    if made.relative:
        torch.testing.assert_close(made.bias(key[:, past:] + 13, key + 13, torch.float32), bias)
    elif start + past + time > 1:
        assert not torch.equal(made.bias(key[:, past:] + 13, key + 13, torch.float32), bias)


@pytest.mark.parametrize("variant", ["sinusoidal", "math_adaptive"])
@shapes
@settings(max_examples=15, deadline=None)
def test_addition_keeps_shape_and_type_whatever_the_shape(
    variant: str, heads: int, half: int, batch: int, time: int, past: int, start: int
) -> None:
    made = encoding(variant, hidden_size=2 * half * heads, num_attention_heads=heads)
    ids = torch.zeros(batch, time, dtype=torch.long)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(batch, time, 2 * half * heads, dtype=dtype)
        added = made.to(dtype).add(x, ids, (torch.arange(time) + start)[None], None, None, torch.nn.Identity())
        assert added.shape == x.shape
        assert added.dtype == dtype
        assert not torch.equal(added, x)


@shapes
@settings(max_examples=15, deadline=None)
def test_rope_tables_turn_what_they_should(heads: int, half: int, batch: int, time: int, past: int, start: int) -> None:
    made = encoding("rope", hidden_size=2 * half * heads, num_attention_heads=heads)
    cos, sin = made(torch.zeros(1), (torch.arange(time) + start).expand(batch, -1))
    assert cos.shape == sin.shape == (batch, time, 2 * half)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))


@given(st.integers(1, 64))
@settings(max_examples=64, deadline=None)
def test_alibi_slopes_follow_the_paper(heads: int) -> None:
    made = slopes(heads)
    assert made.shape == (heads,)
    assert len(set(made.tolist())) == heads
    power = 2 ** math.floor(math.log2(heads))
    expected = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    expected += [2 ** (-8 * (2 * h + 1) / (2 * power)) for h in range(heads - power)]
    torch.testing.assert_close(made, torch.tensor(expected))


@torch.no_grad()
def test_alibi_is_slope_times_distance() -> None:
    bias = encoding("alibi", num_attention_heads=4).bias(torch.tensor([[5]]), torch.tensor([[0, 3, 5]]), torch.float32)
    assert bias[0, :, 0].tolist() == [[-5 * m, -2 * m, 0] for m in (0.25, 0.0625, 0.015625, 0.00390625)]


@torch.no_grad()
def test_diet_kinds_are_their_formulas() -> None:
    rel, absolute = encoding("diet"), encoding("diet_abs")
    assert isinstance(rel, DietRel)
    assert isinstance(absolute, DietAbs)
    query, key = torch.tensor([[6, 9]]), torch.tensor([[1, 6, 9]])
    scalars = rel.scalar.weight
    assert rel.bias(query, key, torch.float32)[0, 2, 1].tolist() == [scalars[d, 2].item() for d in (8, 3, 0)]
    p_query, p_key = (table.weight.unflatten(-1, (4, 8)) for table in (absolute.query, absolute.key))
    expected = p_query[[6, 9], 2] @ p_key[[1, 6, 9], 2].mT
    torch.testing.assert_close(absolute.bias(query, key, torch.float32)[0, 2], expected)


@torch.no_grad()
def test_diet_abs_refuses_what_lies_beyond_its_table() -> None:
    config = PositionalConfig(pe_method="diet", pe_options={"kind": "abs"}, max_position_embeddings=16)
    model = PositionalForCausalLM(config)
    model(IDS[:, :16] % 97)
    with pytest.raises(ValueError, match="table of 16 positions and is asked for 17"):
        model(IDS[:, :17] % 97)


@pytest.mark.parametrize("variant", ["rope", "sinusoidal", "t5_relative", "diet", "alibi", "math_adaptive"])
@pytest.mark.parametrize("base", positional.BASES)
@torch.no_grad()
def test_runs_beyond_the_stated_context(base: str, variant: str) -> None:
    """No table ends: 300 tokens on a context of 256, GPT-2 included, whose own table ended there."""
    ids = torch.randint(4, 100, (1, 300))
    assert loud(base, variant)(ids).logits.isfinite().all()


@torch.no_grad()
def test_sinusoidal_starts_as_loud_as_the_tokens() -> None:
    for base in positional.BASES:
        torch.manual_seed(0)
        model = positional.build(base, "sinusoidal")
        table = model.get_input_embeddings().weight
        zeros = torch.zeros(1, 256, 48)
        added = model.position_encoding().add(zeros, None, torch.arange(256)[None], None, None, torch.nn.Identity())
        assert 0.8 < added.square().mean().sqrt() / table.square().mean().sqrt() < 1.25


@pytest.mark.parametrize("method", METHODS)
def test_sizes(method: str) -> None:
    counts = {}
    for size in ("tiny", "small"):
        model = PositionalForCausalLM(PositionalConfig.sized(size, method))
        counts[size] = model.num_parameters()
    assert counts["tiny"] < 100_000
    assert 1_000_000 < counts["small"] < 5_000_000


@pytest.mark.parametrize("method", METHODS)
def test_the_report_size_is_that_of_pythia(method: str) -> None:
    with torch.device("meta"):
        model = PositionalForCausalLM(PositionalConfig.sized("pythia-2.8b", method))
    count = model.num_parameters()
    assert abs(count - 2_775_208_960) < 2e6  # Pythia 2.8 B
    if method == "rope":
        assert count == 2_775_208_960
        assert model.config.rope_parameters["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pe_method": "learned"}, "'learned' is none of rope, sinusoidal"),
        ({"pe_method": "rope", "pe_options": {"theta": 5}}, "rope has no option theta"),
        ({"pe_method": "diet", "pe_options": {"kind": "both"}}, '"rel" or "abs"'),
        ({"pe_method": "diet", "pe_options": {"kind": "abs", "rank": 0}}, "positive number, not 0"),
        ({"pe_method": "t5_relative", "pe_options": {"num_buckets": 512}}, "512 buckets do not fit"),
        ({"pe_method": "math_adaptive", "pe_options": {"max_depth": 0}}, "max_depth is a positive"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PositionalForCausalLM(PositionalConfig(**changes))


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'huge' is none of tiny, small, pythia"):
        PositionalConfig.sized("huge")
