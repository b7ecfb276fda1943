"""Every planted fault turns its named checks red, with the text a user would need."""

from __future__ import annotations

import pytest

from fixtures.faults import Fault, all_faults
from fixtures.subjects import build
from lmconform import BuildError, Subject
from lmconform.registry import all_checks, get_check
from lmconform.runner import Runner

BEYOND = {  # checks that have no meaning there: nothing is compiled for a pretended device, processes share no GPU
    "placement.compile": ("sim",),
    "distributed.ddp": ("sim", "cuda", "mps"),
    "distributed.fsdp": ("sim", "cuda", "mps"),
}
CASES = [(fault, check) for fault in all_faults() for check in fault.kills]


@pytest.mark.slow_on("sim")
@pytest.mark.parametrize(("fault", "check"), CASES, ids=[f"{fault.id}-{check}" for fault, check in CASES])
def test_turns_red(fault: Fault, check: str, device: str) -> None:
    if fault.misplaced and device != "cpu":
        with pytest.raises(BuildError, match="gives logits on the CPU, and on") as raised:
            fault.subject().open(device=device)
        if device == "sim":  # PyTorch itself names nothing
            assert fault.misplaced in str(raised.value)
        return
    specimen = fault.subject().open(device=device)
    if fault.reference:
        with specimen.placed():
            specimen.reference = Subject(lambda: build(fault.host)).open(as_loaded=True, device=device)
    result = Runner(specimen).run(get_check(check))
    if device in BEYOND.get(check, ()):
        assert result.status == "not_applicable"
        return
    assert result.status in ("failed", "warned"), f"{check} was {result.status}: {result.message}"
    if check == fault.kills[0]:
        assert fault.says in result.message
    assert result.repro.startswith("lmconform")


def test_every_check_has_a_fault() -> None:
    killed = {check for fault in all_faults() for check in fault.kills}
    assert sorted(set(all_checks()) - killed) == []
