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
SMALLEST = 500  # pixels: headless Chromium makes no narrower window


class NoBrowser(RuntimeError):
    """There is no Chromium here; the message says how to get one."""


def find_browser() -> str:
    """The program. Raises NoBrowser."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    raise NoBrowser("the report is tested in Chromium: apt-get install chromium, or scripts/test as root")


def open_page(
    page: Path, width: int = 1200, height: int = 1600, *, script: str = "", dark: bool = False, shot: Path | None = None
) -> str:
    """The page's DOM after its scripts ran; `script` runs after them. With `shot` a picture goes there instead.

    Where the page is narrower than the browser's smallest window it is put in a frame, and the DOM is the frame's.
    Raises AssertionError when the page asked the network for anything. (The browser itself asks for its updates; such
    a request is no origin's. There is no proxy at the address given, so none of them gets anywhere.)
    """
    if script:
        tried = page.with_name(f"tried-{page.name}")
        tried.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
        page = tried
    with tempfile.TemporaryDirectory(prefix="pome-browser-") as profile:
        if width < SMALLEST:
            page = put_in_frame(page, Path(profile), width, height)
        command = [find_browser(), *FLAGS, f"--user-data-dir={profile}"]
        command += [f"--window-size={max(width, SMALLEST)},{height}"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        command += ["--proxy-server=127.0.0.1:9", f"--log-net-log={profile}/net.json"]
        command += [f"--screenshot={shot}"] if shot else ["--dump-dom"]
        done = subprocess.run([*command, page.absolute().as_uri()], capture_output=True, text=True, timeout=100)
        log = Path(profile, "net.json").read_text(errors="replace")
    assert done.returncode == 0, done.stderr
    assert '"initiator":"not an origin"' in log, "the browser wrote no log of requests"
    asked = re.findall(r'"initiator":"(?!not an origin)', log)
    assert not asked, f"the page sent {len(asked)} requests"
    return read_frame(done.stdout) if width < SMALLEST and not shot else done.stdout


def put_in_frame(page: Path, folder: Path, width: int, height: int) -> Path:
    """A page that shows another in a frame of a phone's width; once that is drawn, its DOM is in an attribute."""
    # A page of `srcdoc` has its parent's origin, so that the parent may read what became of it.
    source = html.escape(page.read_text())
    frame = f'<iframe srcdoc="{source}" style="border:0;width:{width}px;height:{height}px"></iframe>'
    script = """
      const frame = document.querySelector("iframe");
      addEventListener("load", () => {
        document.documentElement.dataset.framed = frame.contentDocument.documentElement.outerHTML;
        frame.removeAttribute("srcdoc");
      });
    """
    made = folder / "frame.html"
    made.write_text(f'<!doctype html><html><body style="margin:0">{frame}<script>{script}</script></body></html>')
    return made


def read_frame(dom: str) -> str:
    """The DOM of the page in the frame."""
    found = read_attribute(dom, "data-framed")
    assert found is not None, "the frame was not drawn"
    return found


def read_attribute(dom: str, name: str) -> str | None:
    """The value of an attribute of the root element."""
    match = re.search(rf'<html[^>]* {name}="([^"]*)"', dom)
    return html.unescape(match[1]) if match else None
