"""A leak is laid to what it comes from: to attention's mask, or to what else mixes over time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.faults import all_faults
from fixtures.planting import around
from fixtures.subjects import build
from fixtures.subjects.ports.recurrent import Recurrent
from lmconform import Subject
from lmconform.diagnosis import diagnose
from lmconform.diagnosis.probes import leak
from lmconform.diagnosis.probes.entrance import Kind, find_entrance
from lmconform.diagnosis.probes.finding import Verdict
from lmconform.registry import get_check
from lmconform.results import Cause
from lmconform.runner import Runner
from lmconform.specimen import Specimen

FAULTS = {fault.id: fault for fault in all_faults()}
LEAK = "causality.no_future_leak"


def named(specimen: Specimen, check: str = LEAK) -> Cause:
    runner = Runner(specimen, profile="smoke", shrink=False)
    result = runner.run(get_check(check))
    assert result.status == "failed", result.message
    return diagnose([result], runner)[0]


@pytest.mark.parametrize(
    ("id", "where"),
    [
        ("causality.convolution_padded_both_sides", "layers.0: torch.nn.functional.pad (causality_mixing.py"),
        ("causality.recurrence_both_ways", "layers.1.cell: torch.gru"),
        ("causality.state_starts_from_mean", "layers.0: Tensor.mean (causality_mixing.py"),
        ("causality.squeeze_and_excite", "layers.1: Tensor.mean"),
        ("causality.centred_average", "layers.1: torch.avg_pool1d"),
        ("causality.centred_over_text", "layers.1: Tensor.mean (causality_mixing.py"),
        ("causality.scaled_over_text", "layers.0: Tensor.mean (causality_mixing.py"),
        ("causality.gate_sees_next", "layers.1.attention.local: torch.conv1d"),
        ("causality.maximum_of_text_added", "h.2: Tensor.amax"),
        ("causality.centred_convolution", "model.embed_tokens.1.mix: torch.conv1d"),
        ("causality.next_token_mixed_in", "backbone.layers.1.mixer.in_proj: Tensor.__getitem__"),
        ("causality.group_norm", "layers.1.norm1: torch.nn.functional.group_norm"),
        ("causality.softmax_over_queries", "blocks.1.attention: Tensor.softmax (masks.py"),
        ("causality.masked_after_softmax", "layers.2.attention: Tensor.softmax (held_out_ports.py"),
        ("causality.heads_merged_without_transpose", "with it the leak is gone"),
    ],
)
def test_what_mixes_outside_the_mask_is_named_with_its_line(id: str, where: str) -> None:
    cause = named(FAULTS[id].open())
    assert cause.id in (FAULTS[id].cause, *FAULTS[id].also)
    assert where in cause.where


def test_in_train_mode_alone_too() -> None:
    def start(original: Any, x: Tensor) -> Tensor:
        return x.mean(1)[None].contiguous() if original.args[0].training else original(x)

    model = Recurrent()
    around(model.layers[0], start, "start")
    cause = named(Subject(lambda: model).open(), "causality.train_mode")
    assert cause.id == "mixer.not_causal"
    assert "layers.0: Tensor.mean (test_leaks.py" in cause.where


# -- attention that no mask can be laid over ---------------------------------------------------------------------------


def by_hand(model: Any, weigh: Callable[[Tensor], Tensor]) -> nn.Module:
    """The scores of one layer weighed by hand, without a mask."""
    around(model.layers[1].attention, lambda original, scores, may: weigh(scores), "weigh")
    return model


def exponentials(scores: Tensor) -> Tensor:
    power = (scores - scores.amax(-1, keepdim=True)).exp()
    return power / power.sum(-1, keepdim=True)


def sigmoids(scores: Tensor) -> Tensor:
    return scores.sigmoid() / scores.shape[-1]


def elsewhere(scores: Tensor) -> Tensor:
    """Torch sees nothing of it, as of a kernel of another library."""
    return torch.from_numpy(exponentials(scores.double()).detach().numpy()).to(scores)


@pytest.mark.parametrize("weigh", [exponentials, sigmoids, elsewhere])
def test_an_unmasked_attention_by_hand_is_still_laid_to_its_mask(weigh: Callable[[Tensor], Tensor]) -> None:
    cause = named(Subject(lambda: by_hand(build("linear_bias"), weigh)).open())
    assert cause.id == "mask.missing"
    assert "layers.1.attention: " in cause.where


class HeadsLast(nn.Module):
    """Attention with scores of [batch, query, key, heads], unmasked; its softmax runs over the keys, axis 2."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, width), nn.Linear(width, 61)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (part.unflatten(-1, (4, -1)) for part in self.qkv(x).chunk(3, -1))
        weights = torch.einsum("bqhd,bkhd->bqkh", q, k).softmax(2)
        return self.head(x + torch.einsum("bqkh,bkhd->bqhd", weights, v).flatten(2))


