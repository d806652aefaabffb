"""The report's page in a real browser."""

import json

import pytest

pytest.importorskip("selenium", reason="selenium comes with requirements-dev.txt")

from selenium.webdriver.common.by import By

from reports.tokenizer.report import write_tokenizer_report
from tests.browsers import chromium
from tests.reports.pages import Page
from tests.reports.tokenizers import clustered_features, fitted

MARKUP = '<img src=x onerror="window.hacked=1"><b>Bold</b> "&amp;" \' </script><script>window.hacked=1</script>'
LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 9
TITLES = [MARKUP, LONG, *(f"Title {item}" for item in range(2, 240))]
CATEGORIES = [f"Shop > {MARKUP} > Group {item % 8}" for item in range(240)]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tokenizer():
    return fitted(clustered_features(), titles=TITLES, categories=CATEGORIES)


@pytest.fixture(scope="module")
def report(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("page")
    log = folder / "metrics.jsonl"
    records = [{"step": step, f"train/{MARKUP}/loss": 1 / step, "valid/loss": 2 / step} for step in range(1, 9)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    return write_tokenizer_report(folder, tokenizer, clustered_features(), metrics_log=log, title=MARKUP)


@pytest.fixture
def page(browser, report):
    page = Page(browser, report)
    yield page
    assert browser.get_log("browser") == []


def test_the_verdict_comes_first(page):
    assert page.texts("main > section:first-child h2")[0] in ("Healthy", "Usable, could be better", "Not healthy")
    assert page.texts("nav a")[:2] == ["Verdict", "Levels"]
    targets = page.run("return [...document.querySelectorAll('nav a')].map((link) => link.hash)")
    assert all(len(page.all(target)) == 1 for target in targets)


def test_prefixes_open_down_to_the_items(page, tokenizer):
    assert len(page.all("#tree > div > details")) == 8
    assert page.all("#tree .items") == []
    first = tokenizer.semantic_ids[tokenizer.codes[:, 0] == 0]
    assert page.texts("#tree > div > details:first-child .soft") == [f"{len(first)} items"]
    page.all("#tree > div > details:first-child > summary")[0].click()
    page.wait_until(lambda: len(page.all("#tree .inside > div > details")) == len(first[:, 1].unique()))
    while closed := page.all("#tree details[open] .inside > div > details:not([open]) > summary"):
        closed[0].click()
        page.wait_until(lambda path=closed[0]: path.find_elements(By.XPATH, "./following-sibling::div"))
    page.wait_until(lambda: len(page.all("#tree .items > li")) == len(first))


def test_long_lists_grow_on_demand(browser, tmp_path, tokenizer):
    page = Page(browser, write_tokenizer_report(tmp_path, fitted(clustered_features(), sizes=(64, 2)), None))
    assert len(page.all("#tree > div > details")) == 32
    (more,) = page.all("#tree button")
    assert more.text == "Show more (32 left)"
    more.click()
    assert len(page.all("#tree > div > details")) == 64
    assert page.all("#tree button") == []


def test_items_are_found_by_words_of_title_or_key(page):
    search = page.all("#search")[0]
    search.send_keys("KEY-17")
    page.wait_until(lambda: page.texts("#hits") == ["11 items found"])
    assert page.texts("#found > li > .title")[:2] == ["Title 17", "Title 170"]
    search.send_keys(" 170")
    page.wait_until(lambda: page.texts("#found > li > .title") == ["Title 170"])
    assert len(page.all("#found details")) >= 1
    search.send_keys("nothing")
    page.wait_until(lambda: page.texts("#hits") == ["0 items found"])


def test_titles_are_text_and_never_markup(page):
    assert page.texts("h1") == [MARKUP]
    page.all("#search")[0].send_keys("onerror")
    page.wait_until(lambda: MARKUP in page.texts("#found > li > .title"))
    assert page.all("main img, main b, main script") == []
    page.run("for (const box of document.querySelectorAll('details')) box.open = true")
    assert any(MARKUP in text for text in page.texts(".facts"))
    assert page.all("main img, main b, main script") == []
    assert page.run("return window.hacked") is None


def test_nothing_is_loaded(page):
    assert page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


def test_controls_have_names(page):
    unnamed = [
        control.get_attribute("outerHTML")
        for control in page.all("input, button, summary, [role=img]")
        if control.is_displayed() and not control.accessible_name
    ]
    assert unnamed == []


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_the_page_fits_its_screen(page, width):
    assert page.width_needed(width) <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, scheme):
    assert page.pale_words(scheme) == []
