"""docs/common_tests.md from the figures of docs/compare_common_tests.py."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

from compare_common_tests import of_generation

from lmconform.registry import all_checks

if TYPE_CHECKING:
    from fixtures.faults import Fault

BASELINE = "common tests, pytest -n 2"
GENERATION = "generation/test_utils.py"
LEFT_OUT = {
    "exporters/test_export.py": "the tests of export",
    GENERATION: "the tests of generation (among them left padding and going on from a cache)",
    "utils/test_configuration_utils.py": "one list of the configuration's common arguments",
}


INCIDENTAL = {  # tests that see how a fault was planted rather than what it does wrong
    "test_causal_lm_loss_honors_shift_labels": "`test_causal_lm_loss_honors_shift_labels` to a loss written anew that "
    "knows no `shift_labels` (in lmconform `loss.shift_labels`), not to what that loss does wrong",
    "test_model_get_set_embeddings": "`test_model_get_set_embeddings` to a module put around the embedding, not to the "
    "future that leaks through it",
}

BUSY = 2.0  # more runs than a process under measurement, and the one before it


def page(figures: dict[str, Any], left_out: dict[str, str]) -> str:
    """The whole Markdown page. `left_out`: the host's faults that could not be compared, with the reason."""
    parts = [_head(figures)]
    if "times" in figures:
        parts.append(_times(figures))
    if "faults" in figures:
        parts += [_faults(figures, left_out), _lists(figures), _reading(figures)]
    return "\n\n".join(parts) + "\n"


