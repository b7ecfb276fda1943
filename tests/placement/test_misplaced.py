"""Each misplaced tensor is found without a GPU, with CUDA's text, and named."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lmconform.simulated import PlacementError, simulated_accelerator

_spec = importlib.util.spec_from_file_location("misplaced", Path(__file__).with_name("misplaced.py"))
assert _spec is not None
assert _spec.loader is not None
misplaced = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(misplaced)

MIXED = "Expected all tensors to be on the same device, but "


def _raised(model: nn.Module, device: str = "cuda") -> PlacementError:
    with simulated_accelerator(), pytest.raises(RuntimeError) as caught:
        model.to(device)(misplaced.ids(device))
    assert isinstance(caught.value, PlacementError)
    return caught.value


def _line(text: str) -> int:
    lines = Path(misplaced.__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sound_model_runs_on_both(device: str) -> None:
    model = misplaced.with_mix(misplaced.Mix)
    expected = model(misplaced.ids())
    with simulated_accelerator():
        actual = model.to(device)(misplaced.ids(device))
        assert actual.device.type == device
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize(
    ("mix", "operation", "name", "kind", "says"),
    [
        ("UnregisteredTable", "aten.add.Tensor", "mix.table", "attribute",
         "The tensor on cpu is the attribute mix.table of UnregisteredTable, neither parameter nor buffer, so "
         ".to(device) leaves it behind: register it as a buffer"),
        ("DerivedFromUnregistered", "aten.add.Tensor", "mix.table", "attribute",
         "The tensor on cpu is computed from the attribute mix.table of DerivedFromUnregistered"),
        ("TableInList", "aten.add.Tensor", "mix.tables['positions'][1]", "attribute",
         "the attribute mix.tables['positions'][1] of TableInList, neither parameter nor buffer"),
        ("GlobalTable", "aten.add.Tensor", "TABLE", "global",
         "the global variable TABLE of misplaced, which .to(device) cannot move: register it as a buffer"),
        ("BufferReplaced", "aten.add.Tensor", "mix.table", "buffer",
         "the buffer mix.table of BufferReplaced, while the model is on cuda:0: made or replaced after the move"),
        ("LateParameter", "aten.add.Tensor", "mix.late", "parameter",
         "the parameter mix.late of LateParameter, while the model is on cuda:0: made or replaced after the move"),
    ],
)  # fmt: skip
def test_misplaced_state_is_named(mix: str, operation: str, name: str, kind: str, says: str) -> None:
    error = _raised(misplaced.with_mix(getattr(misplaced, mix)))
    assert str(error).startswith(MIXED + "found at least two devices, cuda:0 and cpu!\n")
    assert says in str(error)
    assert error.stray is not None
    assert (error.stray.name, error.stray.kind, error.stray.place) == (name, kind, "cpu")
    assert error.operation == operation
    assert set(error.devices) == {"cuda:0", "cpu"}


@pytest.mark.parametrize(
    ("mix", "call", "line"),
    [
        ("MaskOnDefaultDevice", "torch.ones", "return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()"),
        ("ArangeWithoutDevice", "torch.arange", "steps = torch.arange(x.shape[1])"),
        ("BufferReplaced", "torch.full", "self.table = torch.full("),
    ],
)
def test_call_without_device_is_named(mix: str, call: str, line: str) -> None:
    error = _raised(misplaced.with_mix(getattr(misplaced, mix)))
    assert error.origin is not None
    assert (error.origin.call, error.origin.line) == (call, _line(line))
    assert error.origin.file == misplaced.__file__
    assert not error.origin.device_given
    assert f"{call} at misplaced.py:{_line(line)} in {error.origin.function}, which names no device" in str(error)


@pytest.mark.parametrize(
    ("mix", "call", "line"),
    [
        ("HardCoded", "Tensor.cuda", "return super().mask(x).cuda()"),
        ("HardCodedFactory", "torch.arange", 'torch.arange(x.shape[1], device="cuda")[:, None]'),
    ],
)
def test_hard_coded_device_is_named_on_a_cpu_model(mix: str, call: str, line: str) -> None:
    error = _raised(misplaced.with_mix(getattr(misplaced, mix)), "cpu")
    assert error.stray is None or error.stray.place == "cuda:0"
    assert error.origin is not None
    assert (error.origin.call, error.origin.line, error.origin.device_given) == (call, _line(line), True)
    assert "The tensor on cuda:0 " in str(error)
    assert f"it comes from {call} at misplaced.py:{_line(line)}" in str(error)


@pytest.mark.parametrize("mix", ["HardCoded", "HardCodedFactory"])
def test_hard_coded_device_is_unseen_on_cuda(mix: str) -> None:
    model = misplaced.with_mix(getattr(misplaced, mix))
    with simulated_accelerator():
        model.to("cuda")(misplaced.ids("cuda"))


def test_hard_coded_index_is_found_on_the_second_device() -> None:
    model = misplaced.with_mix(misplaced.HardCodedFactory)
    with simulated_accelerator(devices=2), pytest.raises(PlacementError, match="cuda:1 and cuda:0") as caught:
        model.to("cuda:1")(misplaced.ids("cuda:1"))
    assert caught.value.stray is None or caught.value.stray.place == "cuda:0"


def test_parameters_left_behind() -> None:
    model = misplaced.with_mix(misplaced.Mix)
    with simulated_accelerator(), pytest.raises(PlacementError) as caught:
        model(misplaced.ids("cuda"))
    assert (
        MIXED + "got index is on cuda:0, different from other tensors on cpu "
        "(when checking argument in method wrapper_CUDA__index_select)"
    ) in str(caught.value)
    assert caught.value.stray is not None
    assert caught.value.stray.name == "ids"
    assert "the variable ids of Sound.forward (misplaced.py:" in str(caught.value)


def test_inputs_left_behind() -> None:
    model = misplaced.with_mix(misplaced.Mix)
    with simulated_accelerator(), pytest.raises(PlacementError) as caught:
        model.to("cuda")(misplaced.ids())
    assert "got index is on cpu, different from other tensors on cuda:0" in str(caught.value)
    assert caught.value.stray is not None
    assert (caught.value.stray.name, caught.value.stray.kind) == ("ids", "variable")


@pytest.mark.parametrize("part", ["head", "mix.project"])
def test_part_left_behind_is_named(part: str) -> None:
    model = misplaced.with_mix(misplaced.Mix)
    with simulated_accelerator():
        model.to("cuda").get_submodule(part).cpu()
        with pytest.raises(PlacementError) as caught:
            model(misplaced.ids("cuda"))
    assert caught.value.stray is not None
    assert caught.value.stray.name.startswith(part + ".")
    assert caught.value.stray.kind == "parameter"


def test_error_survives_pickling_and_copying() -> None:
    error = _raised(misplaced.with_mix(misplaced.UnregisteredTable))
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (str(other), other.stray, other.devices) == (str(error), error.stray, error.devices)


def test_nothing_remains_after_leaving() -> None:
    model = misplaced.with_mix(misplaced.UnregisteredTable)
    expected = model(misplaced.ids())
    _raised(model)
    assert not torch.cuda.is_available() or torch.version.cuda is not None
    assert next(model.parameters()).device.type == "cpu"
    assert torch.equal(model(misplaced.ids()), expected)
