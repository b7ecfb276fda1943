"""One subject under one set of options: what pytest, `check_model` and the command's child process share."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lmconform import __version__
from lmconform.cases import Case, parse_case
from lmconform.devices import Device
from lmconform.expected import Expectation, apply, known_deviations, read_expected
from lmconform.loading import import_first
from lmconform.options import OptionError, Options
from lmconform.registry import Check, select_checks
from lmconform.results import Cause, Report, Result
from lmconform.runner import Runner, run_all
from lmconform.subject import Subject, as_subject, resolve_device

if TYPE_CHECKING:
    from lmconform.specimen import Specimen


class Session:
    """The subject is built when the first check runs (or by `open`), once.

    Raises OptionError, UnknownCheck or ExpectedError at once for bad options, BuildError from `open`.
    """

    def __init__(self, subject: Any, options: Options, announce: Callable[[str], None] | None = None) -> None:
        self.options = options
        self.notes: list[str] = []
        self._announce = announce
        for module in options.import_:  # may register checks, too
            import_first(module)
        self.checks: list[Check] = select_checks(options.profile, options.select, options.deselect)
        self.case = chosen_case(options, self.checks)
        self.expectations: list[Expectation] = read_expected(options.expected) if options.expected else []
        if options.known:
            self.expectations += known_deviations()
        self.subject: Subject = as_subject(subject, trust_remote_code=options.trust_remote_code)
        self._runner: Runner | None = None

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def spec(self) -> str:
        """The SPEC, or the name where no SPEC named the subject."""
        return self.subject.spec or self.subject.name

    def announce(self, text: str) -> None:
        """Something the user should hear before it happens (memory) and find in the report; each once."""
        if text in self.notes:
            return
        self.notes.append(text)
        if self._announce is not None:
            self._announce(text)

    def open(self) -> Runner:
        """The runner on the built subject. Raises BuildError."""
        if self._runner is None:
            options = self.options
            home = resolve_device(options.device)
            specimen = self._specimen(self.subject, home, as_loaded=options.as_loaded)
            if options.reference is not None:
                reference = as_subject(options.reference, trust_remote_code=options.trust_remote_code)
                specimen.reference = self._specimen(reference, home, as_loaded=True)
            self._runner = Runner(
                specimen,
                profile=options.profile,
                seed=options.seed,
                case=self.case,
                case_of=self.checks[0].id if self.case is not None else "",
                timeout=options.timeout,
                options=repeated(options),
            )
        return self._runner

    def _specimen(self, subject: Subject, home: Device, *, as_loaded: bool) -> Specimen:
        return subject.open(
            seed=self.options.seed,
            device=home,
            dtype=self.options.dtype,
            as_loaded=as_loaded,
            announce=self.announce,
        )

    @property
    def names(self) -> list[str]:
        """The names under which expected failures know the subject: its own, its SPEC, and transformers:TYPE."""
        names = [self.subject.name, self.subject.spec]
        if self._runner is not None and (model_type := self._runner.subject.model_type):
            names.append(f"transformers:{model_type}")
        return names

    @property
    def dtype(self) -> str:
        if self._runner is None:
            return self.options.dtype or "native"
        return str(self._runner.subject.dtype).removeprefix("torch.")

    def run(self, check: Check) -> Result:
        """The check's result, expected failures applied."""
        return self._judge(self.open().run(check))

    def _judge(self, result: Result) -> Result:
        judged = apply(result, self.expectations, self.names, self.options.device, self.dtype)
        return replace(judged) if judged is result else judged

    def results(self) -> Iterator[Result]:
        """All results in order, within the time budget."""
        self.open()
        yield from run_all(self.run, self.checks, budget=self.options.time_budget)

    def causes(self, results: list[Result]) -> list[Cause]:
        """The likeliest causes of what is red among these results."""
        from lmconform.diagnosis import diagnose

        return diagnose(results, self._runner, spec=self.spec)

    def report(self, results: list[Result]) -> Report:
        """The Report of these results."""
        return Report(
            subject=self.name,
            profile=self.options.profile,
            device=self.options.device,
            dtype=self.dtype,
            seed=self.options.seed,
            versions=versions(),
            results=results,
            causes=self.causes(results),
            notes=list(dict.fromkeys(self.notes)),
            strict=self.options.strict,
        )


def chosen_case(options: Options, checks: Sequence[Check]) -> Case | None:
    """The case that `--case` names. Raises OptionError where it fits no one check."""
    if options.case is None:
        return None
    if len(checks) != 1:
        raise OptionError(f"--case goes with one selected check, and {len(checks)} are selected")
    try:
        return parse_case(options.case, checks[0].space or {})
    except ValueError as error:
        raise OptionError(f"--case {options.case} for {checks[0].id}: {error}") from error


def versions() -> dict[str, str]:
    """What the verdict depends on."""
    return dict(_installed())


@functools.cache
def _installed() -> dict[str, str]:
    found = {"python": platform.python_version(), "lmconform": __version__}
    for name in ("torch", "transformers", "numpy", "hypothesis"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def repeated(options: Options) -> str:
    """The options a reproduction needs beside the check, the seed and the case."""
    parts: list[str] = []
    if options.as_loaded:
        parts.append("--as-loaded")
    if options.device != "cpu":
        parts.append(f"--device {options.device}")
    if options.dtype:
        parts.append(f"--dtype {options.dtype}")
    if isinstance(options.reference, str):
        parts.append(f"--reference {options.reference}")
    parts += [f"--import {module}" for module in options.import_]
    if options.trust_remote_code:
        parts.append("--trust-remote-code")
    return " ".join(parts)
