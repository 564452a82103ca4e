"""FiftyOne's App, served by this process and looked at in a browser."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

LOOKER = "[data-cy=looker]"
EMBEDDINGS = "[data-cy=panel-content-Embeddings]"
SECONDS = 90.0


def wait_until(ready: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Poll until ``ready`` returns something true."""
    end = time.monotonic() + seconds
    while True:
        found = ready()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.25)


def server_version(port: int) -> str | None:
    """The version that a running App server reports, or None."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/fiftyone", timeout=5) as answer:
            return json.load(answer)["version"]
    except OSError:
        return None


@contextmanager
def served(fo: Any, dataset: Any, port: int) -> Iterator[Any]:
    """Serve the App for a dataset."""
    session = fo.launch_app(dataset, remote=True, address="127.0.0.1", port=port, auto=False)
    try:
        wait_until(lambda: server_version(port), "the App's start")
        yield session
    finally:
        session.close()
        fo.close_app()


class Page:
    """A dataset in the App.

    Args:
        browser: of playwright.
        port: of the App.
        dataset: to show.
    """

    def __init__(self, browser: Any, port: int, dataset: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(SECONDS * 1000)
        # A bubble about the Enterprise edition covers the panels until it was seen once.
        self.page.add_init_script("localStorage.setItem('fiftyone-enterprise-tooltip-seen', 'true')")
        self.page.goto(f"http://127.0.0.1:{port}/datasets/{dataset.slug}")
        self.page.wait_for_selector(LOOKER)

    def close(self) -> None:
        self.page.close()

    def picture(self) -> Image.Image:
        """The page, once two pictures in a row are equal."""
        before = None
        for _ in range(40):
            time.sleep(0.5)
            now = self.page.screenshot()
            if now == before:
                break
            before = now
        return Image.open(io.BytesIO(now)).convert("RGB")

    def toggle(self, field: str) -> None:
        """Show or hide a label field."""
        self.page.click(f"[data-cy='checkbox-{field}']")

    def open_panel(self, option: str) -> None:
        """Open a panel beside the grid."""
        self.page.click("[data-cy=new-panel-btn]")
        self.page.click(f"[data-cy=new-panel-option-{option}]")

    def show_layout(self, key: str) -> str:
        """Open the Embeddings panel on a layout; returns the panel's text."""
        self.open_panel("Embeddings")
        self.page.click(f"{EMBEDDINGS} >> text={key}")
        return wait_until(lambda: "points" in (text := self.page.inner_text(EMBEDDINGS)) and text, "the plot")

    def search(self, text: str) -> None:
        """Type a text into the search field above the grid, and wait for its results in the panel that opens."""
        self.page.click("[data-cy=action-sort-by-similarity]")
        self.page.fill("input[placeholder='Type anything!']", text)
        self.page.keyboard.press("Enter")
        wait_until(lambda: "Completed" in self.text() and "25 results" in self.text(), "the end of the search")

    def text(self) -> str:
        return self.page.inner_text("body")
