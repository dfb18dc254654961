"""A real Chromium that opens reports. Without one the tests are skipped, with the reason."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import write_page

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
ARGUMENTS = ["--no-sandbox", *QUIET.split(), "--disable-sync"]  # as root Chromium has no sandbox
Opened = Callable[..., Any]


def find_chromium() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip(f"no report was opened in a browser: none of {', '.join(NAMES)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="no report was opened in a browser: no playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Opened]:
    """Opens reports as `opened(summary, rollouts, hash="", width=1280, …)`. No test may cause an error or a request."""
    errors: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(
        summary: Any = None, rollouts: Any = None, hash: str = "", width: int = 1280, scheme: str = "light"
    ) -> Any:
        address = write_page(tmp_path / "report.html", summary, rollouts)
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, permissions=["clipboard-read"]
        )
        contexts.append(context)
        page = context.new_page()
        page.route(lambda url: url.partition("#")[0] != address, lambda route: route.abort())
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(address + hash)
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    address = (tmp_path / "report.html").as_uri()
    assert {url.partition("#")[0] for url in requests} <= {address}
