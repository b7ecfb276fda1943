"""The HTML page as text: order, ledger, escaping, ids; from reports and from their JSON."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import lmconform
from lmconform.cli import main
from lmconform.report import drawing, html
from lmconform.report.html import render, render_zoo, tell
from lmconform.results import Report, Status, as_json
from tests.report.by_hand import ERROR, made, of_every_status, result, zoo_data


def text_of(page: str) -> str:
    """The page without markup, on one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_verdict_and_causes_come_before_ledger_and_findings() -> None:
    page = text_of(render([of_every_status()]))
    order = ["Does not conform: 2 of 6", "Likely causes 75 % mask.missing", "Ledger by family", "Findings (4) ✗",
             "Warnings (1) !", "Measurements What", "All checks Status"]  # fmt: skip
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)


def test_every_status_is_in_the_ledger_and_every_check_in_the_table() -> None:
    report = of_every_status()
    page = render([report])
    rows = re.findall(r'<tr data-status="(\w+)"', page)
    assert Counter(rows) == Counter(status.value for status in Status)
    told = re.findall(r'<th scope="row" class="id">(?:<a [^>]+>)?([^<]+)<', page)
    assert told == [result.id for result in report.results]


def test_a_finding_is_taken_apart() -> None:
    message = (
        "logits differ: measured 3, allowed 1e-05 (3e+05 times the bound)\nwhere: row 1, position 2: here\n"
        "smallest case: time=2 (first seen at time=20)\nlikely cause: the mask\na remark: with a colon"
    )
    told = tell(result("cache.decode", "failed", 3e5, message))
    assert told.says == "logits differ"
    assert told.facts == [
        ("where", "row 1, position 2: here"),
        ("smallest case", "time=2 (first seen at time=20)"),
        ("likely cause", "the mask"),
    ]
    assert told.notes == ["a remark: with a colon"]


@pytest.mark.parametrize(
    "message", ["", "no figures", "ends oddly: measured badly", "no number: measured x, allowed y"]
)
def test_other_messages_stay_whole(message: str) -> None:
    assert tell(result("cache.decode", "error", None, message)).says == message


def test_ids_are_distinct_and_links_lead_somewhere() -> None:
    page = render([of_every_status("one"), of_every_status("two")])
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert [id for id, count in Counter(ids).items() if count > 1] == []
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_nothing_outside_is_referred_to() -> None:
    for page in (render([of_every_status()]), render_zoo(zoo_data())):
        addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert [a for a in addresses if not a.startswith(("#", "data:image/png;base64,"))] == []
        assert "http" not in re.sub(r'http-equiv|xmlns[:\w]*="[^"]+"', "", page)


def test_colours_are_the_pages_own() -> None:
    page = render([of_every_status()])
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert "#0102" not in svg
        assert "var(--" in svg


def test_on_a_page_of_many_subjects_only_findings_are_drawn() -> None:
    green, red = (
        result("cache.decode", "passed", charts=(ERROR,)),
        result("cache.decode", "failed", 2.0, charts=(ERROR,)),
    )
    assert render([made(green)]).count("<svg") == 1
    few = [made(green)] * html.MANY
    assert render(few).count("<svg") == html.MANY
    many = render([*few, made(red)])
    assert many.count("<svg") == 1
    assert "charts of green checks are left out" in many


def test_a_picture_that_cannot_be_drawn_leaves_the_page_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(axes: Any, chart: Any) -> None:
        if chart.title == ERROR.title:
            raise OverflowError("<b>too large")
        there(axes, chart)

    there = drawing._draw_curves
    monkeypatch.setattr(drawing, "_draw_curves", broken)
    page = render([of_every_status()])
    assert page.count("<svg") == 2  # the map and the rates
    assert "could not be drawn (OverflowError: &lt;b&gt;too large); the JSON holds its figures" in page


def test_zoo_tells_each_type_once_red_first() -> None:
    page = render_zoo(zoo_data())
    statuses = re.findall(r'<tr data-status="(\w+)"', page)
    assert Counter(statuses) == {"red": 20, "unreached": 1, "triaged": 40, "green": 119}
    assert statuses == sorted(statuses, key=["red", "unreached", "triaged", "green"].index)
    assert "cache.decode (20): type000, type009" in text_of(page)


