"""The page on runs in a real browser."""

import pytest

pytest.importorskip("selenium", reason="selenium comes with requirements-dev.txt")

from reports.runs.report import write_run_report
from tests.browsers import chromium
from tests.reports.pages import Page
from tests.reports.runs.folders import write_run

LONG = "a_run_with_a_name_that_" + "goes_on_" * 20


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Ten runs, one with a long name and one that did not finish."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / f"run{index}", scale=index + 1, learning_rate=index + 1) for index in range(8)]
    runs += [write_run(folder / LONG), write_run(folder / "half", finished=False)]
    write_run_report(folder / "report.html", runs)
    with chromium() as browser:
        page = Page(browser, folder / "report.html")
        yield page
        assert browser.get_log("browser") == []


def test_every_section_is_there_and_nothing_is_loaded(page):
    assert page.texts("nav a") == ["Verdict", "Results", "Curves", "Settings", "Environment"]
    assert page.texts("main > section:first-child h2")[0].startswith("10 runs, 9 finished")
    assert all(
        len(page.all(target)) == 1 for target in ("#verdict", "#results", "#curves", "#settings", "#environment")
    )
    assert page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_the_page_fits_its_screen(page, width):
    assert page.width_needed(width) <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, scheme):
    page.run("for (const box of document.querySelectorAll('details')) box.open = true")
    assert page.pale_words(scheme) == []
