"""The adapters that ship, driven on models in their libraries' style; test_installed.py runs them on the libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.subjects import build
from fixtures.subjects.styles import HeadWeights, LayerCaches, NestedLists
from fixtures.subjects.styles.head_weights import HeadCache
from fixtures.subjects.styles.layer_caches import Kept
from lmconform import Subject
from lmconform.adapters import hooked_transformer, litgpt, shipped_for, transformer_bridge, x_transformers
from lmconform.registry import get_check
from lmconform.runner import Runner
from lmconform.sweep.batches import Batch
from lmconform.sweep.stacking import vectorisable

CACHES = {"cache.decode", "cache.chunks", "cache.reuse", "causality.cached_chunk"}
MASKS = {"padding.left", "padding.right", "padding.finite", "padding.cached"}


class ReturnType(nn.Module):
    """As TransformerBridge: a model of transformers inside, and `return_type` says what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.original = build("gpt2")
        self.config = self.original.config

    def forward(
        self, input: Tensor, return_type: str = "logits", attention_mask: Tensor | None = None,
        labels: Tensor | None = None, past_key_values: Any = None, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input.shape[1] :]
        made = self.original(
            input, attention_mask=attention_mask, position_ids=positions, labels=labels, use_cache=use_cache,
            past_key_values=past_key_values,
        )  # fmt: skip
        return {
            "logits": made.logits, "both": (made.logits, made.loss),
            "logits_and_cache": (made.logits, made.past_key_values),
        }[return_type]  # fmt: skip


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Any, set[str]]] = {
    "x_transformers": (NestedLists, x_transformers, CACHES | MASKS | {"positions.shift"}),
    "litgpt": (LayerCaches, litgpt, CACHES | {"cache.reorder"}),
    "hooked_transformer": (HeadWeights, hooked_transformer, CACHES | MASKS),
    "transformer_bridge": (ReturnType, transformer_bridge, CACHES | MASKS | {"cache.reorder", "loss.reference"}),
}


@pytest.fixture(autouse=True)
def cache_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TransformerLens is not installed, its cache is the style's."""
    monkeypatch.setitem(sys.modules, "transformer_lens", SimpleNamespace(TransformerLensKeyValueCache=HeadCache))  # type: ignore[arg-type]


def runner(build: Callable[[], nn.Module], adapter: Any) -> Runner:
    return Runner(Subject(build, call=adapter.call).open(), shrink=False)


@pytest.mark.parametrize("name", ADAPTERS)
def test_everything_that_the_library_offers_is_checked(name: str) -> None:
    build, adapter, offered = ADAPTERS[name]
    run = runner(build, adapter)
    results = {check: run.run(get_check(check)) for check in sorted(offered)}
    assert {check: result.message for check, result in results.items() if result.status != "passed"} == {}


class LateWrite(Kept):
    def forward(self, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward((places + 1) % self.k.shape[2], k, v)


class WritesLate(LayerCaches):
    """Keys and values are written one position late."""

    def set_kv_cache(self, *args: Any, **keywords: Any) -> None:
        super().set_kv_cache(*args, **keywords)
        for block in self.blocks:
            block.attn.kv_cache.__class__ = LateWrite  # type: ignore[union-attr]


class ForgetsKeys(NestedLists):
    """The cache comes back without its first token."""

    def forward(self, x: Tensor, **keywords: Any) -> Any:
        made = super().forward(x, **keywords)
        if keywords.get("return_intermediates"):
            made[1].kept[:] = [(k[:, :, -8:], v[:, :, -8:]) for k, v in made[1].kept]
        return made


class ForgetsMask(HeadWeights):
    """The mask of earlier tokens is taken for ones."""

    def forward(self, input: Tensor, past_kv_cache: HeadCache | None = None, **keywords: Any) -> Tensor:
        if past_kv_cache is not None:
            past_kv_cache.mask = torch.ones_like(past_kv_cache.mask)
        return super().forward(input, past_kv_cache=past_kv_cache, **keywords)


@pytest.mark.parametrize(
    ("wrong", "adapter", "check"),
    [
        (WritesLate, litgpt, "cache.decode"),
        (ForgetsKeys, x_transformers, "cache.chunks"),
        (ForgetsMask, hooked_transformer, "padding.cached"),
    ],
)
def test_a_fault_shows_through_the_adapter(wrong: type[nn.Module], adapter: Any, check: str) -> None:
    assert runner(wrong, adapter).run(get_check(check)).status == "failed"


def called(module: str, name: str, base: type[nn.Module]) -> type[nn.Module]:
    """A class that gives itself out as another library's."""
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def test_adapter_is_found_by_the_class_and_by_a_class_derived_from_it() -> None:
    kind = called("litgpt.model", "GPT", LayerCaches)
    derived = type("Mine", (kind,), {})
    for each in (kind, derived):
        found = Subject(each).open()
        assert found.convention.call is litgpt.call
        assert found.can("cache")
    assert shipped_for(LayerCaches()) is None


def test_where_the_adapter_fails_forward_is_tried() -> None:
    """Another version of the library, whose forward() the adapter does not know."""
    other = called("transformer_lens.model_bridge.transformer_bridge", "TransformerBridge", LayerCaches)
    convention = Subject(other).open().convention
    assert convention.call is None
    assert convention.ids == "idx"


def test_names_of_its_own_for_parameters_keep_a_model_from_being_stacked() -> None:
    """functional_call would put weights where no module is: TransformerBridge names those of the wrapped model."""

    class Renamed(LayerCaches):
        def named_parameters(self, *args: Any, **keywords: Any) -> Any:
            return ((f"wrapped.{name}", weight) for name, weight in super().named_parameters(*args, **keywords))

    found = Subject(Renamed).open()
    run, reason = vectorisable(found, found, Batch(found.probe_ids(), found.probe_ids()), None, False)  # type: ignore[arg-type]
    assert run is None
    assert "names of its own" in reason


def test_report_names_the_adapter() -> None:
    found = Subject(called("litgpt.model", "GPT", LayerCaches)).open()
    assert found.can("mask").reason.startswith("call() in lmconform.adapters.litgpt takes none of attention_mask")
