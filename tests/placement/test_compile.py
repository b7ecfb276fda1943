"""placement.compile: what is compared, what is listed, and what is said where nothing can be compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmconform import Subject
from lmconform.registry import get_check
from lmconform.results import Result
from lmconform.runner import Runner


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 8)
        self.head = nn.Linear(8, 31)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.between(self.embedding(ids)))


class AsksForAValue(Small):
    """Python decides by a number that only the data know: the graph breaks, and export refuses."""

    def between(self, x: Tensor) -> Tensor:
        return x.tanh() if float(x.abs().max()) > 3.0 else x.sin()


class ExportsOtherwise(Small):
    """What is exported takes another path."""

    def between(self, x: Tensor) -> Tensor:
        return x + 1.0 if torch.compiler.is_exporting() else x


def compiled(kind: type[Small], device: str = "cpu") -> Result:
    return Runner(Subject(kind).open(device=device)).run(get_check("placement.compile"))


def no_compiler(*args: object) -> str:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler()


def test_not_applicable_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    result = compiled(Small)
    assert result.status == "not_applicable"
    assert "no C++ compiler is installed" in result.message


def test_not_applicable_on_a_simulated_device() -> None:
    result = compiled(Small, "sim")
    assert result.status == "not_applicable"
    assert "simulated" in result.message


@pytest.fixture
def without_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and exported only: generating code takes a compiler, and long."""
    monkeypatch.setattr("lmconform.checks.placement_compile.no_compiler", lambda device: "")
    monkeypatch.setattr("lmconform.checks.placement_compile.SLOW_TRACE", 0.0)


@pytest.mark.usefixtures("without_generated_code")
def test_sound_model_is_traced_without_a_break() -> None:
    result = compiled(Small)
    assert result.status == "passed"
    assert "graph break" not in result.message
    assert "refuses" not in result.message


@pytest.mark.usefixtures("without_generated_code")
def test_graph_breaks_and_a_refused_export_are_listed() -> None:
    result = compiled(AsksForAValue)
    assert result.status == "passed"
    assert "1 graph break: " in result.message
    assert "item()" in result.message
    assert "torch.export refuses it: " in result.message


@pytest.mark.usefixtures("without_generated_code")
def test_an_exported_program_that_differs_fails() -> None:
    result = compiled(ExportsOtherwise)
    assert result.status == "failed"
    assert "logits of the exported program differ" in result.message


@pytest.mark.slow
def test_code_is_generated_and_agrees() -> None:
    result = compiled(Small)
    assert result.status in ("passed", "not_applicable")
    assert (result.status == "not_applicable") == ("no C++ compiler" in result.message)
