"""A headless Chromium, told what to do over a pipe (Chrome's DevTools protocol), so that no driver has to be installed.

Debian: `apt-get install chromium-headless-shell`; any Chromium or Chrome on the PATH serves, or one that FDIV_BROWSER names.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = {"desktop": 1280, "phone": 390}


def find_browser() -> str | None:
    """The program, or None where there is none."""
    named = os.environ.get("FDIV_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Seen:
    """What a page said while it loaded: errors of scripts, and addresses outside of it that it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """One process with one tab; `with Browser() as browser`."""

    def __init__(self, program: str, folder: Path):
        """Start `program`, whose profile goes into `folder`."""
        self.read, theirs_out = os.pipe()
        theirs_in, self.write = os.pipe()
        options = (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars", "--allow-file-access-from-files",
            f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank",
        )  # fmt: skip
        # The browser reads commands from descriptor 3 and answers on 4, which may be ours of another purpose.
        above = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (theirs_in, theirs_out)]

        def place() -> None:
            for number, wanted in zip(above, (3, 4), strict=True):
                os.dup2(number, wanted)

        self.process = subprocess.Popen(
            [program, *options],
            pass_fds=(3, 4),
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in above:
            os.close(number)
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest, self.events = 0, b"", []
        self.session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(entry["targetId"] for entry in targets if entry["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError(f"the browser ended with code {self.process.wait()}")
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def call(self, method: str, timeout: float = 30.0, **parameters: Any) -> dict[str, Any]:
        """A command and its answer; events that arrive meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def size(self, width: int, dark: bool = False, height: int = 900) -> None:
        """The window, as a phone below 600 pixels, and the colour scheme that the user prefers."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str, timeout: float = 30.0) -> Seen:
        """Load a page, wait until it is there, and say what it did."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + timeout
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(deadline))
        self.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame)).then(() => 0)")
        return self.seen()

    def seen(self) -> Seen:
        """Of the page that is open."""
        seen = Seen()
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                seen.errors.append(details.get("exception", {}).get("description") or details["text"])
            if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                seen.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            if method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
                seen.errors.append(str(parameters["args"]))
            if method == "Network.requestWillBeSent":
                seen.requests.append(parameters["request"]["url"])
        return seen

    def too_wide(self) -> list[str]:
        """What makes the page scroll sideways: the page itself first, then elements that stick out of it."""
        return self.evaluate(
            """(() => {
              // Not window.innerWidth: a phone zooms out until what sticks out fits.
              const page = document.scrollingElement, width = document.documentElement.clientWidth, found = [];
              if (page.scrollWidth <= width) return found;
              found.push(`the page is ${page.scrollWidth} wide, the window ${width}`);
              for (const one of document.querySelectorAll('body *'))
                if (one.getBoundingClientRect().right > width + 1)
                  found.push(`${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`);
              return found.slice(0, 6);
            })()"""
        )

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot as PNG, of the window or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])
