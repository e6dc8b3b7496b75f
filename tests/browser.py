"""
A real browser for tests: Chromium without a window, driven over its DevTools protocol.

It decides how Chromium is started, asked and ended; what a page must show, the tests decide. Every wait ends after half
a minute. See https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Self

from websockets.sync.client import ClientConnection, connect

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 30.0
END_S = 10.0
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it runs as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1180,820",
    "--remote-debugging-port=0",
)


class Browser:
    """One Chromium with a profile of its own."""

    def __init__(self) -> None:
        assert PROGRAM is not None
        self._profile = tempfile.mkdtemp(prefix="co-chromium-")
        self._process = subprocess.Popen(
            [PROGRAM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._log: list[str] = []
        self._address: str | None = None
        self._is_told = threading.Event()
        self._reader = threading.Thread(target=self._read_log, name="chromium", daemon=True)
        self._reader.start()
        self._sockets = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(END_S)
        self._process.kill()
        self._process.wait()
        self._reader.join(END_S)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _read_log(self) -> None:
        """Wait for the line that says where it listens; empty the pipe for as long as it runs."""
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._log.append(line)
                found = re.match(r"DevTools listening on (ws://\S+)", line)
                if found is not None:
                    self._address = found[1]
                    self._is_told.set()
        self._is_told.set()

    def open(self, url: str) -> Page:
        """Return a new page that shows *url*."""
        assert self._is_told.wait(DEADLINE_S), self._log
        assert self._address is not None, self._log
        page = Page(self._sockets.enter_context(connect(self._address, max_size=None, open_timeout=DEADLINE_S)))
        page.go(url)
        return page


class Page:
    """One page of the browser; all calls wait for their answer."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.problems: list[str] = []  # what its scripts threw and nobody caught
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of one method of the protocol."""
        number = next(self._numbers)
        session = {} if self._session is None else {"sessionId": self._session}
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters, **session}))
        while True:
            message = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"]))

    def go(self, url: str) -> None:
        went = self.call("Page.navigate", url=url)
        assert "errorText" not in went, went
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return what *expression* is in the page, as JSON; of a promise, what it becomes."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """
        Wait until *condition* holds in the page.

        Raises:
            TimeoutError: it did not, in time.

        """
        look = f"new Promise(done => {{ (function look() {{ ({condition}) ? done(1) : setTimeout(look, 20) }})() }})"
        try:
            self.evaluate(look)
        except TimeoutError:
            raise TimeoutError(f"the page never came to {condition}; {self.problems}") from None

    def text(self, identity: str) -> str:
        """Return what the element with this id shows."""
        shown: str = self.evaluate(f"document.getElementById({json.dumps(identity)}).textContent")
        return shown

    def type(self, text: str) -> None:
        """Type into what has the focus, and press Enter."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, **enter)

    def prefer(self, scheme: str) -> None:
        """Prefer the colour scheme *scheme*, light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def photograph(self, path: Path) -> bytes:
        """Save what is to be seen as a PNG file, and return its bytes."""
        picture = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(picture)
        return picture
