"""What lives to the end is kept out of the garbage collector's way, and garbage is not kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from lmconform.collector import keeping


class Knot:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_built_is_not_walked_again() -> None:
    with keeping():
        kept = Knot()
    assert not any(found is kept for found in gc.get_objects())


def test_garbage_of_the_build_is_freed() -> None:
    with keeping():
        garbage = weakref.ref(Knot())
        assert garbage() is not None
    assert garbage() is None


def failing_build() -> None:
    with keeping():
        assert not gc.isenabled()
        raise ValueError("no weights")


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
def test_collector_is_left_as_it_was_when_the_build_fails(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ValueError, match="no weights"):
            failing_build()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
