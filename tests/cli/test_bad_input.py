"""Whatever a subject does, the command says so in a line and goes on: exit 2 unbuilt, exit 1 with a finding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lmconform.loading import load_spec
from lmconform.subject import BuildError

UNBUILT = {
    "raises": "the builder raised ValueError: width 30 is not divisible by 4 heads (at broken.py:",
    "returns_text": "the builder returned str, expected an nn.Module, a (model, tokenizer) pair",
    "prints_and_raises": "the builder raised OSError: shard 2 of 2 is missing",
    "exits": "the builder called sys.exit(5)",
    "exits_hard": "the process ended itself with exit code 0 while building",
    "crashes": "the process died (SIGSEGV) while building (at broken.py:",
    "is_killed": "the process died (SIGKILL: killed from outside, most likely because memory ran out) while building",
    "wants_ever_more": "out of memory: tried to allocate 1.0 GiB at once",
    "not_callable": "a subject is an nn.Module or a callable without arguments that returns one, not int",
    "no_such_builder": "has no attribute 'no_such_builder'",
    "sounds": "did you mean sound?",
    "says_nothing": "found no way to get logits [batch, time, vocab] out of _SaysNothing. Tried,",
}
ELSEWHERE = {
    "no.such.module:build": "there is no module no",
    "./no-such-folder": "is no existing directory",
    "llama": "did you mean transformers:llama?",
}
NOWHERE = {
    "no.such.module:build": "there is no module no",
    "torch_:nn": "there is no module torch_",
    "transformers:lama": "did you mean 'llama'",
    "nowhere/model.py:build": "no such file",
    "model.py": "name the attribute too, as in model.py:build",
    "a/b/c": "is no existing directory, no file.py:attr, no transformers:TYPE, no pkg.mod:attr and no hub id",
}
# builder: check, its status, what its message says, exit code
RUNNING: dict[str, tuple[str, str, str, int]] = {
    "gives_nan": ("contract.finite", "failed", "logits are NaN or infinite on usual input", 1),
    "last_position_only": ("contract.shape", "failed", "logits are [1, 1, 67], expected [batch, time, vocab]", 1),
    "drops_always": ("contract.repeatable", "failed", "two eval calls on the same tokens give different logits", 1),
    "changes_itself": ("contract.repeatable", "failed", "changed the model's own weights: head.weight", 1),
    "raises_for_3_rows": ("contract.shape", "error", "the model raised RuntimeError: The size of tensor a (2)", 1),
    "recurses_for_3_rows": ("contract.shape", "error", "the model recursed without end", 1),
    "wants_too_much_for_3_rows": ("contract.shape", "error", "out of memory: tried to allocate 16384.0 GiB", 1),
    "exits_in_forward": ("contract.shape", "error", "the model called sys.exit(4) (at broken.py:", 1),
    "exits_hard_in_forward": ("contract.shape", "error", "the process ended itself with exit code 9 while running", 1),
    "crashes_in_forward": ("contract.shape", "error", "the process died (SIGSEGV) while running contract.shape (at", 1),
    "loops_beyond_40": ("contract.shape", "error", "did not end within 3 s and was stopped (at broken.py:", 1),
    "hangs_deaf_beyond_40": ("contract.shape", "error", "within 3 s and its process was stopped (at broken.py:", 1),
    "prints_in_forward": ("contract.shape", "passed", "", 0),
    "prints": ("contract.shape", "passed", "", 0),
    "reads_input": ("contract.shape", "passed", "", 0),
}


def no_traceback(text: str) -> bool:
    return "Traceback" not in text and 'File "' not in text


@pytest.fixture(scope="module")
def both(lmconform: Callable[..., Any], broken: Callable[[str], str], tmp_path_factory: Any) -> Any:
    """The two long calls, side by side."""
    folder = tmp_path_factory.mktemp("running")
    specs = [*map(broken, UNBUILT), *ELSEWHERE, broken("sound")]
    running = [
        *map(broken, RUNNING), "--select", "contract.shape,contract.finite,contract.repeatable", "--timeout", "3",
        "--json", str(folder / "{subject}.json"), "--html", str(folder / "all.html"),
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lmconform, "check", *specs, "--select", "contract.shape")
        second = pool.submit(lmconform, "check", *running)
        return first.result(), (second.result(), folder)


@pytest.fixture(scope="module")
def unbuilt(both: Any) -> Any:
    return both[0]


@pytest.fixture(scope="module")
def running(both: Any) -> Any:
    return both[1]


@pytest.mark.parametrize("name", UNBUILT)
def test_unbuilt_subject_gives_its_reason(unbuilt: Any, broken: Callable[[str], str], name: str) -> None:
    line = next(line for line in unbuilt.err.splitlines() if line.startswith(broken(name) + " could not be built: "))
    assert UNBUILT[name] in line


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_unknown_spec_gives_its_reason(unbuilt: Any, spec: str) -> None:
    line = next(line for line in unbuilt.err.splitlines() if line.startswith(spec + " could not be built: "))
    assert ELSEWHERE[spec] in line


@pytest.mark.parametrize("spec", NOWHERE)
def test_a_spec_that_leads_nowhere_says_where_it_looked(spec: str) -> None:
    with pytest.raises(BuildError) as raised:
        load_spec(spec).open()
    assert NOWHERE[spec] in str(raised.value)


def test_unbuilt_subjects_do_not_stop_the_others(unbuilt: Any) -> None:
    assert unbuilt.code == 2
    assert "sound: no finding, the one check that ran holds." in unbuilt.out
    assert f"{len(UNBUILT) + len(ELSEWHERE) + 1} subjects" in unbuilt.out
    assert no_traceback(unbuilt.out)
    assert no_traceback(unbuilt.err)


def test_what_was_printed_before_a_failure_is_shown(unbuilt: Any) -> None:
    assert "printed last: reading shard 1 of 2" in unbuilt.err


def test_unknown_convention_shows_the_adapter(unbuilt: Any) -> None:
    assert "def call(model, input_ids):" in unbuilt.err


def of(folder: Path, name: str) -> dict[str, Any]:
    (file,) = folder.glob(f"*broken.py-{name}.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", RUNNING)
def test_misbehaviour_is_one_clear_finding(running: Any, name: str) -> None:
    check, status, says, code = RUNNING[name]
    report = of(running[1], name)
    results = {result["id"]: result for result in report["results"]}
    assert results[check]["status"] == status
    assert says in results[check]["message"]
    assert report["ok"] is (code == 0)
    assert len(results) == 3  # the others went on
    if code:
        assert results[check]["repro"].startswith("lmconform check ")
        assert f"--select {check}" in results[check]["repro"]
        reds = [id for id, result in results.items() if result["status"] in ("failed", "error")]
        assert reds == [check]


def test_misbehaviour_of_one_is_no_matter_to_the_next(running: Any) -> None:
    ran, _ = running
    assert ran.code == 1
    assert no_traceback(ran.out)
    assert ran.err == ""
    for name in RUNNING:
        assert re.search(rf"^  {name}(:| does)", ran.out, re.MULTILINE)


def test_prints_are_counted_and_kept_out_of_the_report(running: Any) -> None:
    ran, folder = running
    # two lines a build, and contract.repeatable builds anew
    assert of(folder, "prints")["notes"] == ["the subject printed 4 lines"]
    assert "still loading" not in ran.out
    assert "forward [" not in ran.out


def test_checks_after_a_crash_are_blocked_by_it_and_not_tried_again(running: Any) -> None:
    report = of(running[1], "crashes_in_forward")
    assert [result["status"] for result in report["results"]] == ["error", "blocked", "blocked"]
    assert report["results"][1]["message"].startswith("blocked by contract.shape: the process died (SIGSEGV)")
    assert report["died"].startswith("the process died (SIGSEGV) while running contract.shape")


def test_one_page_holds_all_subjects(running: Any) -> None:
    page = (running[1] / "all.html").read_text()
    assert page.count('<details class="more subject"') == len(RUNNING)
    assert not re.search(r'(src|href)="(?!#|data:)|@import|url\((?!#)', page)


def test_hang_while_building_ends(lmconform: Callable[..., Any], broken: Callable[[str], str]) -> None:
    ran = lmconform("check", broken("hangs"), "--select", "contract.shape", "--timeout", "6")
    assert ran.code == 2
    assert "building did not end within 6 s (at broken.py:" in ran.err
    assert "in hangs); --timeout gives it longer" in ran.err
