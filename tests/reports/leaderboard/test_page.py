"""The page on a leaderboard in a real browser."""

import pytest

pytest.importorskip("selenium", reason="selenium comes with requirements-dev.txt")

from reports.leaderboard.report import write_leaderboard
from tests.browsers import chromium
from tests.reports.leaderboard.boards import ABOUT, board_rows
from tests.reports.pages import Page

LONG = "a_model_with_a_name_that_" + "goes_on_" * 20


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    rows = board_rows(["popularity", LONG, *(f"model{index}" for index in range(9))], seeds=(0, 1))
    _, path = write_leaderboard(folder, "demo", rows, about=ABOUT)
    with chromium() as browser:
        yield Page(browser, path)
        assert browser.get_log("browser") == []


def test_every_section_is_there_and_nothing_is_loaded(page):
    assert page.texts("nav a") == ["About", "Results", "Plots", "Comparisons"]
    assert page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_screen(page, width):
    assert page.width_needed(width) <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read(page, scheme):
    assert page.pale_words(scheme) == []
