"""What a longer text may change (causality.prefix), and labels that come shifted already (loss.shift_labels)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures.faults.causality import tril_plus_one
from fixtures.faults.causality_prefix import counted_from_end, stretched_over_table
from fixtures.planting import around
from fixtures.subjects import build
from lmconform import Subject, check_model
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner


def verdict(check: str, made: nn.Module, *, shrink: bool = False) -> Result:
    return Runner(Subject(lambda: made).open(), shrink=shrink).run(get_check(check))


# -- causality.prefix --------------------------------------------------------------------------------------------------


def test_without_cache_and_mask_no_other_check_sees_positions_counted_from_the_end() -> None:
    model = build("plain_learned")
    counted_from_end(model)
    report = check_model(model, deselect=["training"])
    assert [result.id for result in report.failed] == ["causality.prefix"]
    assert report.causes[0].id == "position.depends_on_length"


def test_two_tokens_are_the_smallest_case() -> None:
    model = build("plain_learned")
    counted_from_end(model)
    result = verdict("causality.prefix", model, shrink=True)
    assert "smallest case: time=2,prefix=1,mask=none" in result.message


def test_a_leak_is_not_reported_twice() -> None:
    model = build("plain")
    tril_plus_one(model)
    result = verdict("causality.prefix", model)
    assert (result.status, result.where) == ("blocked", "causality.no_future_leak")


def test_relative_positions_may_be_shifted_by_the_length() -> None:
    model = build("plain")

    def positions(original: Any, mask: Tensor | None, batch: int, past: int, time: int, device: Any) -> Tensor:
        return original(mask, batch, past, time, device) - (past + time)

    around(model, positions, "positions")
    assert verdict("causality.prefix", model).status == "passed"


def test_a_cure_by_given_positions_is_told() -> None:
    model = build("plain_learned")
    stretched_over_table(model)
    message = verdict("causality.prefix", model).message
    assert "with position_ids 0, 1, 2, ... given the prefix is right" in message
    assert "another path" not in message


def phi3(beyond: float) -> nn.Module:
    """Angles of other frequencies beyond 32 tokens, `beyond` times as slow, as the config states."""
    from transformers import Phi3Config, Phi3ForCausalLM

    rope: dict[str, Any] = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 6, "long_factor": [beyond] * 6,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters=rope,
    )  # fmt: skip
    return Phi3ForCausalLM(config)


def test_stated_frequencies_of_long_texts_are_left_out_and_said() -> None:
    result = verdict("causality.prefix", phi3(beyond=4.0))
    assert result.status == "passed"
    assert "not tried beyond 32 tokens" in result.message


# -- loss.shift_labels -------------------------------------------------------------------------------------------------


class Taking(nn.Module):
    """A model whose forward() takes shift_labels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("plain")

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, shift_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.inner(input_ids).logits
        return logits, None if labels is None else self.loss(logits, labels, shift_labels)

    def loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Deaf(Taking):
    """It takes them and shifts labels all the same."""

    def loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        return super().loss(logits, labels, None)


class Swallowing(nn.Module):
    """A plain module with **kwargs, which are of no use to it: it takes everything, and shift_labels among it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("plain")

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner(input_ids, labels=labels)


class DividedButDeaf(Swallowing):
    """Of the keywords that Trainer passes it takes num_items_in_batch alone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.inner(input_ids).logits
        if labels is None:
            return logits, None
        items = kwargs.get("num_items_in_batch")
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return logits, loss / (items or (labels[:, 1:] != -100).sum())


class DeafInTraining(Swallowing):
    """Of all keywords it knows shift_labels alone, and in eval mode alone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.inner(input_ids).logits
        if labels is None:
            return logits, None
        targets = None if self.training else kwargs.get("shift_labels")
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Broken(Taking):
    """It takes them by name, and asks whether they are true: an error on every tensor of them."""

    def loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        return super().loss(logits, labels, targets if targets else None)


class Switch(Swallowing):
    """shift_labels is no tensor here."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, shift_labels: bool = True) -> Any:
        return self.inner(input_ids, labels=labels if shift_labels is not False else None)


class SwitchOrNone(Swallowing):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, shift_labels: Any = None) -> Any:
        return self.inner(input_ids, labels=labels if shift_labels or shift_labels is None else None)


class Strict(Swallowing):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if kwargs:
            raise RuntimeError(f"unexpected {list(kwargs)}")
        return self.inner(input_ids, labels=labels)


class OneOfTwo(Taking):
    def loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        if targets is not None:
            raise ValueError("give labels or shift_labels, not both")
        return super().loss(logits, labels, None)


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        (Taking, "passed", ""),
        (Deaf, "failed", "taken and ignored"),
        (Swallowing, "not_applicable", "has no use for them"),
        (DividedButDeaf, "failed", "taken and ignored"),
        (DeafInTraining, "failed", "train mode"),
        (Broken, "error", "Boolean value of Tensor"),
        (Switch, "not_applicable", "a switch here: True and False are taken"),
        (SwitchOrNone, "not_applicable", "a switch here: True and False are taken"),
        (Strict, "not_applicable", "refused: RuntimeError: unexpected ['shift_labels']"),
        (OneOfTwo, "not_applicable", "give labels or shift_labels, not both"),
    ],
)
def test_shift_labels(kind: type[nn.Module], status: str, text: str) -> None:
    result = verdict("loss.shift_labels", kind())
    assert result.status == status, result.message
    assert text in result.message


def test_shift_labels_do_not_apply_where_forward_has_no_such_name() -> None:
    result = verdict("loss.shift_labels", build("plain"))
    assert (result.status, result.message) == ("not_applicable", "PlainGPT.forward() takes no shift_labels")


def test_shift_labels_beside_the_same_labels_are_compared_too() -> None:
    """A loss that heeds them only where they differ from labels."""

    class Comparing(Taking):
        def loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
            same = targets is not None and torch.equal(labels, targets)
            return super().loss(logits, labels, None if same else targets)

    result = verdict("loss.shift_labels", Comparing())
    assert result.status == "failed"
    assert "labels beside them: themselves" in result.message
