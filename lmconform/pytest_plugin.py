"""The pytest front end: options, markers, the fixture `paired`; what `--lm` runs stands in `lmconform.pytest_run`.

Every pytest of an environment loads this, so it imports next to nothing, torch and transformers least of all. Without
`--lm` it adds nothing to a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from lmconform.options import NAMES

if TYPE_CHECKING:
    from lmconform.bench import Comparison

MARKERS = {
    "smoke": "a check of lmconform's smoke profile: the quickest",
    "default": "a check of lmconform's default profile that smoke leaves out",
    "thorough": "a check that only lmconform's thorough profile runs",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmconform", "conformance of causal language models")
    group.addoption(
        "--lm", metavar="SPEC", action="append", default=[], dest="lm",
        help="check this model: a directory, file.py:attr, transformers:TYPE, pkg.mod:attr or a hub id; repeatable",
    )  # fmt: skip
    group.addoption(
        "--lm-snapshot", metavar="DIR", dest="lm_snapshot",
        help="compare every subject with its snapshot in DIR; missing and unused ones fail",
    )  # fmt: skip
    for name, option in NAMES.items():
        flag = "--lm-" + name.replace("_", "-")
        if name == "known":
            group.addoption(
                "--lm-no-known", dest="lm_known", action="store_const", const=False, default=None,
                help="leave out the known deviations of transformers",
            )  # fmt: skip
        elif option.type == "bool":
            group.addoption(
                flag, dest=f"lm_{name}", action="store_const", const=True, default=None, help=option.metadata["help"]
            )
        else:
            several = str(option.type).startswith("tuple")
            group.addoption(
                flag, dest=f"lm_{name}", default=None, action="append" if several else "store",
                metavar=option.metadata["metavar"] or name.upper(), choices=option.metadata.get("choices"),
                type=_kind(str(option.type)), help=option.metadata["help"],
            )  # fmt: skip


def _kind(annotation: str) -> type:
    return {"int": int, "float": float}.get(annotation.split(" ")[0], str)


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("lm"):
        from lmconform.pytest_run import begin

        begin(config)
    elif config.getoption("lm_snapshot"):
        raise pytest.UsageError("lmconform: --lm-snapshot goes with --lm SPEC")


@pytest.fixture
def paired(request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    """`lmconform.bench.compare`, refused beside other workers: `assert paired(mine, peer).low < 1.1`.

    Both run in turns in this process; what comes back is the ratio of their times with its interval, kept among the
    test's properties (JUnit: lmconform_ratio).
    """
    workers = getattr(request.config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        pytest.fail(
            f"paired timings mean nothing beside {workers - 1} other xdist worker{'s' if workers > 2 else ''}; "
            "run these tests with -n 0",
            pytrace=False,
        )

    def timed(*args: Any, **kwargs: Any) -> Comparison:
        from lmconform.bench import compare

        found = compare(*args, **kwargs)
        request.node.user_properties.append(("lmconform_ratio", str(found)))
        return found

    return timed
