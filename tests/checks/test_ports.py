"""Sound models as people write and port them by hand conform: what is planted into them is all that is wrong."""

from __future__ import annotations

import pytest

from fixtures.subjects.ports import PORTS
from lmconform import Subject, check_model


@pytest.mark.parametrize("port", PORTS)
def test_conforms(port: str) -> None:
    report = check_model(Subject(PORTS[port], name=port), deselect=["training", "collapse"])
    told = [result for result in report.results if result.status not in ("passed", "not_applicable")]
    assert [f"{result.id}: {result.message}" for result in told] == []
    assert report.counts["passed"] >= 30
