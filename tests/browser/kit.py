"""Pages in a headless Chromium: what is cut, what is fetched, which links lead nowhere.

The browser is the system's; playwright's Python package drives it. Nothing is downloaded, and no request may leave the machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

__all__ = ["Opened", "chromium_path", "cut", "dead_links", "opened"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
LOCAL = ("127.0.0.1", "localhost", "::1")

CUT = """() => [...document.querySelectorAll('body *')].filter(e => {
  const style = getComputedStyle(e), box = e.getBoundingClientRect();
  if (!box.width || !box.height || style.visibility === 'hidden' || e.closest('[data-scrolls], svg, .visually-hidden, pre')) return false;
  const hides = ['hidden', 'clip'].includes(style.overflowX) && e.scrollWidth > e.clientWidth + 1;
  return hides || (e.children.length === 0 && box.right > document.documentElement.clientWidth + 1 && !scrolls(e));
  function scrolls(child) {
    for (let up = child.parentElement; up; up = up.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(up).overflowX) && up.scrollWidth > up.clientWidth) return true;
    return false;
  }
}).map(e => `${e.tagName.toLowerCase()}.${e.className}: ${(e.textContent || '').trim().slice(0, 60)}`)"""

DEAD = """() => [...document.querySelectorAll('a[href^="#"]')].map(a => decodeURIComponent(a.getAttribute('href').slice(1)))
  .filter(name => name && !document.getElementById(name) && !document.getElementsByName(name).length)"""


@dataclass
class Opened:
    """A page, and what it did.

    Attributes:
        page: of playwright.
        outside: addresses beyond this machine that it asked for; they were refused.
        errors: of scripts, and messages of the console that are errors.
    """

    page: Any
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def chromium_path() -> str | None:
    """Return where the system's Chromium is; ``None`` without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def opened(browser: Any, place: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Opened]:
    """Open a file or an address, with everything beyond this machine refused.

    Args:
        browser: of the fixture ``chromium``.
        place: a file's path, or an address on the loopback.
        width: of the window, in pixels.
        height: of the window, in pixels.
        dark: ask for dark colours.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    found = Opened(context.new_page())

    def guard(route: Any) -> None:
        address = urlparse(route.request.url)
        if address.scheme in ("file", "data", "blob", "about") or address.hostname in LOCAL:
            route.continue_()
        else:
            found.outside.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("console", lambda message: found.errors.append(message.text) if message.type == "error" else None)
    try:
        found.page.goto(place.resolve().as_uri() if isinstance(place, Path) else place, wait_until="load")
        yield found
    finally:
        context.close()


def cut(page: Any) -> list[str]:
    """List what cannot be seen whole: text right of the window that no box scrolls to, and boxes that hide a part of theirs."""
    found: list[str] = page.evaluate(CUT)
    return found


def dead_links(page: Any) -> list[str]:
    """List the links within a page that lead to no place in it."""
    found: list[str] = page.evaluate(DEAD)
    return found
