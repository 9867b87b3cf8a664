"""The report in a real browser: it draws its charts, fetches nothing, fits narrow windows, runs no host's script."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fleet.report import html
from fleet.results.load import load
from tests.unit.report import sample

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if shutil.which(CHROMIUM) is None:
        reason = "chromium is not installed: apt-get install chromium"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    session = sample.sample(tmp_path_factory.mktemp("report"))
    return html.write(session, load(session))


class Visit:
    """A page with everything it complained about and asked for."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.refused: dict[str, str | None] = {}
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.update({request.url: request.failure}))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#chart-3 .main-svg")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens(browser: Browser, report: Path, scheme: str) -> None:
    visit = Visit(browser, report, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = visit.page
    assert page.get_by_role("heading", level=1).is_visible()
    assert page.locator("main > *").first.inner_text() == "6 of 8 hosts, 27 of 32 units · 1 INVALID"
    assert page.locator(".chart .main-svg").count() >= 3
    assert page.locator("#chart-1 .bars path").count() == 5
    assert visit.complaints == []
    assert visit.requests == [report.as_uri()]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_its_background(browser: Browser, report: Path, scheme: str) -> None:
    page = Visit(browser, report, color_scheme=scheme).page
    for selector in ("h1", ".note", ".chip", ".banner", "#chart-1 .xtick text"):
        assert contrast(page, selector) >= 4.5, selector
    page.close()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_windows_do_not_scroll_sideways(browser: Browser, report: Path, width: int) -> None:
    page = Visit(browser, report, viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_a_hosts_words_stay_words(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report)
    assert visit.page.title() == "6 of 8 hosts, 27 of 32 units · 1 INVALID"
    assert sample.EVIL in visit.page.locator("#missing").inner_text()
    assert visit.page.locator("img").count() == 0
    assert visit.complaints == []
    visit.page.close()


def test_injected_markup_would_be_stopped_by_the_policy(browser: Browser, report: Path, tmp_path: Path) -> None:
    """If escaping ever failed: the policy runs no script without the page's nonce and fetches nothing."""
    broken = tmp_path / "index.html"
    text = report.read_text(encoding="utf-8")
    added = "<script>document.title='owned'</script><img src='http://192.0.2.1/x.png'>"
    broken.write_text(text.replace("<main>", f"<main>{added}", 1), encoding="utf-8")
    visit = Visit(browser, broken)
    assert visit.page.title() != "owned"
    assert visit.refused == {"http://192.0.2.1/x.png": "csp"}
    visit.page.close()


def test_paper_gets_everything(browser: Browser, report: Path) -> None:
    page = Visit(browser, report).page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert len(page.pdf()) > 10_000
    page.close()


def contrast(page: Page, selector: str) -> float:
    """WCAG contrast of an element's text with the nearest background behind it."""
    value: float = page.locator(selector).first.evaluate(
        """element => {
          const rgb = text => text.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
            .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const style = getComputedStyle(element);
          const ink = rgb(element instanceof SVGElement ? style.fill : style.color);
          let behind = element, paper;
          do {
            paper = rgb(getComputedStyle(behind).backgroundColor);
            behind = behind.parentElement;
          } while (paper.length === 4 && paper[3] === 0);
          const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        }"""
    )
    return value
