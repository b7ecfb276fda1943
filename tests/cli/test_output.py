"""What a run leaves behind: JSON as specified, a page, a drafted expected-failure file, a reproduction that works."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmconform import SPEC_VERSION
from lmconform.report.terminal import show_report, verdict
from lmconform.results import SCHEMA_VERSION, Cause, Report, Result, Status

KEYS = [
    "schema_version", "spec_version", "subject", "profile", "device", "dtype", "seed", "versions", "ok", "counts",
    "results", "causes",
]  # fmt: skip
RESULT_KEYS = [
    "id", "family", "severity", "status", "measured", "allowed", "margin", "message", "where", "repro", "seconds",
    "suspects",
]  # fmt: skip


@pytest.fixture(scope="module")
def drafted(lmconform: Callable[..., Any], broken: Callable[[str], str], tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("drafted")
    ran = lmconform(
        "check", broken("gives_nan"), broken("last_position_only"), "--select", "contract.shape,contract.finite",
        "--json", "{subject}.json", "--html", "page.html", "--write-expected", "expected.toml", cwd=folder,
    )  # fmt: skip
    return ran, folder


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def test_json_is_as_specified(drafted: Any) -> None:
    nan, last = reports(drafted[1])
    for report in (nan, last):
        assert list(report)[: len(KEYS)] == KEYS
        assert (report["schema_version"], report["spec_version"]) == (SCHEMA_VERSION, SPEC_VERSION)
        assert list(report["counts"]) == [status.value for status in Status]
        assert sum(report["counts"].values()) == len(report["results"]) == 2
        assert all(list(result) == RESULT_KEYS for result in report["results"])
        assert {"python", "lmconform", "torch", "transformers"} <= set(report["versions"])
        assert report["ok"] is False
        assert all(set(cause) >= {"id", "score", "summary", "evidence", "confirm"} for cause in report["causes"])
        assert Report.from_dict(report).to_dict() == report
    assert nan["subject"] == "gives_nan"


def test_write_expected_round_trip(drafted: Any, lmconform: Callable[..., Any], broken: Callable[[str], str]) -> None:
    ran, folder = drafted
    file = folder / "expected.toml"
    draft = file.read_text()
    assert "expected.toml: 2 entries; write the reasons" in ran.out
    assert draft.count("[[expected]]") == 2
    select = ["--select", "contract.shape,contract.finite", "--expected", "expected.toml"]
    refused = lmconform("check", broken("gives_nan"), *select, cwd=folder)
    assert refused.code == 2
    assert "write the reason" in refused.err
    file.write_text(draft.replace('reason = ""', 'reason = "it is broken on purpose"'))
    ran = lmconform("check", broken("gives_nan"), *select, cwd=folder)
    assert ran.code == 0, ran.out
    assert "Expected failures and known deviations (1)" in ran.out
    assert "contract.finite: expected: it is broken on purpose" in ran.out
    assert "1 xfailed" in ran.out


def test_stale_expectation_is_a_finding(
    tmp_path: Path, lmconform: Callable[..., Any], broken: Callable[[str], str]
) -> None:
    (tmp_path / "expected.toml").write_text(
        "[[expected]]\nsubject = '*sound'\nid = 'contract.shape'\nreason = 'long ago'\n"
    )
    ran = lmconform("check", broken("sound"), "--select", "contract.shape", "--expected", "expected.toml", cwd=tmp_path)
    assert ran.code == 1
    assert "xpassed contract.shape" in ran.out
    assert "remove the entry (long ago)" in ran.out


def test_reproduction_command_shows_the_finding_again(drafted: Any, lmconform: Callable[..., Any]) -> None:
    result = reports(drafted[1])[0]["results"][1]
    command, *arguments = shlex.split(result["repro"])
    assert command == "lmconform"
    assert "--case" in arguments
    again = lmconform(*arguments, "--quiet")
    assert again.code == 1
    assert "logits are NaN or infinite on usual input" in again.out
    assert "case: kind=usual,time=1" in again.out
    assert result["repro"] in again.out  # on one line, however long: it is there to be copied


# -- rendering, on reports made by hand --------------------------------------------------------------------------------


def made(*results: Result, **more: Any) -> Report:
    return Report("toy", "smoke", "cpu", "float32", 0, {"python": "3"}, list(results), **more)


def result(id: str, status: str, margin: float | None = None, message: str = "", where: str = "") -> Result:
    family = id.partition(".")[0]
    return Result(id, family, "fault", Status(status), margin, 1.0 if margin else None, margin, message, where, "", 0.1)


def shown(report: Report, width: int = 100, **options: Any) -> str:
    console = Console(width=width, highlight=False, markup=False, emoji=False, record=True, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        show_report(console, report, **options)
    return captured.get()


def test_findings_come_first_and_the_worst_on_top() -> None:
    text = shown(
        made(
            result("b.small", "failed", 2.0, "two"),
            result("a.fine", "passed", 0.5),
            result("c.large", "failed", 300.0, "three hundred"),
            result("d.dead", "error", None, "it died"),
            result("e.warns", "warned", 3.0, "mind [batch, time] :smile:"),
        )
    )
    order = [
        text.index(part) for part in ("d.dead", "c.large", "b.small", "e.warns", "family ", "toy does not conform")
    ]
    assert order == sorted(order)
    assert "mind [batch, time] :smile:" in text
    said = "3 of 5 checks that ran failed; the widest margin is that of c.large, 300 times the bound."
    assert said in " ".join(text.split())
    assert "Likely causes" not in text


def test_long_lists_are_folded_and_reasons_grouped() -> None:
    many = [result(f"f.check_{n:02}", "failed", 2.0, "\n".join(["line"] * 30)) for n in range(30)]
    away = [result(f"g.check_{n:02}", "not_applicable", message="needs gen: no generate()") for n in range(30)]
    text = shown(made(*many, *away))
    assert "Findings (30)" in text
    assert "and 18 more: f.check_12" in text
    assert "(16 more lines; --json FILE has them all)" in text
    assert "and 23 more: needs gen: no generate()" in " ".join(text.split())
    assert text.count("needs gen") == 1


def test_blocked_says_by_what() -> None:
    blocked = result("b.x", "blocked", message="blocked by a.y: bad shape", where="a.y")
    assert "b.x: blocked by a.y: bad shape" in shown(made(blocked))
    assert "b.x: blocked by a.y, see above" in shown(made(result("a.y", "failed"), blocked))


def test_quiet_keeps_findings_and_verdict() -> None:
    text = shown(made(result("a.x", "failed", 2.0, "two"), result("a.y", "passed")), quiet=True)
    assert "failed a.x" in text
    assert "toy does not conform" in text
    assert "family" not in text


def test_narrow_terminals_lose_nothing() -> None:
    words = "logits of a padded row differ from the same row alone by more than rounding"
    text = shown(made(result("padding.left", "failed", 2.0, words)), width=40)
    assert words.split() == [word for word in text.split() if word in words.split()][: len(words.split())]
    assert all(len(line) <= 40 for line in text.splitlines())


def test_causes_are_shown_where_there_are_any() -> None:
    cause = Cause(
        "mask.off_by_one", 0.9, "the mask is shifted by one", [{"check": "a.x"}], "layer 2", "look", "mend it"
    )
    report = made(result("a.x", "failed", 2.0), causes=[cause])
    assert "90% mask.off_by_one" in shown(report)
    assert "mend it" in shown(report)


@pytest.mark.parametrize(
    ("results", "more", "says"),
    [
        ([], {}, "toy: nothing ran, so nothing is known (no check is selected in this profile)."),
        (["not_applicable"], {}, "toy: nothing ran, so nothing is known (1 not_applicable)."),
        (["passed", "passed"], {}, "toy: no finding, all 2 checks that ran hold."),
        (["passed", "warned", "xfailed"], {}, "1 of 3 checks that ran holds (1 warned, 1 failed as expected)."),
        (["passed", "warned"], {"strict": True}, "toy does not conform: 1 warned (strict)."),
        (["passed", "not_run"], {}, "toy does not conform: 1 not run."),
        (["failed"], {}, "toy does not conform: the one check that ran failed."),
        (["passed"], {"died": "the process died"}, "toy does not conform: the process was lost; the process died."),
        ([], {"died": "not built: no such file"}, "toy: not built: no such file."),
    ],
)
def test_verdict_is_one_true_sentence(results: list[str], more: dict[str, Any], says: str) -> None:
    report = made(*(result(f"a.x{n}", status) for n, status in enumerate(results)), **more)
    assert verdict(report).endswith(says)
    assert ("no finding" in verdict(report)) is report.ok
