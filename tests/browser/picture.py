"""The picture of README.md: the upper part of a report, as Chromium shows it.

python -m tests.browser.picture runs/quickstart/0/report.html .github/report.png
"""

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.browser.conftest import ARGUMENTS, find_chromium

WIDTH, HEIGHT = 1280, 645  # status, tiles and the first row of curves


def take_picture(chromium: Any, report: Path, target: Path) -> None:
    """Saves the upper part of a report as PNG.

    Args:
        chromium: A browser of playwright.
        report: The HTML file.
        target: The picture.
    """
    page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    page.goto(report.absolute().as_uri())
    page.wait_for_selector("html[data-ready]", timeout=30_000)
    page.screenshot(path=str(target))
    page.close()


def main() -> None:
    """Opens the report of the first argument and writes the picture of the second."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        take_picture(browser, Path(sys.argv[1]), Path(sys.argv[2]))
        browser.close()


if __name__ == "__main__":
    main()
