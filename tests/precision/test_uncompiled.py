"""What the check of attention implementations does to torch.compile: nothing that stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmconform.measuring.uncompiled import uncompiled


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """What torch.compile was asked to compile; it gives back a function that says "compiled"."""
    asked: list[Callable[..., Any]] = []

    def compile(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append(model)
        return lambda *args: "compiled"

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def written() -> str:
    return "as written"


def test_a_function_runs_as_written_within_and_compiled_outside(compiled: list[Any]) -> None:
    with uncompiled():
        kept = torch.compile(written)
        assert kept() == "as written"
        assert not compiled
    assert kept() == kept() == "compiled"
    assert compiled == [written]
    with uncompiled():
        assert kept() == "as written"


def test_the_decorator_with_options_too(compiled: list[Any]) -> None:
    with uncompiled():
        kept = torch.compile(dynamic=True)(written)
        assert kept() == "as written"
    assert kept() == "compiled"


@pytest.mark.parametrize("raises", [False, True])
def test_torch_compile_is_put_back(compiled: list[Any], raises: bool) -> None:
    before = torch.compile
    try:
        with uncompiled():
            assert torch.compile is not before
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    assert torch.compile is before


def test_inductor_is_not_loaded() -> None:
    """By flex attention of transformers: loading it takes longer than the check."""
    code = (
        "import sys, lmconform; "
        "report = lmconform.check_model('transformers:llama', select=['precision.backends']); "
        "assert report.counts['passed'] and 'flex attention does not run' not in report.results[-1].message, report; "
        "assert 'torch.nn.attention.flex_attention' in sys.modules; "
        "assert 'torch._inductor.compile_fx' not in sys.modules, 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
