"""A real browser for the pages that commands write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@contextmanager
def chromium(width: int = 1400, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """Start headless Chromium, one device pixel a CSS pixel; skips where it cannot be started.

    Args:
        width: of the page, in pixels.
        height: of the page.
        dark: what it answers to prefers-color-scheme.

    Yields:
        selenium's WebDriver.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium, or no chromedriver, is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # is 64 MB in containers
        "--force-device-scale-factor=1",
        "--force-color-profile=srgb",  # a screenshot has the bytes of the images
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield browser
    finally:
        browser.quit()


def screenshot(browser: Any) -> Image.Image:
    """What the page looks like, RGB."""
    return Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def complaints(browser: Any) -> list[str]:
    """What the console said since this was last asked: errors and warnings."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser: Any) -> list[str]:
    """The URLs that were asked for since this was last asked, data: left out."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


def width_of(browser: Any, width: int) -> int:
    """The width that the page takes in a window of this width, in pixels."""
    view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    return int(browser.execute_script("return document.scrollingElement.scrollWidth"))


def open_page(browser: Any, page: Path, fragment: str = "") -> None:
    """Load a page of this machine from the start, even if it is the one that is open."""
    browser.get("about:blank")
    browser.get(page.resolve().as_uri() + fragment)
