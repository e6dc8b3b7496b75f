"""The chat page in a real browser: what it counts itself of five reloads, of a killed worker, and of a restart."""

from __future__ import annotations

import os
import shutil
import signal
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import browser
from alone import Uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Servers

EXAMPLE = Path(__file__).parent.parent / "scripts" / "examples"
ZEROS = (
    "reconnects", "heard-missing", "heard-repeated", "own-missing", "own-repeated", "events-missing", "events-repeated",
    "answers-missing", "answers-repeated",
)  # fmt: skip

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium on the PATH")


@pytest.fixture
def chromium() -> Iterator[browser.Browser]:
    with browser.Browser() as started:
        yield started


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    """Make two releases of the chat page, blue and green, and a symlink to the first."""
    for name in ("blue", "green"):
        (tmp_path / name).mkdir()
        for file in EXAMPLE.glob("web_chat.*"):
            shutil.copy(file, tmp_path / name)
    deploy(tmp_path, "blue")
    return tmp_path


def deploy(releases: Path, release: str) -> None:
    (releases / "new").symlink_to(releases / release)
    (releases / "new").rename(releases / "current")


class Chat:
    """The chat page, as a person uses it."""

    def __init__(self, page: browser.Page) -> None:
        self.page = page
        self._said = 0
        page.wait(more_than("events", 1) + " && " + more_than("answers", 0))
        page.evaluate("element('text').focus()")

    def say(self, text: str) -> None:
        """Say something, and wait until it comes back."""
        self._said += 1
        self.page.type(text)
        self.page.wait(f"element('own').textContent === '{self._said}'")
        assert self.page.evaluate("element('said').lastElementChild.querySelector('p').textContent") == text

    def wait_served(self, release: str, replaced: int) -> None:
        """Wait until all three ways to the server have brought something after the replacement."""
        self.page.wait(f"element('release').textContent === '{release}'")
        self.page.wait(f"element('replaced').textContent === '{replaced}'")
        for way in ("events", "answers"):
            self.page.wait(more_than(way, int(self.page.text(way)) + 1))

    def zeros(self) -> dict[str, str]:
        assert not self.page.problems
        return {name: self.page.text(name) for name in ZEROS}


def more_than(identity: str, number: int) -> str:
    return f"Number(element('{identity}').textContent) > {number}"


def is_blank(picture: bytes) -> bool:
    """Whether a PNG has nothing to look at: its pixels, each less its neighbour, are nearly all the same."""
    at, pixels = 8, b""
    while at < len(picture):  # each chunk: length, name, content, checksum
        length = int.from_bytes(picture[at : at + 4], "big")
        if picture[at + 4 : at + 8] == b"IDAT":
            pixels += picture[at + 8 : at + 8 + length]
        at += length + 12
    return len(set(zlib.decompress(pixels))) < 100


def test_a_browser_notices_no_reload_and_no_killed_worker(
    copyover_server: Servers, chromium: browser.Browser, releases: Path, tmp_path: Path
) -> None:
    """Over five reloads and one kill -9 the page reconnects nothing, and misses and repeats nothing."""
    server = copyover_server("web_chat:app", chdir=releases / "current")
    host, port = server.address
    chat = Chat(chromium.open(f"http://{host}:{port}/?name=Ada"))
    chat.say("before the first reload")
    for number, release in enumerate(("green", "blue", "green", "blue", "green"), 1):
        deploy(releases, release)
        assert server.reload().assert_lossless().kept == 0
        chat.wait_served(release, number)
        chat.say(f"after reload {number}, from {release}")
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGKILL)
    chat.wait_served("green", 6)
    chat.say("after kill -9")
    assert chat.zeros() == dict.fromkeys(ZEROS, "0")
    assert not is_blank(chat.page.photograph(tmp_path / "light.png"))
    chat.page.prefer("dark")
    assert not is_blank(chat.page.photograph(tmp_path / "dark.png"))


@pytest.fixture
def uvicorn(releases: Path) -> Iterator[Uvicorn]:
    with Uvicorn("web_chat:app", releases / "blue") as started:
        yield started


def test_a_browser_notices_a_restart(uvicorn: Uvicorn, chromium: browser.Browser) -> None:
    """Under uvicorn alone the page works as well; it counts two reconnects where the server is started again."""
    chat = Chat(chromium.open(f"http://127.0.0.1:{uvicorn.port}/"))
    chat.say("before")
    assert chat.zeros() == dict.fromkeys(ZEROS, "0")
    uvicorn.restart()
    chat.wait_served("blue", 1)
    chat.say("after")
    assert int(chat.page.text("reconnects")) == 2


def test_the_page_counts_what_is_missing_and_what_comes_again(uvicorn: Uvicorn, chromium: browser.Browser) -> None:
    """A number left out, and one that comes again, are counted for messages, own messages and events."""
    page = Chat(chromium.open(f"http://127.0.0.1:{uvicorn.port}/")).page
    said = "heard({kind: 'said', seq: seen + %d, who: %s, number: returned + %d, name: 'x', text: 'y', release: 'z'})"
    page.evaluate(said % (3, "''", 0))
    page.evaluate(said % (0, "''", 0))
    page.evaluate(said % (1, "who", 2))
    page.evaluate(said % (1, "who", 0))
    page.evaluate("ticked(lastEvent + 5, {release: 'z', members: 1})")
    page.evaluate("ticked(lastEvent, {release: 'z', members: 1})")
    counted = {name: page.text(name) for name in ZEROS if not name.startswith(("answers", "reconnects"))}
    assert counted == {
        "heard-missing": "2", "heard-repeated": "1", "own-missing": "1", "own-repeated": "1", "events-missing": "4",
    } | {"events-repeated": counted["events-repeated"]}  # fmt: skip
    assert int(counted["events-repeated"]) > 0  # the real ones come again, too