def test_a_softmax_over_keys_is_not_taken_for_one_over_queries() -> None:
    assert named(Subject(HeadsLast).open()).id == "mask.missing"


# -- in a model of one layer -------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """An embedding, a head, and `mix` of queries, keys and values [batch, time, width] between them."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(61, 48), nn.Linear(48, 3 * 48), nn.Linear(48, 61)
        self.mix = mix

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.mix(*self.qkv(x).chunk(3, -1)))


def by_frequencies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.fft.fft(v, dim=1).real


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.exp().mT @ v) / k.shape[1]


def keys_weighed_over_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k[..., :1].softmax(1) * v).sum(1, keepdim=True).expand_as(q)


def rolled_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.roll(-1, 1)


def split_without_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, time, width = q.shape
    parts = (part.reshape(batch, 4, time, width // 4) for part in (q, k, v))
    return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    missing = -q.shape[1] % 8
    blocks = (F.pad(part, (0, 0, 0, missing)).unflatten(1, (-1, 8)) for part in (q, k, v))
    return F.scaled_dot_product_attention(*blocks).flatten(1, 2)[:, : q.shape[1]]


@pytest.mark.parametrize(
    ("mix", "cause"),
    [
        (by_frequencies, "mixer.not_causal"),
        (linear_attention, "mixer.not_causal"),
        (keys_weighed_over_time, "mixer.not_causal"),
        (rolled_back, "mixer.not_causal"),
        (split_without_transpose, "attention.heads_scrambled"),
        (in_blocks, "mask.block_leak"),
    ],
)
def test_the_operation_decides(mix: Callable[[Tensor, Tensor, Tensor], Tensor], cause: str) -> None:
    found = named(Subject(lambda: Mixing(mix)).open())
    assert found.id == cause
    assert "(test_leaks.py:" in found.where


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)


def centred_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x -= x.mean(1)[:, None]
    return x


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


def scaled(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def by_root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


def by_variance_first(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return torch.rsqrt(variance + 1e-6) * (x - mean)


def over_text_and_width(x: Tensor) -> Tensor:
    return torch.div(x, x.pow(2).mean((1, 2), keepdim=True).sqrt())


def channels_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return (x - x.mean(-1, keepdim=True)).transpose(1, 2)


def mean_added(x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True)


def half_of_the_mean_taken(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True) / 2


def gated_by_the_mean(x: Tensor) -> Tensor:
    return x * x.mean(1, keepdim=True).sigmoid()


def less_the_maximum(x: Tensor) -> Tensor:
    return x - x.amax(1, keepdim=True)


def less_the_mean_of_something_else(x: Tensor) -> Tensor:
    return x - x.roll(1, -1).mean(1, keepdim=True)


def pooled_by_hand(x: Tensor) -> Tensor:
    weights = x[..., :1].exp()
    return x + (weights * x).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


NORMS = (
    centred, centred_in_place, standardised, scaled, by_root_mean_square, by_variance_first, over_text_and_width,
    channels_first,
)  # fmt: skip
MIXERS = (
    mean_added, half_of_the_mean_taken, gated_by_the_mean, less_the_maximum, less_the_mean_of_something_else,
    pooled_by_hand,
)  # fmt: skip


def with_fed(change: Callable[[Tensor], Tensor]) -> nn.Module:
    model = Recurrent()
    around(model.layers[-1], lambda original, x: original(change(x)), "feed")
    return model


@pytest.mark.parametrize("change", [*NORMS, *MIXERS])
def test_a_norm_over_time_that_is_written_out_is_a_norm(change: Callable[[Tensor], Tensor]) -> None:
    """What is centred or scaled by its own mean or size over the text; whatever else a reduction does is a mixer."""
    found = named(Subject(lambda: with_fed(change)).open())
    assert found.id == ("norm.over_sequence" if change in NORMS else "mixer.not_causal")
    assert "layers.1: " in found.where
    assert "(test_leaks.py:" in found.where


@pytest.mark.parametrize("change", [each for each in (*NORMS, *MIXERS) if each is not over_text_and_width])
def test_and_in_half_precision(change: Callable[[Tensor], Tensor]) -> None:
    """But for a statistic of one number, which may round to the same for two texts."""
    subject = Subject(lambda: with_fed(change)).open(dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (2, 1, 23), generator=generator)
    ids[1, :, :11] = ids[0, :, :11]
    found = find_entrance(subject, 23, [functools.partial(subject.logits, each) for each in ids])
    assert found is not None
    assert found.kind == (Kind.statistic if change in NORMS else Kind.mixing)


class Strict(Tensor):
    """Refuses what the model below never asks for, as wrappers of tensors do with functions that they do not know."""

    REFUSED = frozenset({"narrow", "ne", "__ne__", "reshape", "abs", "__abs__", "movedim", "new_ones", "double"})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in cls.REFUSED:
            raise TypeError(f"Strict knows no {func.__name__}()")
        return super().__torch_function__(func, types, args, kwargs or {})


class OnStrict(nn.Module):
    """Its residual stream is a Strict."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 48), nn.Linear(48, 61)
        self.layers = nn.ModuleList(nn.GRU(48, 48, batch_first=True) for _ in range(2))
        self.change = change

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).as_subclass(Strict)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(self.change(x)).as_subclass(Tensor)


@pytest.mark.parametrize(("change", "cause"), [(centred, "norm.over_sequence"), (mean_added, "mixer.not_causal")])
def test_a_tensor_that_refuses_functions_is_followed(change: Callable[[Tensor], Tensor], cause: str) -> None:
    found = named(Subject(lambda: OnStrict(change)).open())
    assert found.id == cause
    assert "Tensor.mean (test_leaks.py" in found.where


@pytest.mark.parametrize("check", ["positions.order_matters", "positions.reach", "positions.distinct"])
def test_nor_do_checks_of_positions_ask_it_for_what_the_model_does_not(check: str) -> None:
    result = Runner(Subject(lambda: OnStrict(lambda x: x)).open(), shrink=False).run(get_check(check))
    assert result.status == "passed", result.message


class Ahead(nn.Module):
    """A convolution that torch sees nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 48), nn.Linear(48, 61)
        self.mix = Unseen()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(input_ids)))


