"""Runs checks on one subject: order, prerequisites, time, float64 confirmation, shrinking. Front ends iterate this."""

from __future__ import annotations

import shlex
import signal
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lmconform import tolerance
from lmconform.cases import Case
from lmconform.context import Context, Violation, margin
from lmconform.conventions import first_line
from lmconform.global_state import global_state_kept
from lmconform.minimise import search, smallest
from lmconform.registry import Check, get_check
from lmconform.results import UNMEASURED, Result, Status
from lmconform.specimen import Unavailable

if TYPE_CHECKING:
    from lmconform.specimen import Specimen

CHECK_TIMEOUT = 120.0  # seconds after which a single check counts as hanging
SHRINK_SECONDS = 4.0
NO_BACKWARD = "FlexAttention does not support backward on CPU"  # what torch lacks is no fault of the model
PACKAGE = str(Path(__file__).parent) + "/"
MEASURING = (f"{PACKAGE}checks/", f"{PACKAGE}measuring/")
LIBRARY = sysconfig.get_paths()["stdlib"] + "/"


P = TypeVar("P")


class Hang(BaseException):
    """A check outlived its time. Not an Exception, so that a subject's own `except Exception` cannot swallow it."""


@dataclass
class Runner:
    """All checks of one run on one built subject; a check runs once, however often it is asked for."""

    subject: Specimen
    profile: str = "default"
    seed: int = 0
    case: Case | None = None
    case_of: str = ""  # the check whose case that is: its prerequisites run their whole grids
    shrink: bool = True
    timeout: float = CHECK_TIMEOUT
    options: str = ""
    started: Callable[[str], None] = lambda id: None  # told each check, prerequisites too, whenever its clock starts
    _results: dict[str, Result] = field(default_factory=dict)

    def run(self, check: Check) -> Result:
        """The check's result; prerequisites are run first, unreported, where they have not run yet."""
        if check.id not in self._results:
            started = time.perf_counter()
            with self.subject.placed():
                result = self._decide(check)
            result.seconds = time.perf_counter() - started
            self._results[check.id] = result
        return self._results[check.id]

    def guarded(self, probe: Callable[[], P]) -> P:
        """Run a probe of the diagnosis as a check is run: within time, leaving no trace.

        Raises Unavailable where the subject does not go along.
        """
        try:
            with self.subject.placed(), _time_limit(self.timeout), _quiet(self.seed):
                return probe()
        except Unavailable:
            raise
        except (Exception, Hang) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error

    def remember(self, result: Result) -> None:
        """Take over what is known already: the process was started anew after a crash."""
        self._results[result.id] = result

    def _decide(self, check: Check) -> Result:
        for id in check.requires:
            if id == check.id:
                continue
            prerequisite = self.run(get_check(id))
            if prerequisite.status in (Status.failed, Status.error, Status.blocked):
                if prerequisite.status == Status.blocked:
                    return self._result(check, Status.blocked, prerequisite.message, where=prerequisite.where)
                why = prerequisite.message.partition("\n")[0]
                return self._result(check, Status.blocked, f"blocked by {id}: {why}", where=id)
        self.started(check.id)
        return self._execute(check)

    def _execute(self, check: Check) -> Result:
        context = self._context(check, self.subject)
        try:
            with _time_limit(self.timeout), _quiet(self.seed):
                for need in check.needs:
                    capability = self.subject.can(need)
                    if not capability:
                        raise Unavailable(f"needs {need}: {capability.reason}")
                violation = _attempt(check, self.subject, context)
                if violation is None and self.profile == "thorough" and check.space and self._case(check) is None:
                    violation = search(check, self.subject, seed=self.seed, seconds=self.timeout / 4, examples=100)
        except Unavailable as reason:
            return self._result(check, Status.not_applicable, str(reason))
        except Hang as hang:
            self.subject.forget_twin()
            text = f"did not end within {self.timeout:g} s and was stopped{_origin(hang)}; --timeout gives it longer"
            return self._result(check, Status.error, text, context.case)
        except RecursionError:
            return self._result(check, Status.error, "the model recursed without end", context.case)
        except MemoryError:
            return self._result(check, Status.error, "ran out of memory", context.case)
        except SystemExit as error:
            text = f"the model called sys.exit({error.code!r}){_origin(error)}"
            return self._result(check, Status.error, text, context.case)
        except Exception as error:
            if NO_BACKWARD in str(error):
                return self._result(check, Status.not_applicable, f"{first_line(error)}{_origin(error)}")
            return self._result(check, Status.error, _raised(error), context.case)
        if violation is None:
            return self._green(check, context)
        self.started(check.id)
        try:
            with _time_limit(self.timeout), _quiet(self.seed):
                return self._red(check, context, violation)
        except Hang:
            self.subject.forget_twin()
            return self._violated(check, violation, None, context.notes)

    def _green(self, check: Check, context: Context, note: str = "") -> Result:
        message = "; ".join([*context.notes, *filter(None, [note])])
        result = self._result(check, Status.passed, message)
        if context.tightest is not None:
            result.measured, result.allowed, result.where = context.tightest
            result.margin = margin(result.measured, result.allowed)
        result.charts = context.charts((result.measured, result.allowed))
        return result

    def _red(self, check: Check, context: Context, violation: Violation) -> Result:
        denied = self._denied_by_float64(check, violation)
        if denied:
            return self._green(check, context, denied)
        small = None
        if self.shrink and violation.case is not None and self._case(check) is None:
            small = smallest(check, self.subject, violation.case, seed=self.seed, seconds=SHRINK_SECONDS)
            if small is not None and self._denied_by_float64(check, small):
                small = None  # shrunk into rounding: the first case stands
        result = self._violated(check, violation, small, context.notes)
        result.charts = context.charts((violation.measured, violation.allowed))  # of the first case: it shows more
        return result

    def _denied_by_float64(self, check: Check, violation: Violation) -> str:
        """Why a narrow red is rounding and no fault: the float64 copy shows nothing. Empty where it stands."""
        ratio = violation.margin
        if ratio is None or not ratio < tolerance.CONFIRM_BELOW:
            return ""
        twin = self.subject.twin()
        if twin is None:
            return ""
        context = Context(
            check, twin, seed=self.seed, profile=self.profile,
            cases=[violation.case] if violation.case is not None else (),
        )  # fmt: skip
        try:
            confirmed = _attempt(check, twin, context)
        except Exception:  # float64 cannot tell: the native dtype's evidence stands
            return ""
        if confirmed is not None or context.tightest is None:
            return ""
        return (
            f"{violation.measured:.3g} in {_name(self.subject.dtype)} is over the bound {violation.allowed:.3g}, "
            f"but float64 shows {context.tightest[0]:.3g}: rounding, no fault"
        )

    def _violated(self, check: Check, first: Violation, small: Violation | None, notes: Sequence[str]) -> Result:
        shown = small or first
        lines = [shown.message + _figures(shown)]
        if shown.where:
            lines.append(f"where: {shown.where}")
        if shown.case is not None:
            origin = f" (first seen at {first.case})" if small is not None and first.case != small.case else ""
            lines.append(f"smallest case: {shown.case}{origin}" if small is not None else f"case: {shown.case}")
        hint = first.hint or shown.hint  # the larger case tells causes apart that the smallest cannot
        suspects = getattr(hint, "suspects", ())
        if hint:
            lines.append(f"likely cause: {hint}")
        lines.extend(notes)
        status = Status.warned if check.severity == "warning" else Status.failed
        result = self._result(check, status, "\n".join(lines), shown.case)
        result.measured, result.allowed, result.where = shown.measured, shown.allowed, shown.where
        result.margin, result.suspects = shown.margin, suspects
        return result

    def _result(self, check: Check, status: Status, message: str, case: Case | None = None, where: str = "") -> Result:
        result = Result(check.id, check.family, check.severity, status, message=message, where=where)
        if status in (Status.failed, Status.warned, Status.error):
            result.repro = self.repro(check, case)
        return result

    def repro(self, check: Check, case: Case | None) -> str:
        """The command that shows this finding again."""
        at = str(case) if case else ""
        if not self.subject.source:
            return reproduction_in_python(self.subject.name, check.id, self.seed, at)
        return reproduction(self.subject.source, check.id, self.seed, at, self.options)

    def _context(self, check: Check, subject: Specimen) -> Context:
        case = self._case(check)
        cases = (case,) if case is not None else ()
        return Context(check, subject, seed=self.seed, profile=self.profile, cases=cases)

    def _case(self, check: Check) -> Case | None:
        return self.case if check.id == self.case_of else None


