"""A real browser for tests of pages: Debian's chromium, headless, driven by Selenium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# without these, chromium calls home at every start, which a closed network answers slowly
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1240,1600",
)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A driver; the test is skipped where there is no browser, and fails where STABKIT_REQUIRE_BROWSER is set."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("STABKIT_REQUIRE_BROWSER"):
            pytest.fail("chromium and chromedriver are required here and not installed")
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(executable_path=driver)
    started = selenium.Chrome(options=options, service=service)
    try:
        yield started
    finally:
        started.quit()