class Unseen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        array = x.detach().numpy()
        array[:, :-1] += array[:, 1:]
        return torch.from_numpy(array)


def test_where_no_operation_is_seen_nothing_is_ruled_out() -> None:
    found = leak.probe(Subject(Ahead).open(), 0)
    against = {each.cause for each in found if each.verdict in (Verdict.against, Verdict.ruled_out)}
    assert not against & {"mask.missing", "mask.off_by_one", "mixer.not_causal"}
    assert {each.where for each in found if each.cause == "mixer.not_causal"} == {"mix"}


def test_a_mask_that_is_missing_and_a_pool_behind_it_are_both_told() -> None:
    def pooled(original: Any, *args: Any) -> Any:
        made, present = original(*args)
        return made + made.mean(1, keepdim=True), present

    def both() -> nn.Module:
        model = by_hand(build("linear_bias"), lambda scores: scores.softmax(-1))
        around(model.layers[2], pooled)
        return model

    found = {each.cause: each.where for each in leak.probe(Subject(both).open(), 0) if each.where}
    assert "layers.1.attention: Tensor.softmax" in found["mask.missing"]
    assert "layers.2: Tensor.mean (test_leaks.py" in found["mixer.not_causal"]


def test_each_kind_of_operation_is_judged() -> None:
    assert {*leak.BESIDE, Kind.attention} == set(Kind)


class Experts(nn.Module):
    """Sound: each token goes through one of eight layers, and those that no token chose are passed over."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(width, 8), nn.ModuleList(nn.Linear(width, width) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]))
        return out.view_as(x)


class PooledBehindExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(61, 32), nn.ModuleList(Experts(32) for _ in range(2))
        self.head = nn.Linear(32, 61)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.head(x + x.mean(1, keepdim=True))
        return logits


@pytest.mark.parametrize("seed", range(4))
def test_experts_that_are_passed_over_are_not_taken_for_the_leak(seed: int) -> None:
    cause = named(Subject(PooledBehindExperts).open(seed=seed))
    assert cause.id == "mixer.not_causal"
    assert "Tensor.mean (test_leaks.py" in cause.where


def test_a_module_that_fails_and_is_caught_does_not_shift_the_place() -> None:
    class Fallback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.refuses = nn.Flatten(7)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.refuses(x)
            except (IndexError, RuntimeError):
                return x.cummax(1)[0] + x.flip(1)

    model = PooledBehindExperts()
    model.layers = nn.ModuleList([Fallback()])
    assert ": Tensor.flip" in named(Subject(lambda: model).open()).where
    assert "refuses" not in named(Subject(lambda: model).open()).where
