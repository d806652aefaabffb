"""A real browser for tests of pages: Debian's chromium, or whatever CHROMIUM and CHROMEDRIVER name."""

import os
import shutil
from contextlib import contextmanager

import pytest

WIDTH, HEIGHT = 1200, 900


@contextmanager
def chromium():
    """A headless browser whose log is kept; the test is skipped where none is installed."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium comes with requirements-dev.txt")
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium")
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("chromium and chromium-driver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    with selenium.Chrome(options=options, service=selenium.ChromeService(driver)) as browser:
        yield browser
