"""math_adaptive: what it reads from token strings, and that brackets are counted over everything before a token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from fixtures.problems import math_tokenizer
from fixtures.subjects import positional
from fixtures.tokenizers import byte_pairs
from models.positional import PositionalConfig, PositionalForCausalLM, graft
from models.positional.math_adaptive import MathAdaptive, nearest_tokens
from models.positional.token_tables import CLASSES, TokenTables, kind, precedence, token_tables


def encoding() -> MathAdaptive:
    torch.manual_seed(0)
    made = PositionalForCausalLM(PositionalConfig.sized("tiny", "math_adaptive", vocab_size=101))
    made.read_tokenizer(math_tokenizer())
    assert isinstance(made.position_encoding(), MathAdaptive)
    return made.position_encoding()  # type: ignore[return-value]


ENCODING = encoding()


def ids_of(text: str) -> Tensor:
    return torch.tensor([math_tokenizer().encode(text, add_special_tokens=False)])


def by_stack(text: str, deepest: int = 15) -> tuple[list[int], list[int]]:
    """Depth and place of every character, with a stack."""
    depths, places, starts = [], [], []
    for number, sign in enumerate(text, 1):
        if sign in "([{":
            starts.append(number)
        depth = len(starts)
        depths.append(min(depth, deepest))
        places.append(number - starts[min(depth, deepest) - 1] if starts else number)
        if sign in ")]}" and starts:
            starts.pop()
    return depths, places


def test_precedence_is_that_of_arithmetic() -> None:
    levels = [precedence(sign) for sign in "a=<+*^"]
    assert levels == [0, 1, 2, 3, 4, 5]
    assert precedence("-") == precedence("+")
    assert precedence(">") == precedence("<")
    assert precedence("/") == precedence("*")
    assert precedence("**") == precedence("^")
    assert precedence("+=") == precedence("+")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", "digit"), ("42", "digit"), ("3.14", "digit"), ("x", "letter"), (" sum", "word"), ("+", "operator"),
        (" ^", "operator"), ("(", "open"), ("]", "close"), (",", "punctuation"), ("  ", "space"), ("x2", "other"),
        ("", "other"),
    ],
)  # fmt: skip
def test_token_class(text: str, expected: str) -> None:
    assert kind(text) == expected


@pytest.mark.parametrize("make", [math_tokenizer, byte_pairs])
def test_tables_read_decoded_strings(make: type[PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    tables = TokenTables(*token_tables(tokenizer, len(tokenizer) + 7))
    for sign, level in (("=", 1), ("<", 2), ("+", 3), ("*", 4), ("^", 5), ("(", 0)):
        token = tokenizer.encode(sign, add_special_tokens=False)[-1]
        assert tables.precedence[token] == level
        assert tables.opens[token] == (sign == "(")
    assert CLASSES[tables.kind[tokenizer.eos_token_id]] == "special"
    assert all(row[len(tokenizer) :].eq(0).all() for row in tables)


@given(st.text(alphabet="([{)]}ab+", min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_structure_is_that_of_a_stack(text: str) -> None:
    depth, place = ENCODING.structure(ENCODING.look_up(ids_of(text)), None, None, torch.float32)
    expected = by_stack(text)
    assert depth[0].tolist() == expected[0]
    assert place[0].tolist() == expected[1]


@given(
    st.text(alphabet="([)]ab", min_size=2, max_size=24), st.integers(0, 5), st.sampled_from(["left", "right"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_structure_through_padding_and_cache(
    text: str, pads: int, side: str, sizes: list[int], dtype: torch.dtype
) -> None:
    """In chunks over a cache, padded on either side: as in one piece."""
    ids = ids_of(text)
    blank = torch.full((1, pads), ids_of("(")[0, 0].item())  # a pad that would open a bracket
    gap = torch.zeros(1, pads, dtype=torch.long)
    parts = (blank, ids), (gap, torch.ones_like(ids))
    padded, mask = (torch.cat(pair if side == "left" else pair[::-1], 1) for pair in parts)
    cache, depths, places, seen = DynamicCache(), [], [], 0
    while seen < padded.shape[1]:
        size = sizes[len(depths) % len(sizes)]
        chunk = ENCODING.look_up(padded[:, seen : seen + size])
        count = chunk.opens.shape[1]
        depth, place = ENCODING.structure(chunk, mask[:, : seen + count], cache, dtype)
        cache.update(torch.zeros(1, 1, count, 1), torch.zeros(1, 1, count, 1), 0)  # the model's own first layer
        depths.append(depth)
        places.append(place)
        seen += count
    real, expected = mask[0].bool(), by_stack(text)
    assert torch.cat(depths, 1)[0][real].tolist() == expected[0]
    assert torch.cat(places, 1)[0][real].tolist() == expected[1]


def test_several_brackets_in_one_token() -> None:
    tables = TokenTables(*torch.tensor([[[2, 0, 0, 0, 0]], [[0, 0, 1, 0, 1]], [[0] * 5], [[0] * 5]]))
    depth, place = ENCODING.structure(tables, None, None, torch.float32)
    assert depth.tolist() == [[2, 2, 2, 1, 1]]
    assert place.tolist() == [[0, 1, 2, 3, 4]]


@torch.no_grad()
def test_brackets_and_operators_reach_the_logits() -> None:
    """Each component acts: silenced, the logits are others."""
    torch.manual_seed(0)
    model = positional.build("own", "math_adaptive").eval()
    encoding = model.position_encoding()
    ids = ids_of("(2 + 3) * [4 ^ (1 - x)] = y")
    for table in (encoding.depth, encoding.precedence, encoding.kind):
        before, kept = model(ids).logits, table.weight.clone()
        table.weight.zero_()
        assert (model(ids).logits - before).abs().max() > 1e-4
        table.weight.copy_(kept)
    before = model(ids).logits
    for component in range(5):
        encoding.mixing.zero_()[component] = 3.0
        assert (model(ids).logits - before).abs().max() > 1e-4


@torch.no_grad()
def test_embeddings_of_tokens_count_as_those_tokens() -> None:
    table = torch.randn(50, 16)
    ids = torch.tensor([[0, 7, 49, 7]])
    assert torch.equal(nearest_tokens(table[ids], table), ids)
    assert torch.equal(nearest_tokens(table[ids].bfloat16(), table), ids)
    soft = table[ids] + 0.1 * torch.randn(1, 4, 16)
    assert nearest_tokens(soft, table).eq(-1).all()


@torch.no_grad()
def test_soft_prompts_are_neutral() -> None:
    """A vector that is no token's opens no bracket and is of class "other"."""
    tokens = ENCODING.look_up(torch.tensor([[-1, 10_000]]))
    assert all(row.eq(0).all() for row in tokens)


def test_tables_are_saved_and_follow_the_vocabulary(tmp_path: Path) -> None:
    for base in ("own", "llama"):
        model = positional.build(base, "math_adaptive")
        tables = model.position_encoding().tables.clone()
        assert tables.count_nonzero() > 50
        model.save_pretrained(tmp_path / base)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / base)
        assert torch.equal(loaded.position_encoding().tables, tables)
        loaded.resize_token_embeddings(120)
        assert loaded.position_encoding().tables.shape == (4, 120)
        assert torch.equal(loaded.position_encoding().tables[:, :101], tables)
        loaded.save_pretrained(tmp_path / f"{base}_larger")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{base}_larger")
        assert again(torch.tensor([[119, 5]])).logits.shape == (1, 2, 120)


def test_grafting_it_needs_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="give graft"):
        graft(positional.base_model("gpt2"), "math_adaptive")
