"""Snapshots are taken once for each host."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from fixtures.subjects import build
from lmconform import Subject
from lmconform.snapshots.comparison import Comparison, compare
from lmconform.snapshots.store import Snapshot
from lmconform.snapshots.taking import observe, take


def seeded(name: str) -> torch.nn.Module:
    return build(name, torch.initial_seed() % (1 << 31))


@functools.cache
def taken(name: str, as_loaded: bool) -> Snapshot:
    return take(Subject(functools.partial(seeded, name), name=name), as_loaded=as_loaded)


@pytest.fixture
def against() -> Callable[..., Comparison]:
    """`against("plain", change)`: the host with `change` made to it, beside the host's snapshot."""

    def run(
        host: str,
        change: Callable[[torch.nn.Module], object] = lambda module: None,
        *,
        as_loaded: bool = False,
        ignored: tuple[str, ...] = (),
    ) -> Comparison:
        def changed() -> torch.nn.Module:
            module = seeded(host)
            other = change(module)
            return other if isinstance(other, torch.nn.Module) else module

        snapshot = taken(host, as_loaded)
        return compare(snapshot, observe(Subject(changed, name=host), snapshot), ignored=ignored)

    return run
