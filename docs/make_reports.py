"""Writes docs/reports.md: the five reports, what their authors concluded, and what the suite says. Minutes of runs.

python docs/make_reports.py                      # run everything and write the page
python docs/make_reports.py --figures runs.json  # keep the figures; a second call only writes the page anew
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fixtures.reports import CASES, Case, TrueCause, named  # noqa: E402
from fixtures.reports.story import Faults, train  # noqa: E402
from lmconform.results import Report as Verdict  # noqa: E402

PAGE = ROOT / "docs" / "reports.md"
SHOWN = 3  # causes of each diagnosis
UNSURE = 0.1  # the score of a first cause below which the page says so


@dataclass(frozen=True)
class Story:
    """What a person wrote about one report; the figures come from the runs."""

    number: str
    title: str
    cases: tuple[str, ...]
    saw: str
    concluded: str
    moral: str


STORIES = (
    Story(
        "000", "The GPT-2 that needed a little help", ("adaptive",),
        "GPT-2's weights were copied, head by head, into a model that gates its heads. It talked nonsense, in loops.",
        "Hidden states had \"different scales than baseline\", so they were multiplied by 0.3; common words were "
        "boosted; trigrams were forbidden to repeat; skip connections were switched off. Under \"next steps\", first "
        "of all: \"review and potentially rewrite the weight transfer procedure\".",
        "The first of the next steps was the right one. The four remedies before it made the text look better and the "
        "fault harder to see. Two numbers per layer, ours over the reference's, would have said where to look.",
    ),
    Story(
        "001", "99.9 % and still \"time time time\"", ("story",),
        "Phase 1 had an accuracy of 0.002 %. After the repair it had 99.9 % on validation texts, and wrote \"once upon "
        "a time, yes, my, own, ran. but it was.\"",
        "\"Learning rate too small\": 3e-4 was raised to 1e-3 and the schedule simplified. Final status: resolved.",
        "Two faults, and the repair of one brought out the other. The rate was never 3e-4: the schedule kept it at a "
        "few billionths. And the 99.9 % is the answer key: every position could see the word it had to predict. A "
        "figure too good for the text it writes is a finding, not a success.",
    ),
    Story(
        "002", "Six encodings, one of them READY", (
            "positional_sinusoidal", "positional_t5_relative", "positional_alibi", "positional_rope",
        ),
        "Six position encodings were put on GPT-2 and Pythia. Device errors came and went; generation crashed with "
        "\"'NoneType' object has no attribute 'new_ones'\" for all but one.",
        "RoPE was \"100% functional\" and recommended for training; the others were \"forward pass ready, generation "
        "needs fix\". Success meant that nothing was raised.",
        "RoPE was the method that raised nothing, and it was wrong in four ways at once. Two others did nothing "
        "whatsoever: a module that returns its input never fails. The word \"works\" needs a sentence after it.",
    ),
    Story(
        "003", "5.5 hours, and then a bigger model", ("staged_3", "staged_0"),
        "After 5.5 hours \"The capital of India is\" was continued with \"the suff , The theat Wal Troll with his love "
        "and father...\".",
        "\"Model TOO SMALL\": 512 in place of 64, and stage 0 first. \"K-1 might be scaling gradients to near-zero\", "
        "\"graph routing might be blocking information flow\".",
        "The plan was sound (start simple, add one part at a time), but the simple stage had no mask and no positions "
        "either. Size does not mend that: a larger model reads the answers faster.",
    ),
    Story(
        "004", "The model that said \"magazine\"", ("quantum",),
        "EOS had a probability of 97.9 % after the prompt; after the repair, \"magazine\" had 86 %, and coverage of "
        "the vocabulary fell from 13 % to 5 %.",
        "\"The fundamental challenge of token collapse remains\", which suggested \"more fundamental architectural "
        "changes\": mixtures of experts, more layers, more terms in the loss.",
        "Most of it could be read off one batch before any training: what the labels were, what the prompt ended in, "
        "what the rate was. A model that says one token usually was told to, or was not given the time to say another.",
    ),
)  # fmt: skip


def run_whole(case: Case) -> dict[str, Any]:
    """The default profile on the model as reported; seconds of processor time, which other work does not lengthen."""
    start = time.process_time()
    verdict = case.check()
    return {"verdict": verdict.to_dict(), "seconds": time.process_time() - start}


def run_alone(case: Case, cause: TrueCause) -> dict[str, Any]:
    verdict = case.check_alone(cause)
    return {"red": sorted(r.id for r in verdict.failed), "place": named(verdict, cause.causes), "ok": verdict.ok,
            "first": [c.id for c in verdict.causes[:SHOWN]]}  # fmt: skip


def measure(kept: Path | None) -> dict[str, Any]:
    """All runs. With a file, what it holds is not run again, and each run is kept as soon as it is made."""
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}

    def need(key: str, made: Any) -> None:
        if key in figures:
            return
        figures[key] = made()
        print(key, file=sys.stderr)
        if kept is not None:
            kept.write_text(json.dumps(figures))

    for case in CASES.values():
        need(case.name, lambda case=case: run_whole(case))
        for cause in case.truth:
            need(f"{case.name}/{cause.flag}", lambda case=case, cause=cause: run_alone(case, cause))
    for name, faults, rate in (
        ("leaking", Faults.only("no_mask"), 3e-3),
        ("dead", Faults.only("noam_by_epoch"), None),
        ("mended", Faults.none(), 3e-3),
    ):
        need(f"headline/{name}", lambda faults=faults, rate=rate: asdict(train(faults, rate=rate)))
    return figures


# -- the page ----------------------------------------------------------------------------------------------------------


def sentence(message: str) -> str:
    """A result's first line: what was found, with its figures."""
    return message.splitlines()[0]


