"""Whole sessions on the simulated accelerator: every way of asking for it, and what it must not change."""

from __future__ import annotations

import copy
import inspect
import pickle
import textwrap
from typing import Any

import pytest
import torch

import lmconform
from fixtures.subjects import build
from lmconform import BuildError, PlacementError, Subject, check_model
from lmconform.devices import Device, DeviceError
from lmconform.shrinking import causal_types, tiny_model
from lmconform.simulated import split_layers

FEW = ("llama", "rwkv", "bart", "xlnet", "deepseek_v3", "gpt_oss")


def verdicts(spec: str, device: str) -> dict[str, str]:
    report = check_model(spec, profile="smoke", device=device)
    return {result.id: result.status.value for result in report.results}


@pytest.mark.parametrize("model_type", FEW)
def test_verdicts_of_types_are_the_cpus(model_type: str) -> None:
    assert verdicts(f"transformers:{model_type}", "sim") == verdicts(f"transformers:{model_type}", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in causal_types() if name not in FEW])
def test_verdicts_of_every_type_are_the_cpus(model_type: str) -> None:
    try:
        expected = verdicts(f"transformers:{model_type}", "cpu")
    except BuildError as error:
        pytest.skip(str(error))
    assert verdicts(f"transformers:{model_type}", "sim") == expected


@pytest.mark.parametrize("device", ["sim", "sim:2"])
def test_a_report_says_where_it_ran(device: str) -> None:
    seen: list[str] = []

    def call(model: Any, input_ids: Any) -> Any:
        seen.append(str(input_ids.device))
        return model(input_ids).logits

    report = check_model(Subject(lambda: build("plain"), call=call), device=device, select=["contract.shape"])
    assert report.ok
    assert report.device == device
    assert set(seen) == {"cuda:0"}
    assert not torch.cuda.is_available() or torch.version.cuda is not None


def test_a_specimen_keeps_its_places_from_block_to_block() -> None:
    specimen = Subject(lambda: build("plain")).open(device="sim:2")
    for _ in range(2):
        with specimen.placed():
            assert {str(p.device) for p in specimen.module.parameters()} == {"cuda:0", "cuda:1"}
            assert str(specimen.logits(specimen.probe_ids()).device) == "cuda:0"
            assert {str(p.device) for p in specimen.as_loaded().module.parameters()} == {"cuda:0", "cuda:1"}


def test_a_reference_lies_on_the_same_device() -> None:
    report = check_model(
        Subject(lambda: build("llama")), device="sim", reference=Subject(lambda: build("llama")), as_loaded=True,
        select=["parity.logits"],
    )  # fmt: skip
    assert [result.status for result in report.results] == ["passed"]


def test_a_model_that_cannot_run_there_names_the_stray() -> None:
    from fixtures.faults.placement import unregistered_table

    model = build("plain")
    unregistered_table(model)
    with pytest.raises(BuildError, match=r"the attribute blocks\.1\.attention\.slopes of UnregisteredTable"):
        check_model(model, device="sim")


def test_split_layers_can_be_copied_and_pickled() -> None:
    ids = torch.arange(3, 15)[None]
    with lmconform.simulated_accelerator(devices=2) as accelerator:
        model = split_layers(tiny_model("llama"), accelerator.devices)
        expected = model(ids.cuda()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids.cuda()).logits, expected)
            assert torch.equal(other.cpu()(ids).logits, expected.cpu())


@pytest.mark.parametrize(("name", "says"), [("sim:0", "sim and sim:2"), ("cuda:99", "no CUDA"), ("tpu", "sim")])
def test_a_device_that_is_not_there(name: str, says: str) -> None:
    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match=says):
        Device(name)
    with pytest.raises(BuildError, match=says):
        check_model(Subject(lambda: build("plain")), device=name)


def test_more_devices_than_are_simulated_around_it() -> None:
    with lmconform.simulated_accelerator(), pytest.raises(DeviceError, match="1 are simulated already"):
        Device("sim:2")


def test_pytest_runs_there(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(
        "--lm", "transformers:llama", "--lm-device", "sim", "--lm-select", "contract.shape", "--lm-json", "r.json"
    )
    result.assert_outcomes(passed=1)
    assert '"device": "sim"' in (pytester.path / "r.json").read_text()


def test_the_example_in_the_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect.getdoc(lmconform.simulated_accelerator)
    assert text is not None
    code = "\n".join(line for line in text.splitlines() if line.startswith("    ") or not line)
    promised = [line.partition("  # ")[2] for line in code.splitlines() if "print(" in line]
    exec(compile(textwrap.dedent(code), "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines() == promised != []


def test_the_error_is_public() -> None:
    with lmconform.simulated_accelerator(), pytest.raises(PlacementError, match="same device"):
        torch.ones(3).cuda() + torch.ones(3)