def _head(figures: dict[str, Any]) -> str:
    suite, machine = figures["suite"], figures["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    missing = [LEFT_OUT[path] for path in figures["missing"]]
    text = f"""\
# Beside transformers' common tests

Written by `python docs/compare_common_tests.py --transformers-tests DIR`. Llama under transformers' own common tests
(`ModelTesterMixin`, `GenerationTesterMixin`, `TrainingTesterMixin` and `ConfigTester` of the installed version, at the
sizes of transformers' own testers: {suite["tests"]} tests, {suite["skipped"]} of them skipped, because they want a GPU,
the network or another kind of model) and under `lmconform`. {machine["processor"]}, {machine["cores_allowed"]} cores,
one thread a process; {versions}.

Not among the common tests here: those of pipelines, which load tokenizers from the hub, and those of FSDP and of
tensor parallelism, which start processes of their own."""
    if missing:
        text += " Not in the source archive that they were taken from: " + "; ".join(missing) + "."
    if suite["not_green"]:
        names = ", ".join(f"`{id.rpartition('::')[2]}`" for id in suite["not_green"])
        text += f" Not counted, because they fail on the sound model here: {names}."
    return text


def _times(figures: dict[str, Any]) -> str:
    times = figures["times"]
    rounds = min(len(runs) for runs in times.values())
    loads = sorted(load for runs in times.values() for _, _, load in runs)
    lines = [
        "## Time",
        "",
        f"Whole processes, imports included, in turns; medians of {rounds}. The last two columns compare with "
        f"`{BASELINE}`, round by round. The load of the machine was {loads[0]} to {loads[-1]} when a run began"
        + (": other work ran beside, so the processor's time is the fairer one." if loads[-1] > BUSY else "."),
        "",
        "| what | wall clock | processor | times less processor time | times less wall clock |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in times.items():
        wall, processor = (median(run[clock] for run in runs) for clock in (0, 1))
        less = [_less(times[BASELINE], runs, clock) for clock in (1, 0)]
        lines.append(f"| {name} | {wall:.1f} s | {processor:.1f} s | {less[0]:.1f} | {less[1]:.1f} |")
    return "\n".join(lines)


def _less(base: list[list[float]], runs: list[list[float]], clock: int) -> float:
    """How many times less these runs take than the baseline's of the same round."""
    return median(before[clock] / run[clock] for before, run in zip(base, runs, strict=False))


def _rows(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per fault: caught by the common tests, by our default profile, by our smoke profile."""
    faults = _known()
    rows = {}
    for id, found in figures["faults"].items():
        if id.startswith("sound.") or not found["theirs"]["fits"]:
            continue
        rows[id] = {
            "fault": faults[id],
            "theirs": found["theirs"]["caught"],
            "test": found["theirs"].get("test", ""),
            "default": _ours(figures, id, "default"),
            "smoke": _ours(figures, id, "smoke"),
        }
    return rows


def _ours(figures: dict[str, Any], id: str, profile: str) -> list[str]:
    """The checks that are red on the fault and not on its sound host."""
    sound = next(found for name, found in figures["faults"].items() if name.startswith("sound."))["ours"]["default"]
    return [check for check in figures["faults"][id]["ours"][profile] if check not in sound]


def _known() -> dict[str, Fault]:
    from fixtures.faults import all_faults

    return {fault.id: fault for fault in all_faults()}


def _faults(figures: dict[str, Any], left_out: dict[str, str]) -> str:
    rows = _rows(figures)
    groups = {
        "what the model computes": [row for row in rows.values() if not of_generation(row["fault"])],
        "`generate()` alone": [row for row in rows.values() if of_generation(row["fault"])],
    }
    groups["all"] = [row for group in groups.values() for row in group]
    lines = [
        "## Planted faults",
        "",
        "Every fault of `fixtures/faults/` on a Llama host that is a change of the model. Both suites get the fault in "
        "the constructor, the common tests in every `LlamaModel` and `LlamaForCausalLM` that they build or load; with "
        "nothing planted in the same way they pass what they pass on the plain classes. The common tests stop at the "
        "first test that fails, and fails again when run alone; of lmconform, a check counts that is red (warnings "
        "included) and is not on the sound host. Training, distributed and peft checks run on the faults that concern "
        "them. The heads for classification are left out here: they stand on the same `LlamaModel`.",
        "",
        "| faults | number | common tests | lmconform smoke | lmconform default | both | only lmconform (default) | "
        "only common tests | neither |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in groups.items():
        pairs = [(row["theirs"], bool(row["default"])) for row in group]
        smoke = sum(bool(row["smoke"]) for row in group)
        cells = [
            len(group), sum(their for their, _ in pairs), smoke, sum(our for _, our in pairs),
            *(pairs.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))),
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    why: dict[str, list[str]] = defaultdict(list)
    for id, reason in left_out.items():
        why[reason].append(id)
    for id, found in figures["faults"].items():
        if not id.startswith("sound.") and not found["theirs"]["fits"]:
            error = found["theirs"]["message"].partition(":")[0]
            why[f"cannot be planted by a constructor, at the sizes of the common tests ({error})"].append(id)
    lines += ["", "Left out:", ""]
    lines += [f"- {reason}: {', '.join(f'`{id}`' for id in sorted(ids))}" for reason, ids in why.items()]
    incidental = [text for test, text in INCIDENTAL.items() if any(row["test"] == test for row in rows.values())]
    if incidental:
        lines += ["", f"A catch counts whatever the test objects to: {'; '.join(incidental)}."]
    if GENERATION in figures["missing"]:
        lines += ["", "The second row is no verdict on the common tests: their own tests of generation did not run."]
    return "\n".join(lines)


def _lists(figures: dict[str, Any]) -> str:
    rows = _rows(figures)
    titles = {
        (True, True): "Caught by both",
        (False, True): "Caught by lmconform alone",
        (True, False): "Caught by the common tests alone",
        (False, False): "Caught by neither",
    }
    smoke = {check.id for check in all_checks().values() if check.profile == "smoke"}
    parts = []
    for pair, title in titles.items():
        inside = [row for row in rows.values() if (row["theirs"], bool(row["default"])) == pair]
        lines = [f"### {title}: {len(inside)}", ""]
        if inside:
            lines += [
                "| fault | done to the model | lmconform (in *smoke*) | common tests |",
                "| --- | --- | --- | --- |",
            ]
        for row in inside:
            # the checks named beforehand, where they are red: what else turns red follows from them
            named = [check for check in row["fault"].kills if check in row["default"]] or row["default"][:2]
            told = ", ".join(f"*{check}*" if check in smoke else check for check in named)
            if not named:
                told = ", ".join(f"({check}, {all_checks()[check].profile})" for check in row["fault"].kills)
            lines.append(f"| `{row['fault'].id}` | {_cell(row['fault'].mechanism)} | {told} | {row['test']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _reading(figures: dict[str, Any]) -> str:
    only = [id for id, row in _rows(figures).items() if row["theirs"] and not row["default"]]
    gaps = f"Theirs alone, so a gap of the default profile: {', '.join(f'`{id}`' for id in only)}." if only else ""
    return f"""\
## Reading

The common tests ask whether a model keeps transformers' contract: that it loads from and saves to every form of
checkpoint (other dtypes, missing and mismatched keys, tied weights, a bare base model), that embeddings can be resized,
weights offloaded to CPU or disk and initialised on the meta device, that attention backends can be chosen and agree,
that hidden states and attentions come out in the promised shapes, that heads for classification take their problem
types, that plans for tensor parallelism name real parameters. lmconform has no check for most of that, and no planted
fault either: the table is about what a model computes, and its faults were written for lmconform. On these, the
common tests compare two ways of calling that share the fault, or shapes, at small sizes, with weights as they were
initialised and the norms' epsilon set to 1. {gaps}""".rstrip()
