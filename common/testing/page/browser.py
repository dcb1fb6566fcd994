"""A headless Chromium for tests, and the page in it in the words of its user."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,800",
]

ENTER, ESCAPE, TAB, SHIFT, SPACE = "\ue007", "\ue00c", "\ue004", "\ue008", " "
LEFT, UP, RIGHT, DOWN, END, HOME = (*map(chr, range(0xE012, 0xE016)), "\ue010", "\ue011")


@contextlib.contextmanager
def chromium(**preferences: Any) -> Iterator[Any]:
    """A selenium driver with a fresh profile. Skips the test where there is no browser."""
    binary, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("chromium or chromedriver is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", preferences)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=chromedriver)
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """The page in the browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def forget(self) -> None:
        """Empty the browser's storage for the server, and its log."""
        self.driver.get(f"{self.url}/inspector/icon.svg")
        self.js("localStorage.clear(); sessionStorage.clear()")
        self.driver.get_log("browser")

    def open(self, url: str | None = None) -> None:
        """Load the page and wait until the server has answered it."""
        self.driver.get(url or self.url)
        self.until(
            lambda: self.driver.find_elements("css selector", "#model:not([data-state=connecting])")
        )

    def complaints(self) -> list[str]:
        """What the console says, but for refused requests, which the browser logs by itself."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [line for line in messages if "Failed to load resource" not in line]

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def text(self, selector: str) -> str:
        """The text of the last element that matches, as it stands in the document."""
        script = "return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''"
        return self.js(script, selector)

    def until(self, condition: Any, seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, self.one("body").text
            time.sleep(0.02)
        return value

    def type(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def focused(self) -> str:
        return self.js("return document.activeElement.id")