def _attempt(check: Check, subject: Specimen, context: Context) -> Violation | None:
    try:
        check.function(subject, context)
    except Violation as violation:
        violation.case = context.case
        return violation
    return None


def reproduction(spec: str, id: str, seed: int, case: str = "", options: str = "") -> str:
    """The command that runs one check on a subject again."""
    parts = ["lmconform check", shlex.quote(spec), "--select", id, "--seed", str(seed)]
    if case:
        parts += ["--case", shlex.quote(case)]
    return " ".join(filter(None, [*parts, options]))


def reproduction_in_python(name: str, id: str, seed: int, case: str = "") -> str:
    """The same for a subject that no SPEC names: an object of the caller's."""
    more = f", case={case!r}" if case else ""
    return f"lmconform.check_model({name}, select=[{id!r}], seed={seed}{more})  # {name}: the object that was checked"


class Named(Protocol):
    """A check, or what is known of it in a process that has not imported it."""

    @property
    def id(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def severity(self) -> str: ...


N = TypeVar("N", bound=Named)


def run_all(run: Callable[[Any], Result], checks: Sequence[N], *, budget: float | None = None) -> Iterator[Result]:
    """Results in order; checks that no longer fit into `budget` seconds are `not_run`, by name.

    The check that blocks another is a finding: it is among the results even where it was not selected.
    """
    started = time.monotonic()
    told = {check.id for check in checks}
    for check in checks:
        spent = time.monotonic() - started
        if budget is not None and spent >= budget:
            result = Result(
                check.id, check.family, check.severity, Status.not_run,
                message=f"the time budget of {budget:g} s was spent after {spent:.1f} s",
            )  # fmt: skip
        else:
            result = run(check)
        if result.status == Status.blocked and result.where not in told:
            told.add(result.where)
            yield run(get_check(result.where))
        yield result


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang after that time; without effect outside the main thread or where there are no alarms."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise Hang

    started = time.monotonic()
    outer, interval = signal.getitimer(signal.ITIMER_REAL)
    if 0 < outer <= seconds:  # somebody else's limit (pytest-timeout's) comes first: it stands
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left = max(outer - (time.monotonic() - started), 1e-3) if outer > 0 else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Leave no trace, whatever the subject does: random state, gradient mode and default dtype are as before.

    The warnings that a subject raises by the dozen go.
    """
    import torch

    with warnings.catch_warnings(), global_state_kept():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def _figures(violation: Violation) -> str:
    if violation.measured is None:
        return ""
    text = f": measured {violation.measured:.4g}"
    if violation.allowed is None:
        return text
    ratio = violation.margin
    times = f" ({ratio:.3g} times the bound)" if ratio is not None and ratio != float("inf") else ""
    return f"{text}, allowed {violation.allowed:.4g}{times}"


def _origin(error: BaseException) -> str:
    """' (at model.py:12, in forward)': the frame of the subject that raised."""
    trace = error.__traceback__
    last = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(PACKAGE) and "/torch/" not in name:
            last = trace
        trace = trace.tb_next
    if last is None:
        return ""
    code = last.tb_frame.f_code
    return f" (at {code.co_filename.rsplit('/', 1)[-1]}:{last.tb_lineno}, in {code.co_name})"


def _raised(error: Exception) -> str:
    """What raised, in words: the model, or a check that could not read what the model gave."""
    text = f"{type(error).__name__}: {first_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = max((place for place, frame in enumerate(frames) if frame.filename.startswith(PACKAGE)), default=-1)
    if frames[ours].filename.startswith(MEASURING) and not any(map(_of_the_model, frames[ours + 1 :])):
        place = f"{Path(frames[ours].filename).name}:{frames[ours].lineno}"
        return f"{UNMEASURED}{text} (at lmconform's {place})"
    return f"the model raised {text}{_origin(error)}"


def _of_the_model(frame: traceback.FrameSummary) -> bool:
    """Whether a frame below lmconform's last is the subject's code, or torch that runs it: a module, or autograd.

    What torch or Python's library raise when a check calls an operation of its own is the check's doing.
    """
    if "/torch/" in frame.filename:
        return frame.name in ("_call_impl", "backward") or "/torch/autograd/" in frame.filename
    return not frame.filename.startswith(LIBRARY) or "/site-packages/" in frame.filename


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
