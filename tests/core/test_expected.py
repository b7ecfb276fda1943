"""Expected failures are data: strict, with reasons, and mistakes in them are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmconform.expected import Expectation, ExpectedError, apply, draft, known_deviations, read_expected
from lmconform.registry import all_checks
from lmconform.results import Result, Status

ENTRY = '[[expected]]\nsubject = "mine*"\nid = "contract.shape"\nreason = "because"\n'


def result(status: Status) -> Result:
    return Result("contract.shape", "contract", "fault", status, message="differs")


def judged(status: Status, **entry: str) -> Status:
    expectation = Expectation(**{"subject": "mine*", "id": "contract.shape", "reason": "because", "link": "", **entry})
    return apply(result(status), [expectation], ["mine-2"], "cpu", "float32").status


@pytest.mark.parametrize(
    ("status", "becomes"),
    [
        (Status.failed, Status.xfailed),
        (Status.warned, Status.xfailed),
        (Status.error, Status.xfailed),
        (Status.passed, Status.xpassed),
        (Status.not_applicable, Status.not_applicable),
        (Status.blocked, Status.blocked),
        (Status.not_run, Status.not_run),
    ],
)
def test_entry_turns_red_into_expected_and_green_into_stale(status: Status, becomes: Status) -> None:
    assert judged(status) == becomes


@pytest.mark.parametrize(
    "entry",
    [
        {"subject": "yours"},
        {"id": "contract.finite"},
        {"device": "cuda"},
        {"dtype": "bfloat16"},
        {"versions": "torch<1"},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_entry_for_something_else_changes_nothing(entry: dict[str, str]) -> None:
    assert judged(Status.failed, **entry) == Status.failed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ENTRY.replace("contract.shape", "contract.shap"), "did you mean contract.shape"),
        (ENTRY.replace("because", " "), "write the reason"),
        (ENTRY.replace("reason", "reasn"), "unknown key reasn"),
        (ENTRY.replace('id = "contract.shape"\n', ""), "id missing"),
        (ENTRY.replace("[[expected]]", "[[expect]]"), "unknown table expect"),
        (ENTRY + 'versions = "torch 2"\n', "is no requirement"),
        ("[[expected", "expected.toml: "),
    ],
    ids=["id", "reason", "key", "missing", "table", "versions", "toml"],
)
def test_mistakes_are_told(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(text)
    with pytest.raises(ExpectedError, match=r"expected\.toml") as caught:
        read_expected(file)
    assert says in str(caught.value)


def test_draft_is_refused_until_its_reasons_are_written(tmp_path: Path) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(draft("mine", [result(Status.failed), result(Status.passed)]))
    with pytest.raises(ExpectedError, match="write the reason"):
        read_expected(file)
    file.write_text(file.read_text().replace('reason = ""', 'reason = "because"'))
    assert [entry.id for entry in read_expected(file)] == ["contract.shape"]


def test_shipped_deviations_are_well_formed_and_say_where() -> None:
    for entry in known_deviations():
        assert entry.known
        assert entry.id in all_checks()
        assert entry.subject.startswith("transformers:")
        assert entry.link, f"{entry.subject} {entry.id} names no source"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expected = 3", "expected = 3; entries are [[expected]] tables"),
        (ENTRY.replace('"mine*"', "3"), "subject = 3 is no string"),
        (ENTRY.replace('"contract.shape"', '["contract.shape"]'), "id = ['contract.shape'] is no string"),
    ],
    ids=["no table", "subject", "id"],
)
def test_value_of_a_wrong_kind_is_told(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(text)
    with pytest.raises(ExpectedError) as refused:
        read_expected(file)
    assert says in str(refused.value)
