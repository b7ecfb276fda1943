"""check_model: the suite from Python."""

from __future__ import annotations

from typing import Any

from lmconform.options import make_options, require_writable
from lmconform.report.html import require_libraries
from lmconform.results import Report
from lmconform.session import Session


def check_model(subject: Any, profile: str = "default", **options: Any) -> Report:
    """Check one causal language model and return the Report.

    `subject` is a SPEC, an `nn.Module`, a builder or a `Subject`; `options` are those of `lmconform check` (see
    `lmconform.options.Options`). Raises BuildError when the subject cannot be found or built, OptionError, UnknownCheck
    or ExpectedError for bad options. A finding raises nothing: see `Report.ok` and `Report.failed`.

        report = lmconform.check_model("transformers:llama", select=["cache"])
        assert report.ok, report.failed
    """
    chosen = make_options({"profile": profile, **options})
    require_writable(chosen.json, chosen.html)
    if chosen.html:
        require_libraries()
    if chosen.isolate:
        from lmconform.isolation import check_isolated

        report = check_isolated(subject, chosen)
    else:
        session = Session(subject, chosen)
        report = session.report(list(session.results()))
    if chosen.json:
        report.to_json(chosen.json)
    if chosen.html:
        report.to_html(chosen.html)
    return report
