"""What lmconform adds to another project's pytest: python tests/benchmarks/plugin_start_up.py [ROUNDS] [--editable]

Three environments of this Python hold pytest and hypothesis, which lmconform depends on; one of them lmconform as well,
from a wheel or, with --editable, from this folder. Two at a time start pytest on one empty test in turns, two runs of
each a round; processor time of the child processes. The two without lmconform say what the measurement itself tells
apart. pip needs a package index.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lmconform.bench import compare
from lmconform.bench.clocks import Ticking

ROOT = Path(__file__).parents[2]
CHILDREN = Ticking(
    "processor time of children",
    lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),  # user and system
)
NOT_THEIRS = ("PYTEST_", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


def environment(folder: Path, *more: str) -> Path:
    """The python of a new environment with pytest, hypothesis and `more`, words for pip."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *(f"{name}=={version(name)}" for name in ("pytest", "hypothesis"))], check=True)
    if more:
        subprocess.run([*install, "--no-deps", *more], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=20)
    parser.add_argument("--editable", action="store_true", help="install lmconform as this folder, not as a wheel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_it = environment(folder / "with", *(["-e"] if args.editable else []), str(ROOT))
        without, another = (environment(folder / name) for name in ("without", "another"))
        project = folder / "project"
        project.mkdir()
        (project / "test_one.py").write_text("def test_one(): pass\n")
        settings = {name: value for name, value in os.environ.items() if not name.startswith(NOT_THEIRS)}

        def pytest(python: Path) -> None:
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            subprocess.run(command, cwd=project, env=settings, stdout=subprocess.DEVNULL, check=True)

        for what, one in (("lmconform", with_it), ("a second environment without", another)):
            found = compare(lambda: pytest(one), lambda: pytest(without), rounds=args.rounds, clock=CHILDREN)  # noqa: B023
            print(
                f"{what}: {2 * args.rounds} paired runs, {1000 * found.median:.1f} against "
                f"{1000 * found.peer_median:.1f} ms; ratio {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
            )


if __name__ == "__main__":
    main()
