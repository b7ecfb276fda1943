"""pytest --lm SPEC -n N: the same verdicts, and whose checks a worker runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from xdist.remote import Producer

from lmconform.workers import SubjectScheduling

CHEAP = ("--lm-select", "contract.shape", "--lm-select", "contract.finite")
CHECKS = ("training.memorize", "collapse.tokens", "contract.shape", "contract.finite", "cache.prefill")


class Worker:
    """What the scheduler asks of one: it runs what it was sent, in order, and never answers before it is asked."""

    gateway = SimpleNamespace(id="worker")

    def __init__(self) -> None:
        self.shutting_down = False
        self.sent: list[int] = []
        self.done = 0

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def dealt(nodeids: list[str], workers: int) -> list[list[str]]:
    """What each worker ran, where all take the same time for a test."""
    config: Any = SimpleNamespace(
        getvalue={"tx": ["popen"] * workers}.__getitem__, option=SimpleNamespace(loadscopereorder=False)
    )
    scheduler = SubjectScheduling(config, Producer("test", enabled=False))
    nodes: list[Any] = [Worker() for _ in range(workers)]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, nodeids)
    scheduler.schedule()
    while any(node.done < len(node.sent) for node in nodes):
        for node in nodes:
            if node.done < len(node.sent):
                scheduler.mark_test_complete(node, node.sent[node.done])
                node.done += 1
    return [[nodeids[index] for index in node.sent] for node in nodes]


def items(*names: str) -> Iterator[str]:
    for name in names:
        yield from (f"lm::{name}-{check}" for check in CHECKS)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("subjects", [("a",), ("a", "b-7B", "c", "d")], ids=["one", "four"])
def test_every_item_is_run_once(workers: int, subjects: tuple[str, ...]) -> None:
    nodeids = [*items(*subjects), "test_other.py::test_other", "lm::a-snapshot", "lm::snapshots-used"]
    assert sorted(chain(*dealt(nodeids, workers))) == sorted(nodeids)


def test_all_subjects_but_the_last_are_built_by_one_worker() -> None:
    ran = dealt(list(items("a", "b-7B", "last")), 2)
    for name in ("a", "b-7B"):
        assert [sum(nodeid in set(items(name)) for nodeid in nodeids) for nodeids in ran] in ([5, 0], [0, 5])
    shared = [{nodeid.rpartition("-")[2] for nodeid in nodeids if "::last-" in nodeid} for nodeids in ran]
    assert all(shared), "both have a part of the last"
    assert any({"training.memorize", "collapse.tokens"} <= checks for checks in shared), "one worker trains"


def test_workers_give_the_same_verdicts_and_one_ledger(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--lm", "own_models:Sound", "--lm", "own_models:Broken", *CHEAP, "-n", "2")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines_random(["Sound conforms: 2 passed", "Broken does not conform: 1 passed, 1 failed"])


@pytest.mark.parametrize(
    ("arguments", "scheduler"),
    [
        ((), "SubjectScheduling"),
        (("--dist", "worksteal"), "WorkStealingScheduling"),
        (("--dist", "load"), "LoadScheduling"),
        (("-d",), "LoadScheduling"),
        (("--dist", "loadgroup"), "LoadGroupScheduling"),
    ],
    ids=["by-default", "worksteal", "load", "short-for-load", "loadgroup"],
)
def test_workers_take_whole_subjects_unless_told_otherwise(
    project: pytest.Pytester, arguments: tuple[str, ...], scheduler: str
) -> None:
    result = project.runpytest_subprocess("--lm", "own_models:Sound", *CHEAP, "-n", "2", "-v", *arguments)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"scheduling tests via {scheduler}"])


def test_a_projects_own_scheduler_stands(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        from xdist.scheduler import LoadFileScheduling

        def pytest_xdist_make_scheduler(config, log):
            return LoadFileScheduling(config, log)
        """
    )
    result = project.runpytest_subprocess("--lm", "own_models:Sound", *CHEAP, "-n", "2", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["scheduling tests via LoadFileScheduling"])


@pytest.mark.parametrize(
    ("arguments", "first"),
    [((), "training.optimizer"), (("--lm-time-budget", "60"), "batching.permutation")],
    ids=["shared-work-first", "cheapest-first-within-a-budget"],
)
def test_workers_order(project: pytest.Pytester, arguments: tuple[str, ...], first: str) -> None:
    selected = ("--lm-select", "batching.permutation", "--lm-select", "training.optimizer")
    subjects = ("--lm", "own_models:Sound", "--lm", "own_models:Broken")
    result = project.runpytest_subprocess(*subjects, *selected, "-n", "1", "-v", *arguments)
    order = [line.split()[-1] for line in result.outlines if line.startswith("[gw0] [")]
    second = ({"batching.permutation", "training.optimizer"} - {first}).pop()
    assert order == [f"lm::{name}-{check}" for name in ("Sound", "Broken") for check in (first, second)]
