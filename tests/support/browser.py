"""A headless Chromium that opens one local page; nothing here uses the package."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


class NoBrowser(RuntimeError):
    """There is no Chromium here; the message says how to get one."""


def find_browser() -> str:
    """The program. Raises NoBrowser."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    raise NoBrowser("the report is tested in Chromium: apt-get install chromium, or scripts/test as root")


def open_page(page: Path, width: int = 1200, height: int = 1600, *, script: str = "", shot: Path | None = None) -> str:
    """The page's DOM after its scripts ran; `script` runs after them, and a picture goes to `shot`.

    Raises AssertionError when the page asked the network for anything. (The browser itself asks for its updates; such
    a request is no origin's. There is no proxy at the address given, so none of them gets anywhere.)
    """
    if script:
        tried = page.with_name(f"tried-{page.name}")
        tried.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
        page = tried
    with tempfile.TemporaryDirectory(prefix="pome-browser-") as profile:
        command = [find_browser(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += ["--proxy-server=127.0.0.1:9", f"--log-net-log={profile}/net.json"]
        command += [f"--screenshot={shot}"] if shot else ["--dump-dom"]
        done = subprocess.run([*command, page.absolute().as_uri()], capture_output=True, text=True, timeout=100)
        log = Path(profile, "net.json").read_text(errors="replace")
    assert done.returncode == 0, done.stderr
    assert '"initiator":"not an origin"' in log, "the browser wrote no log of requests"
    asked = re.findall(r'"initiator":"(?!not an origin)', log)
    assert not asked, f"the page sent {len(asked)} requests"
    return done.stdout


def read_attribute(dom: str, name: str) -> str | None:
    """The value of an attribute of the root element."""
    match = re.search(rf'<html[^>]* {name}="([^"]*)"', dom)
    return html.unescape(match[1]) if match else None
