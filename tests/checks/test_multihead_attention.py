"""What nn.MultiheadAttention computes inside one torch function is seen like attention that is written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.faults import all_faults
from fixtures.subjects.ports.multihead import Multihead
from fixtures.subjects.styles import Encoder
from lmconform import Subject
from lmconform.diagnosis import diagnose
from lmconform.diagnosis.probes.imposed_mask import future_weights, imposed_causal_mask
from lmconform.diagnosis.probes.places import norm_over_time
from lmconform.measuring import traces
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner
from lmconform.specimen import Specimen


def gives_weights() -> nn.Module:
    """need_weights=True: baddbmm and softmax in place of scaled_dot_product_attention."""
    model = Multihead()
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "need_weights": True}), with_kwargs=True
        )
    return model


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "time_first": Multihead,
    "need_weights": gives_weights,
    "encoder": Encoder,
    "encoder_sequence_first": functools.partial(Encoder, batch_first=False),
    "encoder_post_norm": functools.partial(Encoder, norm_first=False),
}
hosts = pytest.mark.parametrize("host", HOSTS)


def opened(build: Callable[[], nn.Module]) -> Specimen:
    return Subject(build, name="multihead").open()


def attentions(module: nn.Module) -> list[nn.MultiheadAttention]:
    return [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]


def scale_attention(build: Callable[[], nn.Module]) -> Result:
    return Runner(opened(build), shrink=False).run(get_check("scale.attention"))


@hosts
def test_its_scores_are_those_of_its_projections(host: str) -> None:
    subject = opened(HOSTS[host])
    ids = subject.probe_ids(3, 7)
    given: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        given.append(args[0].detach() if module.batch_first else args[0].detach().transpose(0, 1))

    parts = attentions(subject.module)
    with traces.hooked(*(part.register_forward_pre_hook(note) for part in parts)):
        found = traces.attention_scores(subject, ids)
    assert [scores.block for scores in found] == [0, 1]
    for part, x, scores in zip(parts, given, found):
        q, k, _ = nn.functional.linear(x, part.in_proj_weight, part.in_proj_bias).chunk(3, dim=-1)
        q, k = (side.unflatten(-1, (part.num_heads, -1)).transpose(1, 2) for side in (q, k))
        expected = q @ k.transpose(-1, -2) / part.head_dim**0.5
        assert scores.head_dim == part.head_dim
        causal = torch.ones(7, 7, dtype=torch.bool).tril()
        assert torch.equal(scores.visible.expand_as(expected), causal.expand_as(expected))
        torch.testing.assert_close(scores.values[..., causal], expected[..., causal])


@hosts
def test_sound_attention_passes(host: str) -> None:
    result = scale_attention(HOSTS[host])
    assert result.status == "passed", result.message


@hosts
def test_scores_that_are_not_divided_are_unscaled(host: str) -> None:
    def build() -> nn.Module:
        model = HOSTS[host]()
        last = attentions(model)[-1]
        size = last.head_dim

        def undivided(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (args[0] * size**0.5, *args[1:]), kwargs

        last.register_forward_pre_hook(undivided, with_kwargs=True)
        return model

    result = scale_attention(build)
    assert result.status == "failed", result.message
    assert "scores divided by sqrt(12)" in result.message
    assert result.where == "block 1"


@hosts
def test_projections_that_start_too_large_saturate_it(host: str) -> None:
    def build() -> nn.Module:
        model = HOSTS[host]()
        with torch.no_grad():
            attentions(model)[-1].in_proj_weight.normal_(std=20.0)
        return model

    result = scale_attention(build)
    assert result.status == "failed", result.message
    assert "attention is saturated" in result.message


@hosts
def test_an_imposed_mask_reaches_it(host: str) -> None:
    def build() -> nn.Module:
        model = HOSTS[host]()
        for part in attentions(model):
            part.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attn_mask": None, "is_causal": False}), with_kwargs=True
            )
        return model

    subject = opened(build)
    ids = subject.probe_ids(1, 9)
    other = ids.clone()
    other[:, 5:] = ids[:, :4]

    def moved() -> float:
        return float((subject.logits(ids) - subject.logits(other))[:, :5].abs().max())

    assert moved() > 1e-3
    with imposed_causal_mask() as seen:
        assert moved() < 1e-5
    assert seen.count == 4  # two layers, two texts


def test_weights_that_it_gives_later_tokens_are_noted() -> None:
    subject = opened(gives_weights)
    with future_weights() as noted:
        subject.logits(subject.probe_ids(1, 9))
    assert noted == [(0.0, 0.0)] * 2


def test_a_norm_over_time_is_named_where_time_comes_first() -> None:
    fault = next(fault for fault in all_faults() if fault.id == "causality.group_norm")
    runner = Runner(fault.subject().open(), shrink=False)
    needed = (
        "contract.shape", "contract.finite", "contract.repeatable", "causality.no_future_leak", "padding.left",
        "padding.right",
    )  # fmt: skip
    first = diagnose([runner.run(get_check(check)) for check in needed], runner)[0]
    assert first.id == "norm.over_sequence"
    assert "layers.1.norm1" in first.where


@pytest.mark.parametrize("host", ["time_first", "encoder"])
def test_a_layer_norm_is_no_norm_over_time(host: str) -> None:
    subject = opened(HOSTS[host])
    norms = [name for name, part in subject.module.named_modules() if isinstance(part, nn.LayerNorm)]
    assert norms
    assert not any(norm_over_time(subject, name, subject.probe_ids(1, 8)) for name in norms)
