"""The pytest front end: options, markers, the fixture `paired`; what `--lm` runs stands in `lmconform.pytest_run`.

Every pytest of an environment loads this, so it imports next to nothing, torch and transformers least of all. Without
`--lm` it adds nothing to a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from lmconform.flags import FLAGS

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
    for name, words in FLAGS.items():
        flag, given = "--lm-" + name.replace("_", "-"), {"dest": f"lm_{name}", "default": None, **words}
        if name == "known":
            flag, given["help"] = "--lm-no-known", "leave out the known deviations of transformers"
        if words.get("action") == "store_true":
            given.update(action="store_const", const=name != "known")  # None is: not said, so [tool.lmconform] decides
        group.addoption(flag, **given)


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
