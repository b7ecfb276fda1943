"""What three of the reports should have been told: a leak at 99 %, a schedule by the epoch, labels full of EOS."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from fixtures.faults import Fault, all_faults
from fixtures.subjects import build
from lmconform import check_model


def planted(id: str) -> Fault:
    return next(fault for fault in all_faults() if fault.id == id)


def test_a_bidirectional_model_at_99_percent_is_called_a_leak() -> None:
    """It says random tokens that it has never seen: the validation accuracy that report 001 was pleased with."""
    fault = planted("training.bidirectional")
    model = fault.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.randint(3, 60, (110, 32, 8), generator=torch.Generator().manual_seed(0))
    for batch in ids[:90]:
        logits = model(batch).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    validation = ids[90:].flatten(0, 1)
    with torch.no_grad():
        right = model.eval()(validation).logits[:, :-1].argmax(-1) == validation[:, 1:]
    assert float(right.float().mean()) > 0.99

    report = check_model(fault.subject(), select=("contract.shape", "contract.finite", "causality", "training.honest"))
    honest = next(result for result in report.results if result.id == "training.honest")
    assert honest.status == "failed"
    assert "the label leaks into the prediction" in honest.message
    assert re.search(r"\d+(\.\d+)? ?%", honest.message), honest.message
    assert report.causes[0].id == "mask.missing"


@pytest.mark.parametrize(
    ("fault", "check", "cause"),
    [
        ("training.noam_by_epoch", "training.schedule", "lr.schedule_per_epoch"),
        ("training.noam_by_epoch_stated", "training.schedule", "lr.schedule_per_epoch"),
        ("collapse.padding_says_end", "collapse.labels", "data.eos_pollution"),
        ("collapse.padding_counts", "collapse.labels", "data.eos_pollution"),
    ],
)
def test_found_without_training(fault: str, check: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the recipe alone: no step of an optimizer is taken on the model."""

    def trained(*given: object, **options: object) -> None:
        raise AssertionError("an audit trains nothing")

    monkeypatch.setattr("lmconform.sweep.members.train", trained)
    report = check_model(planted(fault).subject(), select=("contract.shape", "contract.finite", check))
    assert [result.status for result in report.results if result.id == check] == ["failed"]
    assert report.causes[0].id == cause


def test_a_sound_model_is_not_called_a_leak() -> None:
    report = check_model(build("plain"), select=("contract.shape", "contract.finite", "training.honest"))
    assert not report.failed
