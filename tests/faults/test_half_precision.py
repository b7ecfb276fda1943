"""How many planted faults still turn their check red in bfloat16: docs/plugging_in.md says so to users."""

from __future__ import annotations

import pytest

from fixtures.faults import Fault, all_faults
from lmconform import BuildError
from lmconform.registry import get_check
from lmconform.runner import Runner

ELSEWHERE = ("training", "collapse", "distributed", "peft", "placement", "parity", "tokenizer")  # the type is no matter
SEEN = 0.75


def turns_red(fault: Fault) -> bool:
    try:
        specimen = fault.subject().open(dtype="bfloat16")
    except BuildError:  # it breaks on the type, and says so
        return True
    return any(Runner(specimen).run(get_check(check)).status in ("failed", "warned") for check in fault.kills)


@pytest.mark.slow
def test_most_faults_are_seen_in_bfloat16() -> None:
    faults = [fault for fault in all_faults() if fault.kills[0].partition(".")[0] not in ELSEWHERE]
    hidden = [fault.id for fault in faults if not turns_red(fault)]
    print(f"{len(faults) - len(hidden)} of {len(faults)} seen in bfloat16; hidden: {', '.join(hidden)}")
    assert len(hidden) < (1 - SEEN) * len(faults)
