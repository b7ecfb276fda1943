"""The pages as people use them: in a real Chromium, by mouse and keyboard, narrow and wide, light and dark."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from lmconform.report.html import render, render_zoo
from tests.report.by_hand import HOSTILE, LONG, made, of_every_status, result, zoo_data

KINDS = ("check", "several", "zoo")


@functools.cache
def page_of(kind: str, text: str) -> str:
    """A page on which `text` stands wherever a subject can put text of its own."""
    if kind == "zoo":
        return render_zoo(zoo_data(30, text))
    reports = [of_every_status(text), made(result("a.x", "passed"), name=text)]
    return render(reports if kind == "several" else reports[:1])


# Contrast of text as WCAG 2.1 defines it (1.4.3), against the nearest background that is painted.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let part = node; part; part = part.parentElement) {
      const colour = parse(getComputedStyle(part).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return parse(getComputedStyle(document.body).backgroundColor);
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const ink = parse(node.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${((a + 0.05) / (b + 0.05)).toFixed(2)} ${walker.currentNode.data}`);
  }
  return low;
}"""


def visible(page: Any, selector: str) -> int:
    return page.locator(f"{selector}:visible").count()


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_a_subject_is_shown_and_never_run(open_page: Any, kind: str) -> None:
    page = open_page(page_of(kind, HOSTILE))
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1
    assert page.locator("img, a[href^=javascript]").count() == 0
    assert HOSTILE in page.locator("main").inner_text()
    assert page.requested == []
    assert page.complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_could_be_fetched_or_run_even_if_it_slipped_in(open_page: Any, kind: str) -> None:
    page = open_page(page_of(kind, "plain"))
    page.evaluate("""() => {
      const image = document.createElement("img"); image.src = "http://127.0.0.1:9/x.png"; document.body.append(image);
      const script = document.createElement("script"); script.textContent = "window.pwned = 1";
      document.body.append(script);
    }""")
    page.wait_for_timeout(50)
    assert page.evaluate("window.pwned") is None
    assert len(page.complaints) == 2
    assert {re.findall(r"violates.*?(img-src|script-src)", text)[0] for text in page.complaints} == {
        "img-src", "script-src",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_stands_out_from_its_background(open_page: Any, kind: str) -> None:
    page = open_page(page_of(kind, "plain"))
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(CONTRASTS) == [], scheme
    assert len(backgrounds) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_360_pixels_are_wide_enough_even_for_names_that_do_not_break(open_page: Any, kind: str) -> None:
    page = open_page(page_of(kind, LONG), width=360)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_filters_of_a_zoo_narrow_together_and_say_how_many(open_page: Any) -> None:
    page = open_page(render_zoo(zoo_data()))
    shown = page.locator(".shown")
    assert shown.inner_text() == "180 shown"
    page.get_by_role("checkbox", name="red").check()
    assert shown.inner_text() == "20 of 180 shown"
    assert visible(page, "#types tbody tr") == 20
    page.get_by_role("checkbox", name="triaged").check()
    assert shown.inner_text() == "60 of 180 shown"
    page.get_by_label("Family of checks").select_option("padding")
    assert shown.inner_text() == "40 of 180 shown"
    page.get_by_label("Text").fill("type01 words")
    assert [row.split()[0] for row in page.locator("#types tbody tr:visible th").all_inner_texts()] == [
        "type012", "type015",
    ]  # fmt: skip
    page.get_by_role("button", name="Show all").click()
    assert shown.inner_text() == "180 shown"


def test_filters_of_one_subject_and_of_several_do_not_mix(open_page: Any) -> None:
    page = open_page(page_of("several", "toy"))
    assert page.locator(".shown").first.inner_text() == "2 shown"
    page.get_by_role("checkbox", name="green").check()
    assert visible(page, "details.subject") == 1
    page.locator("details.subject:visible > summary").click()
    assert page.locator("details.subject:visible .shown").inner_text() == "1 shown"


def test_without_javascript_everything_is_there_and_no_dead_control(open_page: Any) -> None:
    page = open_page(render_zoo(zoo_data()), javascript=False)
    assert visible(page, "#types tbody tr") == 180
    assert visible(page, ":is(form, button)") == 0


def test_keyboard_alone_reaches_the_report_and_opens_what_is_folded(open_page: Any) -> None:
    page = open_page(page_of("check", "toy"))
    page.keyboard.press("Tab")
    focused = "document.activeElement.textContent.trim()"
    assert page.evaluate(focused) == "Skip to the report"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    seen: list[str] = []
    while not (seen and seen[-1].startswith("25 % mask.soft")):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(focused))
        assert len(seen) < 30, seen
    assert seen.index("Likely causes") < seen.index("cache.failed")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True


def test_a_link_into_a_folded_subject_unfolds_it(open_page: Any) -> None:
    page = open_page(page_of("several", "toy"))
    assert page.locator("[id='s1-cache.failed']").is_hidden()
    page.evaluate("location.hash = '#s1-cache.failed'")
    page.wait_for_function("document.getElementById('s1-cache.failed').checkVisibility()")


def test_a_reproduction_can_be_copied(open_page: Any) -> None:
    page = open_page(page_of("check", "toy"))
    button = page.get_by_role("button", name="Copy the reproduction").first
    button.click()
    page.wait_for_function("[...document.querySelectorAll('.copy')].some((b) => /Copied|Selected/.test(b.textContent))")
    if button.inner_text() == "Selected":
        assert page.evaluate("String(getSelection())") == "lmconform check 'toy'"


def test_charts_are_named_for_those_who_do_not_see_them(open_page: Any) -> None:
    page = open_page(page_of("check", "toy"))
    names = [chart.get_attribute("aria-label") for chart in page.locator("svg[role=img]").all()]
    assert len(names) == page.locator("figure").count() == 4
    assert any("2 of 15 places are more than the 0 that is allowed" in name for name in names)
    assert any("Error by position, error over position: largest difference from 0 to 2" in name for name in names)
