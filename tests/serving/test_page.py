"""The page in a real browser."""

from dataclasses import replace

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} comes with requirements-serve.txt")
selenium = pytest.importorskip("selenium", reason="selenium comes with requirements-dev.txt")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from modules.recommender import Recommender  # noqa: E402
from serving.service import RecommendService  # noqa: E402
from tests.browsers import chromium  # noqa: E402
from tests.modules.tiny_artifact import save_tiny_artifact, save_tiny_sasrec  # noqa: E402
from tests.serving.running import running, wait_until  # noqa: E402

MARKUP = '<img src=x onerror="window.hacked=1"><b>Bold</b> "&amp;" \' </script><script>window.hacked=1</script>'


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "model"
    save_tiny_artifact(folder)
    recommender = Recommender.from_pretrained(folder, device="cpu")
    tokenizer = recommender.artifact.tokenizer
    titles = [*tokenizer.catalogue.titles[:3], MARKUP, *tokenizer.catalogue.titles[4:]]
    recommender.catalogue = tokenizer.catalogue = replace(tokenizer.catalogue, titles=titles)
    return RecommendService(recommender)


class Page:
    """The page as a person uses it."""

    def __init__(self, browser, client):
        self.browser = browser
        browser.get_log("browser")
        browser.get(f"http://127.0.0.1:{client.port}/")
        self.search = browser.find_element(By.ID, "search")

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)", selector
        )

    def text(self, selector):
        return " ".join(self.texts(selector))

    def wait_for(self, selector, expected):
        wait_until(lambda: self.texts(selector) == expected)

    def click(self, selector):
        self.all(selector)[0].click()

    def retype(self, selector, text):
        (control,) = self.all(selector)
        control.send_keys(Keys.CONTROL, "a")
        control.send_keys(text, Keys.TAB)

    def pick(self, text):
        self.search.send_keys(text)
        wait_until(lambda: self.texts("#options .title")[:1] == [text])
        self.search.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
        wait_until(lambda: text in self.texts("#history .title"))

    def problems(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(browser, service):
    with running(service) as client:
        page = Page(browser, client)
        yield page
        assert page.problems() == []


def test_picking_items_ranks_others(page):
    wait_until(lambda: page.text("#catalogue") == "12 items")
    page.pick("Title 4")
    wait_until(lambda: len(page.all("#ranked > li")) == 10)
    page.pick("item-11")
    page.wait_for("#history .title", ["Title 4", "item-11"])
    wait_until(lambda: not {"Title 4", "item-11"} & set(page.texts("#ranked .title")))
    scores = [float(text.split()[-1].replace("\u2212", "-")) for text in page.texts("#ranked .score")]
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert all(len(codes.split()) == 3 for codes in page.texts("#ranked .codes"))
    assert page.text("#status").startswith("10 items in ")
    assert page.text("#legend").startswith("Boxes are the codes of the item's semantic id.")
    assert page.text("#legend").endswith("Scores are log-likelihoods, bars their likelihood relative to the first.")
    assert page.search.get_attribute("value") == ""


def test_what_is_typed_is_found_by_enter_alone(page):
    page.search.send_keys("item-7", Keys.ENTER)
    page.wait_for("#history .title", ["Title 7"])
    page.search.send_keys("no such thing", Keys.ENTER)
    wait_until(lambda: page.text("#search-problem") == "No item has these words in its title or key.")
    assert page.texts("#history .title") == ["Title 7"]


def test_history_and_settings_change_the_list(page):
    page.pick("Title 4")
    wait_until(lambda: len(page.all("#ranked > li")) == 10)
    first = page.texts("#ranked .title")[0]
    page.click("#ranked li button")
    page.wait_for("#history .title", ["Title 4", first])
    page.click("#history li button")
    page.wait_for("#history .title", [first])
    page.click("#exclude")
    wait_until(lambda: len(page.all("#ranked .shared")) > 0)
    page.retype("#k", "12")
    wait_until(lambda: len(page.all("#ranked > li")) == 12)
    assert first in page.texts("#ranked .title")
    page.click("#clear")
    page.wait_for("#history .title", [])
    assert page.texts("#ranked > li") == []
    page.click("#example")
    wait_until(lambda: len(page.all("#history > li")) == 3)


def test_titles_are_text_and_never_markup(page):
    page.search.send_keys("onerror")
    wait_until(lambda: page.texts("#options .title") == [MARKUP])
    page.search.send_keys(Keys.ENTER)
    page.wait_for("#history .title", [MARKUP])
    page.pick("Title 4")
    assert page.all("main img, main b, main script") == page.all("main > script")
    assert page.browser.execute_script("return window.hacked") is None


def test_models_without_semantic_ids_have_no_boxes(browser, tmp_path):
    save_tiny_sasrec(tmp_path / "model")
    service = RecommendService(Recommender.from_pretrained(tmp_path / "model", device="cpu"))
    with running(service) as client:
        page = Page(browser, client)
        page.pick("Title 4")
        wait_until(lambda: len(page.all("#ranked > li")) == 10)
        assert page.all(".codes") == []
        assert page.text("#legend") == "Scores are those of the ranker sasrec, bars their share of the first."
        widths = page.browser.execute_script(
            "return [...document.querySelectorAll('.gauge div')].map((bar) => parseFloat(bar.style.width))"
        )
        scores = [float(text.split()[-1].replace("\u2212", "-")) for text in page.texts("#ranked .score")]
        expected = [100 * max(score / scores[0], 0) for score in scores]
        assert widths == pytest.approx(expected, abs=1)
        assert len(page.texts("#ranked .key")) >= 9  # of all but the one without a title
        assert page.problems() == []


def test_errors_are_shown(page):
    page.pick("Title 4")
    page.retype("#k", "101")
    wait_until(lambda: page.text("#problem") == "k: expected at most 100, got 101.")
    assert page.texts("#ranked > li") == []
    assert "422" in page.problems()[0]  # the browser's own note


def test_a_token_is_asked_for(browser, service):
    with running(service, token="s3cret") as client:
        page = Page(browser, client)
        wait_until(lambda: page.all("#token")[0].is_displayed())
        page.all("#token")[0].send_keys("s3cret", Keys.ENTER)
        wait_until(lambda: page.text("#catalogue") == "12 items")
        page.pick("Title 4")
        wait_until(lambda: len(page.all("#ranked > li")) == 10)
        assert not page.all("#token")[0].is_displayed()


def test_controls_have_names_and_the_page_fits_a_phone(page):
    page.pick("Title 4")
    wait_until(lambda: len(page.all("#ranked > li")) == 10)
    unnamed = [
        control.get_attribute("outerHTML")
        for control in page.all("input, button, ul, ol")
        if control.is_displayed() and not control.accessible_name
    ]
    assert unnamed == []
    page.browser.set_window_size(500, 900)
    try:
        width, visible = page.browser.execute_script("return [document.body.scrollWidth, window.innerWidth]")
        assert width <= visible
    finally:
        page.browser.set_window_size(1200, 900)
