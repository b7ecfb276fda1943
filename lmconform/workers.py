"""How pytest-xdist hands the subjects of a run to its workers."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARE_A_RUN = ("training", "collapse")  # families whose checks look at the same trained copies


def none_chosen(config: pytest.Config) -> bool:
    """Whether the command line has `-n` and no word of how to distribute."""
    named = config.known_args_namespace
    return bool(getattr(named, "numprocesses", None)) and named.dist == "no" and not named.distload


class SubjectScheduling(LoadScopeScheduling):
    """One worker builds a subject and runs all its checks, whoever is free takes the next.

    The last subjects, one less than there are workers, are dealt out by families, so that nobody waits long for the
    last one. Tests that are not of `--lm` are handed out one by one.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._dealt_out: frozenset[str] = frozenset()

    def schedule(self) -> None:
        """Deal the collected items out. Called by xdist when all workers have collected."""
        if self.collection is None:
            collected = next(iter(self.registered_collections.values()))
            subjects = list(dict.fromkeys(name for name, family in map(_subject_and_family, collected) if family))
            self._dealt_out = frozenset(subjects[max(0, len(subjects) - self.numnodes + 1) :])
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        subject, family = _subject_and_family(nodeid)
        if subject not in self._dealt_out:
            return subject
        return f"{subject}-{SHARE_A_RUN[0] if family in SHARE_A_RUN else family}"


def _subject_and_family(nodeid: str) -> tuple[str, str]:
    """`lm::llama-cache.prefill` is of (llama, cache); a test of another kind is of itself and of no family."""
    collector, _, name = nodeid.partition("::")
    subject, _, check = name.rpartition("-")
    family, dot, _ = check.partition(".")
    return (subject, family) if collector == "lm" and dot else (nodeid, "")
