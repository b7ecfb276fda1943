"""The one list of checks that every front end iterates."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmconform.cases import Case, Space
from lmconform.flags import PROFILES

if TYPE_CHECKING:
    from lmconform.context import Context
    from lmconform.specimen import Specimen

CheckFunction = Callable[["Specimen", "Context"], None]

FAMILIES = (
    "contract", "causality", "batching", "padding", "positions", "cache", "embeds", "generation", "loss", "gradients",
    "init", "scale", "parity", "persistence", "placement", "precision", "training", "collapse", "tokenizer", "config",
    "distributed", "peft",
)  # fmt: skip
COMPARES_LOGITS = ("contract.shape", "contract.finite", "contract.repeatable")  # what such a check requires
CAPABILITIES = {
    "mask": "attention_mask",
    "pos": "position_ids",
    "cache": "a key/value cache or recurrent state that forward() takes and gives back",
    "embeds": "inputs_embeds",
    "labels": "labels or targets, and a loss",
    "gen": "generate()",
    "save": "save_pretrained() or a state_dict",
    "rebuild": "a builder that can be called again",
    "config": "a config object",
    "ckpt": "gradient checkpointing",
    "ref": "a reference model",
    "tok": "a tokenizer",
    "recipe": "a recipe (optimizer, schedule, loss or data)",
    "processes": "a second process that can build the model, and torch.distributed",
    "peft": "the package peft, and linear layers in repeated blocks",
}


class UnknownCheck(LookupError):
    """A selection or an expected failure names a check that does not exist."""


@dataclass(frozen=True)
class Check:
    """One property that must hold.

    `needs` names capabilities; without one of them the check is not applicable. `requires` names checks whose
    failure would make this one's verdict meaningless: then it is blocked. `profile` is the cheapest profile that
    includes it. `grid` lists the fixed cases, `space` is where the smallest failing case is searched.
    """

    id: str
    function: CheckFunction
    holds: str
    needs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    profile: str = "default"
    severity: str = "fault"
    space: Space | None = None
    grid: tuple[Case, ...] = ()

    @property
    def family(self) -> str:
        return self.id.partition(".")[0]

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""


_checks: dict[str, Check] = {}
_loaded = False


def register_check(
    id: str,
    *,
    holds: str,
    needs: Iterable[str] = (),
    requires: Iterable[str] = ("contract.shape",),
    profile: str = "default",
    severity: str = "fault",
    space: Space | None = None,
    grid: Iterable[Mapping[str, Any]] = (),
) -> Callable[[CheckFunction], CheckFunction]:
    """Register `check_<property>(subject, ctx)`, which raises `Violation` when the property does not hold.

    Raises ValueError for an id that is taken or not `family.name`, or for an unknown profile, severity or capability.
    """
    family, _, name = id.partition(".")
    if not (family and name):
        raise ValueError(f"a check's id is family.name, not {id!r}")
    if id in _checks:
        raise ValueError(f"check id {id!r} is taken by {_checks[id].function.__module__}")
    if profile not in PROFILES:
        raise ValueError(f"check {id}: profile {profile!r} is none of {', '.join(PROFILES)}")
    if severity not in ("fault", "warning"):
        raise ValueError(f"check {id}: severity {severity!r} is neither fault nor warning")
    unknown = [need for need in needs if need not in CAPABILITIES]
    if unknown:
        raise ValueError(f"check {id}: unknown capability {', '.join(unknown)}; known: {', '.join(CAPABILITIES)}")
    if bool(space) != bool(tuple(grid)):
        raise ValueError(f"check {id}: space and grid come together")

    def register(function: CheckFunction) -> CheckFunction:
        cases = tuple(Case(case) for case in grid)
        _checks[id] = Check(id, function, holds, tuple(needs), tuple(requires), profile, severity, space, cases)
        return function

    return register


def all_checks() -> dict[str, Check]:
    """Every registered check by id, cheap to call: check modules import torch only when a check runs."""
    global _loaded
    if not _loaded:
        import lmconform.checks

        for module in pkgutil.iter_modules(lmconform.checks.__path__):
            importlib.import_module(f"lmconform.checks.{module.name}")
        _loaded = True
    return dict(_ordered(tuple(map(id, _checks.values()))))


@functools.lru_cache(maxsize=1)
def _ordered(identities: tuple[int, ...]) -> dict[str, Check]:
    """Families that a later one builds on come first; within one, the order of the source. Anew where checks change.

    Not the order of registration: that depends on which module somebody imported first.
    """
    return dict(sorted(_checks.items(), key=lambda item: _place(item[1])))


def _place(check: Check) -> tuple[int, str, int]:
    rank = FAMILIES.index(check.family) if check.family in FAMILIES else len(FAMILIES)
    code = getattr(inspect.unwrap(check.function), "__code__", None)  # a callable object has none
    return rank, getattr(check.function, "__module__", ""), code.co_firstlineno if code else 0


def get_check(id: str) -> Check:
    """The check of that id. Raises UnknownCheck, which suggests the nearest ids."""
    checks = all_checks()
    if id not in checks:
        raise UnknownCheck(unknown_id(id, checks))
    return checks[id]


def unknown_id(id: str, known: Iterable[str], kind: str = "check") -> str:
    """One sentence for a mistyped id."""
    near = difflib.get_close_matches(id, list(known), n=2, cutoff=0.65)
    return f"no {kind} is called {id!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; see: lmconform list")


def select_checks(profile: str = "default", select: Iterable[str] = (), deselect: Iterable[str] = ()) -> list[Check]:
    """The checks of a profile, narrowed by ids, families or globs, in the registry's order.

    A check named by its whole id runs whatever its profile; a family or a glob stays within the profile.
    Raises UnknownCheck for a pattern that matches nothing, ValueError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is none of {', '.join(PROFILES)}")
    checks = all_checks()
    chosen = set().union(*(matching(pattern, checks) for pattern in select)) if select else None
    dropped: set[str] = set().union(*(matching(pattern, checks) for pattern in deselect)) if deselect else set()
    depth = PROFILES.index(profile)
    named = set(select)
    return [
        check
        for check in checks.values()
        if check.id not in dropped
        and (chosen is None or check.id in chosen)
        and (check.id in named or PROFILES.index(check.profile) <= depth)
    ]


def matching(pattern: str, checks: Mapping[str, Check]) -> set[str]:
    """The ids that an id, a family name or a glob stands for. Raises UnknownCheck where there is none."""
    ids = {id for id, check in checks.items() if fnmatch.fnmatchcase(id, pattern) or check.family == pattern}
    if not ids:
        families = {check.family for check in checks.values()}
        raise UnknownCheck(unknown_id(pattern, [*checks, *families]))
    return ids
