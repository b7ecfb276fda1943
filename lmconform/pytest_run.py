"""What `pytest --lm SPEC` runs, and `@lmconform.parametrize_with_checks([...])`."""

from __future__ import annotations

import atexit
import functools
import gc
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lmconform import __version__
from lmconform.collector import import_frameworks
from lmconform.expected import ExpectedError
from lmconform.options import NAMES, OptionError, Options, make_options, read_ini, require_writable
from lmconform.registry import Check, UnknownCheck
from lmconform.results import EXECUTED, FINDINGS, Cause, Report, Result, Status, as_json, tally, write_whole

if TYPE_CHECKING:
    from lmconform.isolation import Child
    from lmconform.session import Session

BAD_USAGE = (OptionError, UnknownCheck, ExpectedError)


class ConformanceWarning(UserWarning):
    """A check warned: a trap that the library documents, or a convention that others do not share."""


# -- a run with --lm -------------------------------------------------------------------------------------------------


def begin(config: pytest.Config) -> None:
    """Register the hooks of this run. Raises UsageError."""
    try:
        run = Conformance(config, _options(config))
    except BAD_USAGE as error:
        raise pytest.UsageError(f"lmconform: {error}") from error
    config.pluginmanager.register(run, "lmconform-run")


def _options(config: pytest.Config) -> Options:
    """`[tool.lmconform]` under the command line."""
    values = read_ini(config.rootpath)
    for name in NAMES:
        given = config.getoption(f"lm_{name}")
        if given is not None:
            values[name] = given
    return make_options(values)


def _snapshot_files(folder: str | None, specs: Sequence[str]) -> dict[str, Path]:
    """SPEC to snapshot; empty without --lm-snapshot. Raises OptionError."""
    if folder is None:
        return {}
    from lmconform.snapshots.pytest_items import files_of

    return files_of(folder, specs)


