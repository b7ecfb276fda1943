"""What `--lm-snapshot DIR` adds to a run: one item a subject, and one for snapshots that no subject uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lmconform.options import OptionError, Options
from lmconform.snapshots import SnapshotError
from lmconform.snapshots.names import SUFFIX, file_name

if TYPE_CHECKING:
    from lmconform.subject import Subject

STARTUP = 300.0  # seconds to import torch in a process of its own


def files_of(folder: str, specs: Sequence[str]) -> dict[str, Path]:
    """SPEC to its file in DIR. Raises OptionError where DIR is none, or two subjects would share a file."""
    place = Path(folder)
    if not place.is_dir():
        raise OptionError(f"--lm-snapshot {folder}: no such folder")
    files = {spec: place / file_name(spec) for spec in specs}
    for spec, file in files.items():
        other = next((s for s, f in files.items() if f == file and s != spec), None)
        if other is not None:
            raise OptionError(f"--lm-snapshot: {spec} and {other} would share {file}")
    return files


def snapshot_items(
    parent: pytest.Collector, subjects: Sequence[tuple[str, str, Any]], files: dict[str, Path], options: Options
) -> Iterator[pytest.Item]:
    """Items named `subject-snapshot`, and `snapshots-used`. `subjects` are names, SPECs and Subjects or SPECs."""
    for name, spec, subject in subjects:
        yield SnapshotItem.from_parent(
            parent, name=f"{name}-snapshot", spec=spec, subject=subject, file=files[spec], options=options
        )
    folder = next(iter(files.values())).parent
    yield UnusedItem.from_parent(parent, name="snapshots-used", folder=folder, files=set(files.values()))


class _Item(pytest.Item):
    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any, **kwargs: Any) -> Any:
        if isinstance(excinfo.value, pytest.fail.Exception):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args, **kwargs)

    def reportinfo(self) -> tuple[str, int | None, str]:
        return str(self.config.rootpath / "lm"), None, self.name


class SnapshotItem(_Item):
    """One subject against its file."""

    def __init__(self, *, spec: str, subject: Subject | str, file: Path, options: Options, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self.subject = subject
        self.file = file
        self.options = options
        self.add_marker(pytest.mark.default)

    def runtest(self) -> None:
        if not self.file.exists():
            pytest.fail(f"no snapshot yet: lmconform snapshot {self.spec} -o {self.file}", pytrace=False)
        text = self._isolated() if self.options.isolate else self._here()
        if text:
            pytest.fail(text, pytrace=False)

    def _here(self) -> str:
        """What differs, empty where nothing does."""
        from lmconform.snapshots import command, store
        from lmconform.subject import BuildError, as_subject

        try:
            snapshot = store.read(self.file)
            subject = as_subject(self.subject, trust_remote_code=self.options.trust_remote_code)
            comparison = command.seen(snapshot, subject)
        except (SnapshotError, BuildError) as error:
            return str(error)
        if comparison.ok:
            return ""
        return (
            command.told(comparison, f"{self.spec} against {self.file}:")
            + "\n"
            + command.renewal(snapshot, self.spec, self.file)
        )

    def _isolated(self) -> str:
        from lmconform.isolation import how_it_ended

        more = [word for module in self.options.import_ for word in ("--import", module)]
        more += ["--trust-remote-code"] if self.options.trust_remote_code else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        seconds = STARTUP + self.options.timeout
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lmconform", "compare", str(self.file), self.spec, *more],
                env=environment, capture_output=True, text=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"comparing did not end within {seconds:g} s; --lm-timeout gives it longer"
        if done.returncode == 0:
            return ""
        if done.returncode < 0:
            return f"the process {how_it_ended(done.returncode)} while comparing {self.spec} with {self.file}"
        return (done.stdout if done.returncode == 1 else done.stderr).strip()


class UnusedItem(_Item):
    """Fails for a file that belongs to no subject of the run."""

    def __init__(self, *, folder: Path, files: set[Path], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = folder
        self.files = files
        self.add_marker(pytest.mark.default)

    def runtest(self) -> None:
        unused = sorted(file.name for file in self.folder.glob(f"*{SUFFIX}") if file not in self.files)
        if unused:
            pytest.fail(
                f"{self.folder} holds snapshots that no --lm SPEC of this run uses: {', '.join(unused)}; "
                "delete them, or name their subjects too",
                pytrace=False,
            )
