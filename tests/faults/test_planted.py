"""Every planted fault turns its named checks red, with the text a user would need."""

from __future__ import annotations

import pytest

from fixtures.faults import Fault, all_faults
from fixtures.subjects import build
from lmconform import BuildError, Subject
from lmconform.registry import all_checks, get_check
from lmconform.runner import Runner

CASES = [(fault, check) for fault in all_faults() for check in fault.kills]


@pytest.mark.slow_on("sim")
@pytest.mark.parametrize(("fault", "check"), CASES, ids=[f"{fault.id}-{check}" for fault, check in CASES])
def test_turns_red(fault: Fault, check: str, device: str) -> None:
    told = ""
    try:
        specimen = fault.subject().open(device=device)
    except BuildError as error:
        told = str(error)
    if told:  # on a device the first forward raises
        assert device != "cpu"
        assert fault.cause.startswith("device.")
        assert "same device" in told or "to numpy" in told
        return
    if fault.reference:
        with specimen.placed():
            specimen.reference = Subject(lambda: build(fault.host)).open(as_loaded=True, device=device)
    result = Runner(specimen).run(get_check(check))
    if (check, device) == ("placement.compile", "sim"):
        assert result.status == "not_applicable"
        return
    assert result.status in ("failed", "warned"), f"{check} was {result.status}: {result.message}"
    if check == fault.kills[0]:
        assert fault.says in result.message
    assert result.repro.startswith("lmconform check")


def test_every_check_has_a_fault() -> None:
    killed = {check for fault in all_faults() for check in fault.kills}
    assert sorted(set(all_checks()) - killed) == []
