"""One headless Chromium for all tests of a process; they are skipped without playwright or Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser.kit import FLAGS, chromium_path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra browser)")
    path = chromium_path()
    if path is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