def diagnosis(case: Case, figures: dict[str, Any]) -> Iterable[str]:
    verdict = Verdict.from_dict(figures[case.name]["verdict"])
    yield "```text"
    yield f"{case.spec}: {len(verdict.failed)} checks failed"
    for cause in verdict.causes[:SHOWN]:
        yield f"  {cause.score:4.0%}  {cause.id:28} {' '.join(cause.summary.split())}"
    yield "because, among others"
    shown = [result for id in case.red for result in verdict.failed if result.id == id]
    for result in shown:
        yield f"  {result.id}: {sentence(result.message)}"
    yield "```"
    shown_causes = verdict.causes[:SHOWN]
    if shown_causes[0].score < UNSURE:
        yield ""
        yield (
            "*So many faults at once that no cause is sure of itself: here the red checks are the better guide. Each "
            "fault by itself is in the table.*"
        )
    strays = [f"`{cause.id}`" for cause in shown_causes if cause.id not in case.true_causes]
    if strays:
        yield ""
        yield f"*Not one of this model's faults, though ranked: {', '.join(strays)}.*"


def table(story: Story, figures: dict[str, Any]) -> Iterable[str]:
    yield "| what was really wrong | seen by | named, with that fault alone |"
    yield "| --- | --- | --- |"
    seen: set[str] = set()
    for name in story.cases:
        case = CASES[name]
        for cause in case.truth:
            found = figures[f"{name}/{cause.flag}"]
            method = f" ({name.partition('_')[2]})" if story.number == "002" else ""
            if cause.wrong in seen and not method:
                continue
            seen.add(cause.wrong)
            by = f"`{cause.check}`" if cause.check in found["red"] else "no check"
            yield f"| {cause.wrong}{method} | {by} | {place(cause, found)} |"


def place(cause: TrueCause, found: dict[str, Any]) -> str:
    if found["ok"]:
        return f"no: {cause.unseen}" if cause.unseen else "no"
    if found["place"] not in (1, 2, 3):
        return f"no: {cause.unnamed}" if cause.unnamed else "no"
    id = next(id for id in found["first"] if id in cause.causes)
    return f"`{id}`, " + ("first", "second", "third")[found["place"] - 1]


def headline(figures: dict[str, Any]) -> Iterable[str]:
    yield (
        "Both of the report's headlines, again, at toy size (600 steps on 240 texts made by rule). *In full view* is "
        "how the report counts; *from the words before* is what generation has to go by."
    )
    yield ""
    yield "| | right, in full view | right, from the words before | it writes |"
    yield "| --- | --- | --- | --- |"
    for name, what in (
        ("dead", "Noam factor, by epoch"),
        ("leaking", "constant rate 3e-3, no mask"),
        ("mended", "constant rate 3e-3, causal"),
    ):  # fmt: skip
        found = figures[f"headline/{name}"]
        yield f"| {what} | {found['validation']:.1%} | {found['prefix']:.1%} | {found['text']} |"
    yield ""


def page(figures: dict[str, Any]) -> str:
    keys = [f"{case.name}/{cause.flag}" for case in CASES.values() for cause in case.truth]
    first = sum(figures[key]["place"] == 1 for key in keys)
    three = sum(figures[key]["place"] in (1, 2, 3) for key in keys)
    red = sum(not figures[key]["ok"] for key in keys)
    lines = [
        "# Five reports, read again",
        "",
        "*Generated by `python docs/make_reports.py`; every figure on it is of that run.*",
        "",
        "Five people debugged five language models and wrote down how. Nothing crashed for long, every one of them "
        "found something, and four of the five mended the wrong thing. Here each model stands as its author had it "
        "(`fixtures/reports`), and the suite, which has not read the reports, is asked.",
        "",
        f"The models hold {len(keys)} faults, each counted in every model that has it. Planted one at a time, {red} of "
        f"them turn a check red; the true cause is named first for {first} and among the first three for {three}. With "
        "every switch off the same code is green, which shows that these faults, and nothing else, were the trouble. "
        "What the suite does not see or name is listed with the rest.",
        "",
    ]
    for story in STORIES:
        seconds = [figures[name]["seconds"] for name in story.cases]
        took = " and ".join([", ".join(f"{s:.0f}" for s in seconds[:-1])] * (len(seconds) > 1) + [f"{seconds[-1]:.0f}"])
        lines += [
            f"## {story.number}: {story.title}", "",
            f"**What the author saw.** {story.saw}", "",
            f"**What the author concluded.** {story.concluded}", "",
            f"**What the suite says** of the whole model, after {took} seconds of one processor core:",
            "",
        ]  # fmt: skip
        for name in story.cases:
            lines += [*diagnosis(CASES[name], figures), ""]
        lines += [*table(story, figures), ""]
        if story.number == "001":
            lines += headline(figures)
        lines += [story.moral, ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="where figures are kept between calls (JSON)")
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    PAGE.write_text(page(measure(chosen.figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
