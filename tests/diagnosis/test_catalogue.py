"""The catalogue of causes is whole and well formed, and names only what exists."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections import Counter
from importlib import resources
from typing import Any

import pytest

from fixtures.faults import all_faults
from lmconform.registry import all_checks

TEXT = resources.files("lmconform.diagnosis").joinpath("causes.toml").read_text(encoding="utf-8")
CAUSES: list[dict[str, Any]] = tomllib.loads(TEXT)["cause"]
IDS = [cause["id"] for cause in CAUSES]
KEYS = {"id", "summary", "explanation", "confirm", "mend", "references", "shows", "spares", "similar"}
RELIABILITIES = {"always", "often", "sometimes"}
LONGEST = 400  # characters: `lmconform explain` is read on a terminal

# every cause of the specification, which other programs rely on
SPECIFIED = {
    "mask": "missing off_by_one inverted block_leak soft fast_path train_only query_offset window padding_ignored "
    "padding_nan half_overflow",
    "position": "absent offset ignores_mask shared_row restarts_on_decode collision low_precision one_side_rotated "
    "not_relative layout base_kept no_op",
    "batch": "cross_row",
    "norm": "over_sequence epsilon",
    "cache": "stale wrong_value truncated mutated_in_place not_reordered ignored",
    "embeds": "path_differs",
    "attention": "unscaled gated_off heads_scrambled kv_groups",
    "scale": "hidden logits residual_growth",
    "init": "logits_too_large shared_layers residual_scaling not_seeded",
    "grad": "dead_parameter unregistered frozen wrong vanishing exploding checkpoint_differs",
    "device": "unregistered_tensor created_on_default hard_coded",
    "dtype": "hard_coded overflow",
    "dropout": "in_eval",
    "state": "carried_over",
    "inputs": "mutated",
    "mode": "not_restored",
    "loss": "unshifted double_shift ignore_index normalisation accumulation_wrong smoothing_wrong",
    "weights": "not_saved not_loaded untied sliced_wrong buffer_uninitialised",
    "generation": "mask_hidden eos_dominates prompt_has_eos penalty_sign stop_ignored ids_out_of_vocab control_wrong "
    "beam_score_wrong inputs_differ",
    "config": "unread",
    "contract": "shape_wrong bad_input_accepted",
    "tokenizer": "flags_ignored cached_flags double_bos pad_is_eos ids_out_of_range decode_wrong",
    "data": "eos_pollution rolled_labels empty_examples split_leak",
    "lr": "too_small too_large schedule_per_epoch not_applied",
    "optimizer": "missing_parameters stale_parameters decays_norms",
    "training": "cannot_memorize ignores_context label_leak resume_differs",
    "collapse": "eos single_token",
    "distributed": "replicas_diverge rank_accumulation",
    "peft": "adapter_inert merge_differs",
}
# checks of the specification that need not be registered yet
SPECIFIED_CHECKS = {
    "loss": "smoothing",
    "placement": "moves default_device parity compile",
    "precision": "bfloat16 float16 backends",
    "training": "memorize lr_sweep step uses_context honest resume schedule optimizer weight_decay",
    "collapse": "tokens samples labels",
    "tokenizer": "flags round_trip specials padding bounds",
    "distributed": "ddp fsdp",
    "peft": "inert merge",
}


def _dotted(families: dict[str, str]) -> set[str]:
    return {f"{family}.{name}" for family, names in families.items() for name in names.split()}


def _every_check() -> set[str]:
    return set(all_checks()) | _dotted(SPECIFIED_CHECKS)


def _each(key: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(key, CAUSES, ids=IDS)


def test_ids_are_unique() -> None:
    assert [id for id, count in Counter(IDS).items() if count > 1] == []


def test_causes_of_the_specification_are_present() -> None:
    assert sorted(_dotted(SPECIFIED) - set(IDS)) == []


def test_causes_of_planted_faults_are_present() -> None:
    assert sorted({fault.cause for fault in all_faults()} - set(IDS)) == []


def test_every_cause_has_a_planted_fault() -> None:
    assert sorted(set(IDS) - {fault.cause for fault in all_faults()}) == []


def test_a_second_cause_of_a_fault_exists_and_is_justified() -> None:
    for fault in all_faults():
        assert set(fault.also) <= set(IDS) - {fault.cause}
        assert bool(fault.also) == bool(fault.why_also), fault.id


def test_second_causes_are_few() -> None:
    assert sum(bool(fault.also) for fault in all_faults()) <= len(all_faults()) / 20


def test_no_cause_is_called_like_a_check() -> None:
    assert sorted(set(IDS) & _every_check()) == []


def test_every_check_points_to_a_cause() -> None:
    shown = {check for cause in CAUSES for check in cause["shows"]}
    assert sorted(set(all_checks()) - shown) == []


def test_no_two_causes_predict_the_same_for_the_same_reason() -> None:
    summaries = Counter(cause["summary"] for cause in CAUSES)
    assert [summary for summary, count in summaries.items() if count > 1] == []


@_each("cause")
def test_fields(cause: dict[str, Any]) -> None:
    assert set(cause) == KEYS
    assert re.fullmatch(r"[a-z]+\.[a-z_]+", cause["id"])
    for key in ("references", "spares", "similar"):
        values = cause[key]
        assert isinstance(values, list)
        assert all(isinstance(value, str) and value.strip() == value != "" for value in values)
        assert len(set(values)) == len(values), f"{key} names something twice"


@_each("cause")
def test_texts(cause: dict[str, Any]) -> None:
    for key in ("summary", "explanation", "confirm", "mend"):
        text = cause[key]
        assert text.strip() == text != "", f"{key} is empty or ends in blanks"
        assert len(text) <= LONGEST, f"{key} has {len(text)} characters"
        assert " ".join(text.split()) == text, f"{key} holds a break or two blanks"
    assert cause["summary"].endswith(".")
    assert not re.search(r"[.!?] [A-Z]", cause["summary"]), "the summary is one sentence"


@_each("cause")
def test_command_can_be_filled_in(cause: dict[str, Any]) -> None:
    filled = cause["confirm"].replace("{spec}", "model.py:build")
    assert "{" not in filled, "{spec} is the only placeholder"
    for command in re.findall(r"lmconform (\w+)", filled):
        assert command in ("check", "sweep", "explain")
    known = _every_check()
    for quoted, bare in re.findall(r"--select (?:'([^']+)'|(\S+))", filled):
        for name in (quoted or bare.rstrip(".,:;")).split(","):
            assert fnmatch.filter(known, name), f"--select {name} selects nothing"


@_each("cause")
def test_checks_exist(cause: dict[str, Any]) -> None:
    known = _every_check()
    assert cause["shows"], "a cause that no check shows cannot be found"
    assert sorted(set(cause["shows"]) - known) == []
    assert set(cause["shows"].values()) <= RELIABILITIES
    assert sorted(set(cause["spares"]) - known) == []
    assert sorted(set(cause["spares"]) & set(cause["shows"])) == [], "shown and spared at once"


@_each("cause")
def test_similar_causes_exist(cause: dict[str, Any]) -> None:
    assert sorted(set(cause["similar"]) - set(IDS)) == []
    assert cause["id"] not in cause["similar"]
