"""Sound models as people write and port them by hand conform: what is planted into them is all that is wrong."""

from __future__ import annotations

from functools import partial

import pytest

from fixtures.subjects.modern import MODERN, modern
from fixtures.subjects.ports import PORTS
from lmconform import Subject, check_model

HOSTS = {**PORTS, **{name: partial(modern, name) for name in MODERN}}


@pytest.mark.parametrize("host", HOSTS)
def test_conforms(host: str) -> None:
    report = check_model(Subject(HOSTS[host], name=host), deselect=["training", "collapse"])
    told = [result for result in report.results if result.status not in ("passed", "not_applicable")]
    assert [f"{result.id}: {result.message}" for result in told] == []
    assert report.counts["passed"] >= 30
