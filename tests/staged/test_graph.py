"""Graph routing: who is linked, that everybody is reached, and that rows, padding and the cache change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.staged import StagedConfig, StagedForCausalLM
from models.staged.graph import SOFTNESS, drawn, fixed_edges, meanings, routing_bias
from models.staged.system import tiny

TIME = 200
POSITIONS = torch.arange(TIME)[None]


def config(stage: int = 3, **changes: Any) -> StagedConfig:
    return StagedConfig.sized("tiny", stage, vocab_size=64, **{"graph_openness": 0.0, **changes})


def reached(edges: Tensor, layers: int) -> Tensor:
    """Which token hears of which after so many layers: boolean [query, key]."""
    step = (edges & torch.ones_like(edges).tril()).double()
    return torch.linalg.matrix_power(step, layers) > 0


@settings(deadline=None, max_examples=40)
@given(window=st.integers(1, 24), stretch=st.integers(1, 64), layers=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_every_earlier_token_is_reached_within_the_depth(window: int, stretch: int, layers: int, seed: int) -> None:
    """Or the config is refused: without one semantic edge, by neighbours and shortcuts alone."""
    sizes = {"graph_window": window, "graph_probability": 1 / stretch, "num_hidden_layers": layers, "graph_seed": seed}
    if stretch - 1 > (layers - 1) * window:
        with pytest.raises(Exception, match="out of reach"):
            config(**sizes)
        return
    found = reached(fixed_edges(POSITIONS, POSITIONS, config(**sizes))[0], layers)
    assert torch.equal(found, torch.ones(TIME, TIME, dtype=torch.bool).tril())


def test_the_named_sizes_reach_everything() -> None:
    for size in ("tiny", "small", "report"):
        sized = StagedConfig.sized(size, 3)
        assert sized.graph_stretch > 1
        far = torch.arange(sized.max_position_embeddings)[None]
        edges = fixed_edges(far, far, sized)[0]
        assert edges.tril().double().mean() < 0.25, "no graph, but a crowd"
        assert reached(edges, sized.num_hidden_layers).tril().sum() == far.numel() * (far.numel() + 1) // 2


def test_links_self_and_neighbours_and_shortcuts_by_chance() -> None:
    edges = fixed_edges(POSITIONS, POSITIONS, config(graph_window=4, graph_probability=1 / 4))[0]
    distance = POSITIONS[0][:, None] - POSITIONS[0]
    assert edges[(distance >= 0) & (distance <= 4)].all()
    share = edges[distance > 4].double().mean()
    assert abs(share - 1 / 4) < 0.02
    other = fixed_edges(POSITIONS, POSITIONS, config(graph_window=4, graph_probability=1 / 4, graph_seed=1))[0]
    assert not torch.equal(edges, other)


def test_draws_are_even_and_fixed() -> None:
    """The hash is the same for ever: a checkpoint's graph is part of what it learnt."""
    places = drawn(torch.arange(80_000), 8, seed=0)
    counts = places.bincount(minlength=8)
    assert (counts.double() / 10_000 - 1).abs().max() < 0.05
    assert drawn(torch.arange(8), 8, seed=0).tolist() == [1, 6, 1, 0, 7, 2, 5, 2]


def test_meaning_links_by_the_cosine_of_each_row() -> None:
    """Open above the bound by SOFTNESS, shut below it, and half open half way."""
    bound = 0.5
    sized = config(graph_similarity=bound)
    cosines = torch.tensor([[bound - 0.01, bound + SOFTNESS / 2, bound + SOFTNESS + 0.01]])
    angle = cosines.arccos()
    units = torch.stack((angle.cos(), angle.sin()), dim=-1)
    # far away, and no shortcut
    query, key = torch.tensor([[150]]), torch.tensor([[0, 1, 2]])
    free = ~fixed_edges(query, key, sized)[0, 0]
    share = routing_bias(query, key, torch.tensor([[[1.0, 0.0]]]), units, sized)[0, 0, 0].exp()
    torch.testing.assert_close(share[free], torch.tensor([0.0, 0.5, 1.0])[free], atol=1e-6, rtol=0)
    assert free.sum() >= 2


def test_openness_is_what_a_token_without_an_edge_counts() -> None:
    sized = config(graph_openness=0.3)
    unit = meanings(torch.eye(8)[None])  # nobody is like another
    places = torch.arange(8)[None] * 25
    share = routing_bias(places, places, unit, unit, sized)[0, 0].exp()
    edges = fixed_edges(places, places, sized)[0] | torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(share, torch.where(edges, 1.0, 0.3))


IDS = torch.randint(4, 64, (3, 48), generator=torch.Generator().manual_seed(1))


def loud(**changes: Any) -> StagedForCausalLM:
    torch.manual_seed(0)
    model = StagedForCausalLM(config(**changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    return model


@torch.no_grad()
def test_is_dense_at_probability_1_and_at_openness_1() -> None:
    sparse = loud(graph_similarity=1.0)
    dense = StagedForCausalLM(config(stage=2)).eval()
    dense.load_state_dict(sparse.state_dict())
    expected = dense(IDS).logits
    assert (sparse(IDS).logits - expected).abs().max() > 0.1 * expected.std()
    for changes in ({"graph_probability": 1.0}, {"graph_openness": 1.0}):
        other = StagedForCausalLM(config(**changes)).eval()
        other.load_state_dict(sparse.state_dict())
        assert torch.equal(other(IDS).logits, expected)


@pytest.mark.parametrize("full", [False, True], ids=["simple", "full"])
@torch.no_grad()
def test_semantic_edges_act_and_are_each_rows_own(full: bool) -> None:
    torch.manual_seed(0)
    model = tiny(3, full=full)
    together = model(IDS).logits
    for row in range(3):
        torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], together[row], atol=1e-5, rtol=1e-4)
    model.config.graph_similarity = 1.0
    assert (model(IDS).logits - together).abs().max() > 1e-3 * together.std()


@pytest.mark.parametrize("chunks", [[48], [1] * 48, [7, 1, 20, 20]], ids=["one", "token_by_token", "ragged"])
@torch.no_grad()
def test_cached_and_padded_tokens_keep_their_edges(chunks: list[int]) -> None:
    """Left padding in front of one row, and the rest fed by chunks on top of the cache."""
    model = loud(use_full_model=True, embed_dim=64)
    expected = model(IDS).logits
    mask = torch.ones(3, 53, dtype=torch.long)
    mask[1, :5] = 0
    ids = torch.cat((torch.zeros(3, 5, dtype=torch.long), IDS), dim=1)
    ids[[0, 2]] = torch.cat((IDS, torch.zeros(3, 5, dtype=torch.long)), dim=1)[[0, 2]]
    cache, start, found = None, 0, []
    for size in (*chunks, 5):
        out = model(ids[:, start : start + size], attention_mask=mask[:, : start + size], past_key_values=cache,
                    use_cache=True)  # fmt: skip
        cache, start = out.past_key_values, start + size
        found.append(out.logits)
    logits = torch.cat(found, dim=1)
    torch.testing.assert_close(logits[[0, 2], :48], expected[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 5:], expected[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generates_in_a_static_cache() -> None:
    """MU and the meanings are layers beyond those that a static cache makes room for."""
    model = tiny(3)
    mask = torch.ones_like(IDS[:, :8])
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = model.generate(IDS[:, :8], **settings)
    assert torch.equal(model.generate(IDS[:, :8], cache_implementation="static", **settings), expected)
