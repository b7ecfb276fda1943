"""A model that comes compiled is checked as it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fixtures.subjects import build
from lmconform import Subject, check_model

ASKS_THE_DEVICE = ("placement.parity", "placement.default_device")  # red on what was compiled for another


def whole() -> nn.Module:
    return torch.compile(build("plain", 0), backend="eager")


def by_blocks() -> nn.Module:
    model = build("plain", 0)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


def a_block_that_stands_twice() -> nn.Module:
    model = build("plain", 0)
    shared = torch.compile(model.blocks[0], backend="eager")
    model.blocks[0] = model.blocks[1] = shared
    return model


def in_place() -> nn.Module:
    model = build("plain", 0)
    model.blocks[0].compile(backend="eager")
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole, by_blocks, in_place], ids=["whole", "by-blocks", "in-place"])
def test_it_is_what_it_was_before(compiled: Callable[[], nn.Module]) -> None:
    said: list[str] = []
    with_it = Subject(compiled).open(announce=said.append)
    without = Subject(lambda: build("plain", 0)).open()
    assert with_it.convention == without.convention
    ids = without.probe_ids(2, 9)
    for other in (with_it, with_it.copy(), with_it.as_loaded()):
        assert [name for name, _ in other.module.named_modules()] == [n for n, _ in without.module.named_modules()]
    assert torch.equal(with_it.logits(ids), without.logits(ids))
    assert any(text.startswith("compiled by torch.compile") for text in said)


def test_a_shared_block_is_taken_out_wherever_it_stands() -> None:
    built = Subject(a_block_that_stands_twice).open().module
    assert built.blocks[0] is built.blocks[1]
    assert not any("_orig_mod" in name for name in built.state_dict())


def test_no_device_is_taken_for_the_one_it_was_compiled_for() -> None:
    report = check_model(whole, select=ASKS_THE_DEVICE)
    assert [result.status for result in report.results] == ["passed", "passed"]


def test_the_callers_module_stays_compiled() -> None:
    model = in_place()
    before = [getattr(part, "_compiled_call_impl", None) for part in model.modules()]
    check_model(model, select=["contract.shape"])
    assert [getattr(part, "_compiled_call_impl", None) for part in model.modules()] == before
