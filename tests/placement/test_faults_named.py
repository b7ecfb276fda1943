"""Every planted placement fault is named with no GPU: module and attribute, or the call and line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fixtures.faults import Fault
from fixtures.faults import placement as planted
from lmconform.registry import get_check
from lmconform.runner import Runner


def _line(module: object, call: str, text: str) -> str:
    """'torch.ones at placement.py:68': the call, and the first line of the file that holds `text`."""
    path = Path(str(getattr(module, "__file__", "")))
    lines = path.read_text(encoding="utf-8").splitlines()
    return f"{call} at {path.name}:{next(number for number, line in enumerate(lines, 1) if text in line)} in "


here: Callable[[str, str], str] = partial(_line, planted)
host: Callable[[str, str], str] = partial(_line, importlib.import_module("fixtures.subjects.plain"))
NAMED: dict[str, tuple[str, ...]] = {
    "unregistered_table": ("the attribute blocks.1.attention.slopes of UnregisteredTable",),
    "table_in_a_dict": ("the attribute blocks.2.attention.slopes['all'][0] of TableByLength",),
    "global_table": ("the global variable SLOPES of fixtures.faults.placement", "in blocks.0.attention (GlobalTable)"),
    "modules_in_a_list": ("the attribute norm.1.paths[0].bias of SecondPath", "nn.ModuleList"),
    "mask_on_default": ("in blocks.1.attention (MaskOnDefault)", here("torch.ones", "tril(key - query)[None, None]")),
    "mask_on_default_when_padded": (
        "in blocks.2.attention (MaskOnDefaultWhenPadded)", here("torch.ones", "tril(key - query) & mask[:,"),
    ),
    "positions_on_default_when_cached": ("in table (Embedding)", here("torch.arange", "return torch.arange(past")),
    "moved_by_cuda": ("in blocks.1.attention (AlwaysCuda)", here("Tensor.cuda", "return seen.cuda()")),
    "device_by_name": ("in table (Embedding)", host("torch.arange", "torch.arange(past, past + time, device=device)")),
    "device_remembered": ("in blocks.1.attention (RememberedDevice)", host("torch.ones", "torch.ones(query, key")),
    "buffer_replaced": (
        "the buffer blocks.1.attention.slopes of BufferReplaced",
        here("torch.arange", "self.slopes = torch.arange(k.shape[2]"),
    ),
    "buffer_replaced_unused": ("blocks.0.attention.load is on cpu",),
    "late_parameter": (
        "the parameter blocks.1.attention.slopes_12 of LateParameter",
        here("torch.arange", "nn.Parameter(torch.arange"),
    ),
    "through_numpy": ("where: ThroughNumpy", "to numpy"),
    "int32_positions": ("where: table (OneHotTable)",),
    "logits_on_the_cpu": ("its logits come back on cpu (forward)",),
    "fast_path_on_cuda": ("where: blocks.2.attention (FastPathOnCuda) is the first to differ; forward",),
    "mask_dropped_on_cuda": ("where: blocks.0.attention (FastMaskOnCuda) is the first to differ; padded forward",),
    "constructor_on_the_cpu": ("blocks.1.attention.slopes is on cpu",),
    "constructor_through_numpy": (here("where:", ".numpy() * 0.3").replace(" at ", " ") + "constructor_through_numpy",),
    "arange_through_numpy": ("where: blocks.1.attention (MovedBack)",),
}  # fmt: skip
FAULTS = [fault for fault in planted.FAULTS if fault.kills[0] != "placement.compile"]


def test_every_fault_has_its_names_here() -> None:
    assert {fault.id.removeprefix("placement.") for fault in FAULTS} == set(NAMED)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_module_attribute_or_line_and_cause_are_named(fault: Fault) -> None:
    result = Runner(fault.subject().open()).run(get_check(fault.kills[0]))
    assert result.status == "failed"
    for name in NAMED[fault.id.removeprefix("placement.")]:
        assert name in result.message
    assert fault.cause in result.suspects
