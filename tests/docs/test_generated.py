"""Generated pages are current: run python docs/generate.py when this fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def _pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: page() for name, page in module.PAGES.items()}


@pytest.mark.parametrize("name", ["checks.md", "findings.md"])
def test_page_is_current(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == _pages()[name]
