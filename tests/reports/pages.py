"""A page as a person uses it, and what every page must keep."""

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

GROUNDS = {"light": "rgb(246, 245, 242)", "dark": "rgb(20, 24, 26)"}


class Page:
    """A page in a browser."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get_log("browser")
        browser.get(path.as_uri())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)", selector
        )

    def wait_until(self, condition):
        WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda _: condition())

    def run(self, script):
        return self.browser.execute_script(script)

    def width_needed(self, width):
        """Pixels that the page takes on a screen of this width, with all that can be opened open."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            self.run("for (const box of document.querySelectorAll('details')) box.open = true")
            assert self.run("return window.innerWidth") == width
            return self.run("return document.documentElement.scrollWidth")
        finally:
            self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def pale_words(self, scheme):
        """Elements with text of their own whose contrast to the nearest ground that is not clear is below 4.5."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        try:
            assert self.run("return getComputedStyle(document.body).backgroundColor") == GROUNDS[scheme]
            return self.run(_CONTRASTS)
        finally:
            self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


_CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function pixel(colors) {
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function light(color) {
  const [r, g, b] = color.slice(0, 3).map((value) => value / 255)
    .map((value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
const pale = [];
for (const found of document.querySelectorAll("body *:not(script)")) {
  if (![...found.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  if (!found.checkVisibility()) continue;
  const grounds = [];
  for (let box = found; box; box = box.parentElement) grounds.unshift(getComputedStyle(box).backgroundColor);
  const [one, other] = [light(pixel(grounds)), light(pixel([...grounds, getComputedStyle(found).color]))];
  const contrast = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
  if (contrast < 4.5) pale.push(`${found.className} ${contrast.toFixed(2)} ${found.textContent.slice(0, 30)}`);
}
return [...new Set(pale)];
"""
