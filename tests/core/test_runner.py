"""The runner's verdicts: blocked, not applicable, confirmed in float64, shrunk, stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fixtures.subjects import plain
from lmconform import Context, Span, Status, Subject, registry
from lmconform.registry import Check, get_check
from lmconform.results import of_the_instrument
from lmconform.runner import Runner, run_all
from lmconform.specimen import Specimen

Register = Callable[..., Check]


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    return Subject(plain).open()


@pytest.fixture
def register() -> Iterator[Register]:
    """Registers a check for one test."""
    registry.all_checks()
    before = dict(registry._checks)

    def add(function: Callable[[Specimen, Context], None], id: str = "own.check", **options: object) -> Check:
        registry.register_check(id, holds="a test's own property", **options)(function)  # type: ignore[arg-type]
        return get_check(id)

    yield add
    registry._checks.clear()
    registry._checks.update(before)


def test_exception_of_the_model_is_an_error_with_its_place(specimen: Specimen, register: Register) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        subject.forward(torch.zeros(1, 0, dtype=torch.long))

    result = Runner(specimen).run(register(check))
    assert result.status == Status.error
    assert result.message.startswith("the model raised ValueError: the sequence is empty (at plain.py:")


@pytest.mark.parametrize(
    ("raises", "says"),
    [
        (SystemExit(3), "the model called sys.exit(3)"),
        (MemoryError(), "ran out of memory"),
        (RecursionError(), "recursed without end"),
    ],
    ids=["exit", "memory", "recursion"],
)
def test_what_a_model_may_do_is_a_finding(
    specimen: Specimen, register: Register, raises: BaseException, says: str
) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        raise raises

    result = Runner(specimen).run(register(check))
    assert result.status == Status.error
    assert says in result.message


def test_hanging_check_is_stopped(specimen: Specimen, register: Register) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as a subject's own loop may do
                continue

    result = Runner(specimen, timeout=0.3).run(register(check))
    assert result.status == Status.error
    assert "did not end within" in result.message
    assert result.seconds < 5


def test_red_prerequisite_blocks(specimen: Specimen, register: Register) -> None:
    def red(subject: Specimen, ctx: Context) -> None:
        ctx.fail("does not hold")

    def never(subject: Specimen, ctx: Context) -> None:
        raise AssertionError("must not run")

    register(red, "own.first")
    register(never, "own.second", requires=("own.first",))
    third = register(never, "own.third", requires=("own.second",))
    result = Runner(specimen).run(third)
    assert (result.status, result.message) == (Status.blocked, "blocked by own.first: does not hold")


def test_missing_capability_is_named(specimen: Specimen, register: Register) -> None:
    result = Runner(specimen).run(register(lambda subject, ctx: None, needs=("gen",)))
    assert result.status == Status.not_applicable
    assert result.message == "needs gen: PlainGPT has no generate()"


def test_warning_warns(specimen: Specimen, register: Register) -> None:
    result = Runner(specimen).run(register(lambda subject, ctx: ctx.fail("trap"), severity="warning"))
    assert result.status == Status.warned


def test_green_records_its_tightest_margin(specimen: Specimen, register: Register) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        ctx.within(1.0, 4.0, "first")
        ctx.within(3.0, 4.0, "second", where="here")

    result = Runner(specimen).run(register(check))
    assert (result.measured, result.allowed, result.margin, result.where) == (3.0, 4.0, 0.75, "here")


@pytest.mark.parametrize("excess", [1.5, 100.0], ids=["narrow", "wide"])
def test_rounding_is_denied_by_float64_and_a_fault_is_not(
    specimen: Specimen, register: Register, excess: float
) -> None:
    def rounding(subject: Specimen, ctx: Context) -> None:
        size = excess if subject.dtype == torch.float32 else 1e-6
        ctx.within(size, 1.0, "differs")

    def fault(subject: Specimen, ctx: Context) -> None:
        ctx.within(excess, 1.0, "differs")

    runner = Runner(specimen)
    denied = runner.run(register(rounding, "own.rounding"))
    assert denied.status == Status.passed
    assert "float64 shows 1e-06: rounding, no fault" in denied.message
    assert runner.run(register(fault, "own.fault")).status == Status.failed


@pytest.mark.parametrize("seed", range(5))
def test_smallest_case_is_found(specimen: Specimen, register: Register, seed: int) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        for case in ctx.cases():
            if case.time >= 5 and case.pad >= 2:
                ctx.fail("differs")

    space = {"time": Span(1, 70), "pad": Span(0, 16)}
    result = Runner(specimen, seed=seed).run(register(check, space=space, grid=({"time": 33, "pad": 9},)))
    assert "smallest case: time=5,pad=2 (first seen at time=33,pad=9)" in result.message
    assert result.repro.endswith(f"--select own.check --seed {seed} --case time=5,pad=2")


def test_thorough_draws_beyond_the_grid(specimen: Specimen, register: Register) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        for case in ctx.cases():
            if case.time > 50:
                ctx.fail("differs")

    check_ = register(check, space={"time": Span(1, 70)}, grid=({"time": 3},))
    assert Runner(specimen).run(check_).status == Status.passed
    thorough = Runner(specimen, profile="thorough").run(check_)
    assert thorough.status == Status.failed
    assert "time=51" in thorough.message


def test_spent_budget_is_told_by_name(specimen: Specimen, register: Register) -> None:
    slow = register(lambda subject, ctx: time.sleep(0.2), "own.slow")
    late = register(lambda subject, ctx: None, "own.late")
    results = list(run_all(Runner(specimen).run, [slow, late], budget=0.1))
    assert [result.status for result in results] == [Status.passed, Status.not_run]
    assert "time budget of 0.1 s" in results[1].message


def test_verdicts_do_not_depend_on_global_random_state(specimen: Specimen, register: Register) -> None:
    seen: list[float] = []
    first = register(lambda subject, ctx: seen.append(float(torch.rand(1))), "own.first")
    torch.manual_seed(1)
    Runner(specimen).run(first)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    Runner(specimen).run(first)
    assert seen[0] == seen[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_unselected_check_that_blocks_is_told(specimen: Specimen, register: Register) -> None:
    register(lambda subject, ctx: ctx.fail("does not hold"), "own.root")
    blocked = register(lambda subject, ctx: None, "own.blocked", requires=("own.root",))
    results = list(run_all(Runner(specimen).run, [blocked]))
    assert [(result.id, result.status) for result in results] == [
        ("own.root", Status.failed),
        ("own.blocked", Status.blocked),
    ]


def test_global_state_that_a_subject_leaves_changed_is_put_back(specimen: Specimen, register: Register) -> None:
    def check(subject: Specimen, ctx: Context) -> None:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)

    Runner(specimen).run(register(check))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_error_of_a_check_of_our_own_is_not_put_on_the_model() -> None:
    from lmconform.runner import MEASURING, _raised

    scope: dict[str, object] = {}
    exec(compile("def measure():\n    raise IndexError('no such row')", f"{MEASURING[0]}loss.py", "exec"), scope)
    with pytest.raises(IndexError) as raised:
        scope["measure"]()  # type: ignore[operator]
    said = _raised(raised.value)
    assert said.startswith("lmconform could not measure it on what the model gave: IndexError: no such row")
    assert "loss.py:2" in said


@pytest.mark.parametrize("measured", ["operation", "standard_library"])
def test_what_a_check_asks_of_torch_or_python_is_its_own_error(
    specimen: Specimen, register: Register, measured: str
) -> None:
    from lmconform.runner import MEASURING

    source = {
        "operation": "import torch.nn.functional as F\ndef measure(x):\n    return F.cross_entropy(x, x[:1])",
        "standard_library": "import json\ndef measure(x):\n    return json.loads('no json')",
    }[measured]
    scope: dict[str, Any] = {}
    exec(compile(source, f"{MEASURING[0]}loss.py", "exec"), scope)
    result = Runner(specimen).run(register(lambda subject, ctx: scope["measure"](torch.zeros(3, 4))))
    assert result.status == "error"
    assert of_the_instrument(result), result.message


@pytest.mark.parametrize("raises", ["forward", "backward"])
def test_what_the_model_raises_is_not_lmconforms_error(specimen: Specimen, register: Register, raises: str) -> None:
    from lmconform.runner import MEASURING

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            if raises == "forward":
                raise IndexError("no such row")
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise IndexError("no such row")

    class Part(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Broken.apply(x)

    scope: dict[str, Any] = {}
    exec(compile("def measure(part, x):\n    part(x).sum().backward()", f"{MEASURING[0]}loss.py", "exec"), scope)
    with torch.enable_grad():
        result = Runner(specimen).run(
            register(lambda subject, ctx: scope["measure"](Part(), torch.zeros(3, requires_grad=True)))
        )
    assert result.status == "error"
    assert not of_the_instrument(result), result.message


def test_time_limit_of_somebody_else_goes_on(specimen: Specimen, register: Register) -> None:
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        Runner(specimen).run(register(lambda subject, ctx: None))
        assert 590 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_reproduction_names_the_file_of_a_builder(register: Register) -> None:
    check = register(lambda subject, ctx: ctx.fail("so it is"))
    assert (
        "lmconform check fixtures/subjects/plain.py:plain --select own.check"
        in Runner(Subject(plain).open()).run(check).repro
    )
    module = Subject(plain(), name="model").open()
    assert Runner(module).run(check).repro.startswith("lmconform.check_model(model, select=['own.check'], seed=0)")


def test_a_kernel_that_has_no_backward_here_is_no_fault(specimen: Specimen, register: Register) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    result = Runner(specimen).run(register(lambda subject, ctx: flex_attention(q, q, q).sum().backward()))
    assert result.status == "not_applicable"
    assert "does not support backward on CPU" in result.message
