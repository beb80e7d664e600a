"""A page in a real browser without a screen: the tables that it shows, and whether it fits a width.

    python -m tests.browser PAGE.html 390

prints what `Shown` holds as JSON. A process of its own, since Qt takes over the one that it runs in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

READ = """JSON.stringify({
    title: document.title,
    tables: Object.fromEntries([...document.querySelectorAll("table")].map(
        table => [table.id, [...table.rows].map(row => [...row.cells].map(cell => cell.innerText))])),
    pictures: [...document.querySelectorAll("figure svg")].filter(picture => picture.getBoundingClientRect().height > 100).length,
    captions: [...document.querySelectorAll("figcaption")].map(caption => caption.innerText),
    width: document.scrollingElement.scrollWidth,
    window: innerWidth,
    requests: performance.getEntriesByType("resource").length,
})"""


class Shown(NamedTuple):
    """What a page shows: its title, the texts of each table's cells by its id, its pictures and their captions, its width and the
    window's in pixels, and how many resources it loaded."""

    title: str
    tables: dict[str, list[list[str]]]
    pictures: int
    captions: list[str]
    width: int
    window: int
    requests: int


def show(page: Path, width: int) -> Shown:
    """`page` as a window of this width in pixels shows it."""
    found = subprocess.run(
        [sys.executable, "-m", __name__, str(page), str(width)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return Shown(**json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    os.environ |= {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",  # it refuses to run as root otherwise, as in a container
        "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu",
    }
    from PySide6.QtCore import QUrl
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    application = QApplication([])
    view = QWebEngineView()
    view.resize(int(sys.argv[2]), 800)

    def read(text: str) -> None:
        print(text, flush=True)
        application.quit()

    def loaded(well: bool) -> None:
        if not well:
            application.exit(1)
        view.page().runJavaScript(READ, read)

    view.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(Path(sys.argv[1]).resolve())))
    view.show()
    sys.exit(application.exec())


if __name__ == "__main__":
    main()