class Conformance:
    """The hooks of a run that was given `--lm`."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        require_writable(options.json, options.html)
        if options.html:
            from lmconform.report.html import require_libraries

            require_libraries()
        self.config = config
        self.options = options
        self.specs: list[str] = list(dict.fromkeys(config.getoption("lm")))
        self.handles: list[SubjectHandle] = []
        self.snapshots = _snapshot_files(config.getoption("lm_snapshot"), self.specs)
        self.results: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(optionalhook=True, trylast=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> object:
        """One worker a subject, where neither the command line nor the project says how to distribute."""
        from lmconform.workers import SubjectScheduling, none_chosen

        if not none_chosen(config):
            return None
        config.option.loadscopereorder = False  # the order is that of the workers' collection
        return SubjectScheduling(config, log)

    def pytest_report_header(self) -> str:
        options = self.options
        return (
            f"lmconform {__version__}: {', '.join(self.specs)} "
            f"(profile {options.profile}, {options.device}, seed {options.seed})"
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        source = pytest.Config.ArgsSource
        if self.config.args_source in (source.INVOCATION_DIR, source.TESTPATHS):
            self.config.args = []  # no file was named: only the subjects are wanted
        self.handles = list(self._handles())
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        made = list(session.genitems(Subjects.from_parent(session, name="lm", nodeid="lm", run=self)))
        if hasattr(self.config, "workerinput") and self.options.time_budget is None:
            made.sort(key=self._order_for_workers)
        items.extend(made)

    def _order_for_workers(self, item: pytest.Item) -> tuple[int, int]:
        """Subject by subject, in each what takes longest first: the checks that share a training run.

        `--dist worksteal` steals the end of the list, too: half of a subject's training would train it twice.
        """
        from lmconform.workers import SHARE_A_RUN

        if not isinstance(item, ConformanceItem):
            return len(self.handles), 0
        return self.handles.index(item.handle), item.check.family not in SHARE_A_RUN

    def pytest_unconfigure(self) -> None:
        atexit.register(gc.freeze)  # or the interpreter's last collections walk all that torch leaves: a second

    def _handles(self) -> Iterator[SubjectHandle]:
        """The subjects, names made distinct. Raises UsageError before anything is collected."""
        from lmconform.devices import DeviceError, require
        from lmconform.subject import BuildError

        try:
            require(self.options.device)
        except DeviceError as error:
            raise pytest.UsageError(f"lmconform: {error}") from error
        taken: set[str] = set()
        for spec in self.specs:
            try:
                handle = SubjectHandle(spec, self.options)
            except (*BAD_USAGE, BuildError) as error:
                raise pytest.UsageError(f"lmconform: {error}") from error
            if handle.name in taken:
                handle.name = spec
            taken.add(handle.name)
            yield handle

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if isinstance(item, ConformanceItem) and call.when == "call" and item.entry is not None:
            report.lmconform = item.entry  # type: ignore[attr-defined]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = getattr(report, "lmconform", None)
        if entry is not None:
            run = self.results.setdefault(entry["spec"], {"meta": entry["meta"], "results": []})
            run["results"].append(entry["result"])

    @functools.cached_property
    def reports(self) -> list[Report]:
        """One Report a subject, from what all workers sent; made when the run is over."""
        made = []
        for spec, run in self.results.items():
            results = [Result.from_dict(result) for result in run["results"]]
            made.append(Report(**run["meta"], results=results, causes=self._causes(spec, results)))
        return made

    def _causes(self, spec: str, results: list[Result]) -> list[Cause]:
        """With probes where the subject was built in this process, from the verdicts alone where workers ran them."""
        handle = next((handle for handle in self.handles if handle.spec == spec), None)
        if handle is not None:
            return handle.causes(results)
        from lmconform.diagnosis import diagnose

        return diagnose(results, spec=spec)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        reports = self.reports
        if not reports:
            return
        terminalreporter.section("lmconform")
        for report in reports:
            verdict = "conforms" if report.ok else "does not conform"
            if not any(result.status in EXECUTED for result in report.results):
                verdict = "nothing was checked"
            terminalreporter.write_line(f"{report.subject} {verdict}: {tally(report.counts)}")
            for cause in report.causes[:3]:
                terminalreporter.write_line(f"  {cause.id} ({cause.score:.0%}): {cause.summary}")
                for label, text in (("where", cause.where), ("confirm", cause.confirm), ("mend", cause.mend)):
                    if text and cause is report.causes[0]:
                        terminalreporter.write_line(f"    {label}: {text}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return
        reports = self.reports
        nothing = [r.subject for r in reports if not any(result.status in EXECUTED for result in r.results)]
        if nothing and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.options.json and reports:
            data = [report.to_dict() for report in reports]
            write_whole(self.options.json, as_json(data[0] if len(data) == 1 else data))
        if self.options.html and reports:
            from lmconform.report.html import render

            write_whole(self.options.html, render(reports))


class Subjects(pytest.Collector):
    """All subjects of the run; their checks are its items, `subject-check`."""

    def __init__(self, *, run: Conformance, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run

    def collect(self) -> Iterator[pytest.Item]:
        for handle in self.run.handles:
            for check in handle.checks:
                item = ConformanceItem.from_parent(self, name=f"{handle.name}-{check.id}", handle=handle, check=check)
                item.add_marker(getattr(pytest.mark, check.profile))
                if self.config.pluginmanager.hasplugin("xdist"):  # --dist loadgroup: one worker builds the subject
                    item.add_marker(pytest.mark.xdist_group(handle.name))
                yield item
        if self.run.snapshots:
            from lmconform.snapshots.pytest_items import snapshot_items

            subjects = [(handle.name, handle.spec, handle.subject) for handle in self.run.handles]
            yield from snapshot_items(self, subjects, self.run.snapshots, self.run.options)


class ConformanceItem(pytest.Item):
    """One check on one subject."""

    def __init__(self, *, handle: SubjectHandle, check: Check, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.handle = handle
        self.check = check
        self.entry: dict[str, Any] | None = None

    def runtest(self) -> None:
        if not self.handle.options.isolate:
            import_frameworks(self.handle.spec)
        result = self.handle.run(self.check)
        self.entry = {"spec": self.handle.spec, "meta": self.handle.meta(), "result": result.to_dict()}
        for key in ("id", "status", "severity", "measured", "allowed", "margin", "where", "repro"):
            value = getattr(result, key)
            if value not in (None, ""):
                self.user_properties.append((f"lmconform_{key}", str(value)))
        if result.status == Status.blocked and not self._tells(result.where):
            pytest.fail(f"{result.id}: {result.message}", pytrace=False)
        settle(result, strict=self.handle.options.strict)

    def _tells(self, id: str) -> bool:
        """Whether that check of the same subject is an item of this run, so that its finding shows."""
        return not id or any(
            isinstance(item, ConformanceItem) and item.handle is self.handle and item.check.id == id
            for item in self.session.items
        )

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any, **kwargs: Any) -> Any:
        if isinstance(excinfo.value, pytest.fail.Exception):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args, **kwargs)

    def reportinfo(self) -> tuple[str, int | None, str]:
        # not the item's own name: pytest would write the dot of an id as "::"
        return str(self.config.rootpath / "lm"), None, f"{self.handle.name} {self.check.id}"


# -- both ways in ----------------------------------------------------------------------------------------------------


class SubjectHandle:
    """A subject that is built when its first check runs, once in a process; what went wrong then is told once."""

    def __init__(self, subject: Any, options: Options) -> None:
        self.options = options
        self.backend, self.checks = _backend(subject, options)
        self.spec = self.backend.spec
        self.name = _short(self.spec) if options.isolate else self.backend.name
        self._broken: str | None = None
        self._started: float | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def subject(self) -> Any:
        """The Subject, or its SPEC where a child process holds it."""
        return getattr(self.backend, "subject", self.spec)

    def run(self, check: Check) -> Result:
        """The result of one check. A subject that cannot be built fails once and blocks the rest."""
        from lmconform.subject import BuildError

        if self._started is None:
            self._started = time.monotonic()
        spent = time.monotonic() - self._started
        budget = self.options.time_budget
        if budget is not None and spent > budget:
            text = f"the time budget of {budget:g} s was spent after {spent:.1f} s"
            return Result(check.id, check.family, check.severity, Status.not_run, message=text)
        if self._broken is not None:
            return Result(check.id, check.family, check.severity, Status.blocked, message=self._broken)
        try:
            self.backend.open()
            return self.backend.run(check)
        except BuildError as error:
            self._broken = f"blocked: {self.name} could not be built"
            text = f"the subject could not be built: {error}"
            return Result(check.id, check.family, check.severity, Status.error, message=text)

    def causes(self, results: list[Result]) -> list[Cause]:
        """The likeliest causes of what is red among these results."""
        return self.backend.causes(results)

    def meta(self) -> dict[str, Any]:
        """What a Report says beside its results."""
        report = self.backend.report([]).to_dict()
        keys = ("profile", "device", "dtype", "seed", "versions", "notes", "strict", "died")
        return {"subject": self.name, **{key: report[key] for key in keys if key in report}}


def _backend(subject: Any, options: Options) -> tuple[Session | Child, list[Check]]:
    """The subject in this process, or in a child of its own; and its checks, known before anything is built."""
    if not options.isolate:
        from lmconform.session import Session

        session = Session(subject, options, announce=_announce)
        return session, session.checks
    from lmconform.isolation import Child
    from lmconform.loading import import_first
    from lmconform.registry import select_checks

    child = Child(subject, options, announce=_announce)
    atexit.register(child.close)
    for module in options.import_:  # may register checks
        import_first(module)
    return child, select_checks(options.profile, options.select, options.deselect)


def _announce(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _short(spec: str) -> str:
    """A SPEC's name in an item's id: nothing of the subject is imported to find it."""
    if Path(spec).is_dir():
        return Path(spec).resolve().name
    return spec.rpartition(":")[2]


def settle(result: Result, *, strict: bool) -> None:
    """Turn a Result into pytest's own outcomes."""
    text = f"{result.id}: {result.message}"
    if result.repro:
        text += f"\nreproduce: {result.repro}"
    if result.status in FINDINGS or (strict and result.status == Status.warned):
        pytest.fail(text, pytrace=False)
    if result.status == Status.warned:
        warnings.warn(ConformanceWarning(text), stacklevel=2)
    if result.status in (Status.not_applicable, Status.blocked):
        pytest.skip(result.message)
    if result.status == Status.xfailed:
        pytest.xfail(result.message.splitlines()[0])