# -- libraries that are not there, files that are no reports -----------------------------------------------------------


def no_build() -> Any:
    raise AssertionError("the subject was built, although no page can be written")


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_missing_library_is_said_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = html.find_spec
    monkeypatch.setattr(html, "find_spec", lambda asked: None if asked == name else there(asked))
    said = f"the HTML report needs {name}: pip install 'lmconform\\[report\\]'"
    with pytest.raises(ValueError, match=said):
        lmconform.check_model(no_build, html=str(tmp_path / "page.html"))
    spec = f"{__file__}:no_build"
    for command in (["check", spec, "--no-isolate"], ["zoo", "gpt2"]):
        assert main([*command, "--html", str(tmp_path / "page.html")]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_a_folder_that_is_not_there_is_said_before_anything_runs(pytester: pytest.Pytester) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder that can be written to"):
        lmconform.check_model(no_build, html="nowhere/page.html")
    ran = pytester.runpytest_inprocess("--lm", f"{__file__}:no_build", "--lm-html", "nowhere/page.html")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stderr.fnmatch_lines(["*nowhere is no folder that can be written to*"])


def test_pytest_refuses_a_page_it_could_not_write(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "find_spec", lambda asked: None)
    ran = pytester.runpytest_inprocess("--lm", f"{__file__}:no_build", "--lm-html", "page.html")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stderr.fnmatch_lines(["*the HTML report needs jinja2 and matplotlib*"])


def test_the_page_can_be_made_of_the_json_alone(tmp_path: Path) -> None:
    report = of_every_status()
    report.to_json(tmp_path / "report.json")
    report.to_html(tmp_path / "direct.html")
    assert main(["report", str(tmp_path / "report.json"), "-o", str(tmp_path / "later.html")]) == 0
    assert (tmp_path / "later.html").read_text() == (tmp_path / "direct.html").read_text()
    (tmp_path / "list.json").write_text(json.dumps([report.to_dict(), report.to_dict()]))
    assert main(["report", str(tmp_path / "list.json"), "-o", str(tmp_path / "two.html")]) == 0
    assert (tmp_path / "two.html").read_text() == render([report, report])
    (tmp_path / "zoo.json").write_text(json.dumps(zoo_data()))
    assert main(["report", str(tmp_path / "zoo.json"), "-o", str(tmp_path / "zoo.html")]) == 0
    assert (tmp_path / "zoo.html").read_text() == render_zoo(zoo_data())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[1]", "is no report"),
        ('{"schema_version": 1, "results": []}', "no whole report (KeyError: 'subject')"),
        ('{"schema_version": 99, "results": []}', "has schema 99, this lmconform reads up to 1"),
        ('{"schema_version": 1, "rows": []}', "no whole report (KeyError: 'totals')"),
    ],
)
def test_files_that_are_no_reports_are_refused(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.json"
    if content is not None:
        file.write_text(content)
    assert main(["report", str(file), "-o", str(tmp_path / "page.html")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_charts_outlive_json_and_are_left_out_where_there_are_none() -> None:
    report = of_every_status()
    data = json.loads(as_json(report.to_dict()))
    assert Report.from_dict(data).to_dict() == report.to_dict()
    assert Report.from_dict(data).results == report.results
    assert "charts" not in result("a.x", "passed").to_dict()


def test_a_list_of_numbers_takes_one_line_and_nothing_else_changes() -> None:
    data = {"a": [1, -2.5e-07, 3], "text": "[\n  1,\n  2\n]", "mixed": ["nan", 1.0], "rows": [[1], [2]], "none": []}
    text = as_json(data)
    assert json.loads(text) == data
    assert '"a": [1, -2.5e-07, 3]' in text
    assert len(text.splitlines()) == len(json.dumps(data, indent=2).splitlines()) - 8


def test_every_file_the_package_reads_is_in_the_wheel() -> None:
    root = Path(lmconform.__file__).parent
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {file for pattern in settings["package-data"]["lmconform"] for file in root.glob(pattern)}
    files = {file for file in root.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert sorted(str(file.relative_to(root)) for file in files - packed) == []
