"""Every planted placement fault is named with module and attribute (or the call that made the tensor)."""

from __future__ import annotations

import pytest

from fixtures.faults import Fault
from fixtures.faults.placement import FAULTS
from lmconform.registry import get_check
from lmconform.runner import Runner

MOVES = [fault for fault in FAULTS if fault.kills[0] == "placement.moves"]
MODULES = {
    "placement.unregistered_table": "blocks.1.attention", "placement.table_in_a_dict": "blocks.2.attention",
    "placement.global_table": "blocks.0.attention", "placement.modules_in_a_list": "norm.1",
    "placement.mask_on_default": "blocks.1.attention", "placement.mask_on_default_when_padded": "blocks.2.attention",
    "placement.positions_on_default_when_cached": "table", "placement.moved_by_cuda": "blocks.1.attention",
    "placement.device_by_name": "table", "placement.device_remembered": "blocks.1.attention",
    "placement.buffer_replaced": "blocks.1.attention", "placement.buffer_replaced_unused": "blocks.0.attention.load",
    "placement.late_parameter": "blocks.1.attention", "placement.through_numpy": "ThroughNumpy",
}  # fmt: skip


@pytest.mark.parametrize("fault", MOVES, ids=lambda fault: fault.id)
def test_module_cause_and_line_are_named(fault: Fault) -> None:
    result = Runner(fault.subject().open()).run(get_check("placement.moves"))
    assert result.status == "failed"
    assert MODULES.get(fault.id, "") in result.message
    assert fault.cause in result.suspects
