"""Every planted fault turns its named checks red, with the text a user would need."""

from __future__ import annotations

import pytest

from fixtures.faults import Fault, all_faults
from fixtures.subjects import build
from lmconform import Subject
from lmconform.registry import all_checks, get_check
from lmconform.runner import Runner

CASES = [(fault, check) for fault in all_faults() for check in fault.kills]


@pytest.mark.parametrize(("fault", "check"), CASES, ids=[f"{fault.id}-{check}" for fault, check in CASES])
def test_turns_red(fault: Fault, check: str) -> None:
    specimen = fault.subject().open()
    if fault.reference:
        specimen.reference = Subject(lambda: build(fault.host)).open(as_loaded=True)
    result = Runner(specimen).run(get_check(check))
    assert result.status in ("failed", "warned"), f"{check} was {result.status}: {result.message}"
    if check == fault.kills[0]:
        assert fault.says in result.message
    assert result.repro.startswith("lmconform check")


def test_every_check_has_a_fault() -> None:
    killed = {check for fault in all_faults() for check in fault.kills}
    assert sorted(set(all_checks()) - killed) == []