class BoundCheck:
    """What `@parametrize_with_checks` passes as `check`: call it with `subject`."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def __repr__(self) -> str:
        return self.check.id

    def __call__(self, subject: SubjectHandle) -> None:
        """Run the check; fails, skips, warns or xfails as its Result says."""
        settle(subject.run(self.check), strict=subject.options.strict)


def parametrize_with_checks(subjects: Iterable[Any], **options: Any) -> pytest.MarkDecorator:
    """Parametrise a test over every check of every subject.

    `subjects` are SPECs, modules, builders or Subjects; `options` are those of `check_model`. Nothing is built before
    the first check of a subject runs.

        @lmconform.parametrize_with_checks([build_model])
        def test_conformance(subject, check):
            check(subject)
    """
    chosen = make_options(options)
    if isinstance(subjects, str) or not isinstance(subjects, Iterable):
        raise TypeError("parametrize_with_checks wants a list of subjects, as in parametrize_with_checks([build])")
    return pytest.mark.parametrize(("subject", "check"), list(_parameters(list(subjects), chosen)))


def _parameters(subjects: Sequence[Any], options: Options) -> Iterator[Any]:
    for subject in subjects:
        handle = SubjectHandle(subject, options)
        for check in handle.checks:
            mark = getattr(pytest.mark, check.profile)
            yield pytest.param(handle, BoundCheck(check), id=f"{handle.name}-{check.id}", marks=mark)
