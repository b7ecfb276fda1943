"""A headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium: the system's own, driven by playwright."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the page's behaviour is tested with playwright: pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"the page's behaviour is tested in a real browser, and none of {', '.join(names)} is on PATH")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(html, width=1200, javascript=True)`: the page, with what it asked for and complained of.

    `page.requested` are addresses beside the file itself, `page.complaints` errors and messages of its console.
    """
    contexts = []

    def show(text: str, *, width: int = 1200, javascript: bool = True) -> Any:
        file = tmp_path / f"page{len(contexts)}.html"
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            java_script_enabled=javascript,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.requested, page.complaints = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(file.as_uri())
        page.requested.remove(file.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
