"""Hostile peers: each is refused, closed and counted, no descriptor leaks, and the holder serves on."""

from __future__ import annotations

import array
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hostile
from clients import Client
from copyover.testing import Server
from operators import DEADLINE_S, Operator

if TYPE_CHECKING:
    from collections.abc import Iterator

APPS = Path(__file__).parent / "apps"


class Site:
    """A holder with a server and three clients, that outlives every peer."""

    def __init__(self, directory: Path) -> None:
        self.wrapper = directory / "python"
        settings = {"app": "handlers:tally", "chdir": str(APPS), "listen": ["127.0.0.1:0"], "loop": "asyncio"}
        limits = {"timeout_s": 2.0, "boundary_s": 0.5, "drain_timeout_s": 2.0}
        self.server = Server("test", settings | limits)
        self.control = self.server.directory / "test" / "control.sock"
        self.operator = Operator(self.control)
        self.clients = [Client(self.server.address) for _ in range(3)]
        self.asked = 0
        self.check()
        self.operator.reload()
        self.descriptors = self.settled_descriptors()

    def check(self) -> None:
        """Each client is still served, with its state."""
        self.asked += 1
        for client in self.clients:
            assert client.ask(b"x\n") == b"%d\n" % self.asked

    def settled_descriptors(self) -> int:
        self.operator.wait_settled()
        return self.server.descriptors()

    def assert_unharmed(self) -> None:
        """Everybody is served, nothing has leaked, and a plain reload works."""
        self.check()
        deadline_s = time.monotonic() + DEADLINE_S
        while (found := self.settled_descriptors()) != self.descriptors:
            assert time.monotonic() < deadline_s, f"{found} descriptors, {self.descriptors} before"
        answer = self.operator.reload()
        assert (answer["outcome"], answer["connections"]["moved"], answer["connections"]["lost"]) == ("done", 3, 0)
        self.check()
        while (found := self.settled_descriptors()) != self.descriptors:
            assert time.monotonic() < deadline_s, f"{found} descriptors, {self.descriptors} before"

    def reload_hostile(self, way: str) -> dict[str, Any]:
        program = Path(hostile.__file__).resolve()
        self.wrapper.write_text(f"#!/bin/sh\nexec {sys.executable} -P {program} {way}\n", encoding="utf-8")
        self.wrapper.chmod(0o755)
        self.server.configure(python=str(self.wrapper))
        try:
            return self.operator.reload()
        finally:
            self.server.configure(python=None)

    def counter(self, name: str) -> int:
        return int(self.operator.status()["counters"].get(name, 0))

    def call(self) -> socket.socket:
        caller = socket.socket(socket.AF_UNIX)
        caller.connect(str(self.control))  # waits where the backlog is full; with a time-out it would not. unix(7)
        caller.settimeout(DEADLINE_S)
        return caller


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("hostile"))
    yield made
    for client in made.clients:
        client.socket.close()
    made.server.stop()
    sys.stderr.write(made.server.log)
    assert not made.server.discard()


@pytest.mark.parametrize("way", [way for way in hostile.WAYS if way not in hostile.SILENT])
def test_a_worker_that_breaks_the_protocol_is_refused(site: Site, way: str) -> None:
    """The reload is refused or rolled back, the worker is killed and counted, and the incumbent never noticed."""
    before = site.counter("protocol_errors")
    answer = site.reload_hostile(way)
    expected = (4, 1) if way in hostile.LENDS_ITS_OWN else (3, 0)
    assert (answer["exit_code"], answer["connections"]["lost"]) == expected, answer
    site.operator.wait_settled()
    assert site.counter("protocol_errors") == before + 1
    site.assert_unharmed()


@pytest.mark.parametrize("way", hostile.SILENT)
def test_a_worker_that_says_and_reads_nothing_is_given_up(site: Site, way: str) -> None:
    """What does not answer is over at the deadline: everything returns."""
    answer = site.reload_hostile(way)
    assert (answer["exit_code"], answer["connections"]["lost"]) == (3, 0), answer
    site.assert_unharmed()


# ---- the control socket

DEEP = b"[" * 30_000 + b"]" * 30_000
NO_REQUESTS = {
    "random bytes": os.urandom(500).replace(b"\n", b"") + b"\n",
    "not an object": b"[1, 2]\n",
    "no do": b'{"reload": true}\n',
    "do is no string": b'{"do": ["reload"]}\n',
    "unknown": b'{"do": "explode"}\n',
    "deep": DEEP + b"\n",
    "deep inside": b'{"do": "reload", "timeout_s": ' + DEEP + b"}\n",
    "long": b'{"do": "' + b"x" * 100_000 + b'"}\n',
    "odd time-out": b'{"do": "reload", "timeout_s": "soon"}\n',
    "negative time-out": b'{"do": "reload", "timeout_s": -1}\n',
    "infinite time-out": b'{"do": "reload", "timeout_s": Infinity}\n',
    "no time-out": b'{"do": "reload", "timeout_s": NaN}\n',
    "odd move": b'{"do": "reload", "move": {"a": 1}}\n',
    "no UTF-8": b'{"do": "\xff\xfe"}\n',
    "NUL": b'{"do": "status\\u0000"}\n',
}


@pytest.mark.parametrize("what", NO_REQUESTS)
def test_what_is_no_request_is_answered_with_an_error(site: Site, what: str) -> None:
    """One sentence, then it is hung up on; whatever it was."""
    with site.call() as caller, caller.makefile("rb") as answers:
        caller.sendall(NO_REQUESTS[what])
        told = answers.read()
    assert set(json.loads(told)) == {"error"}
    site.check()


def test_half_a_request_is_no_request(site: Site) -> None:
    """Who hangs up in the middle of a line asked for nothing."""
    generation = site.operator.status()["generation"]
    for cut in (1, 5, 14):
        with site.call() as caller:
            caller.sendall(b'{"do": "reload"}'[:cut])
    site.assert_unharmed()
    assert site.operator.status()["generation"] == generation + 1  # by assert_unharmed


def test_descriptors_on_the_control_socket_go_nowhere(site: Site) -> None:
    """The control socket takes none: what comes along is closed, and the request is answered."""
    with site.call() as caller, caller.makefile("rb") as answers, Path(os.devnull).open("rb") as null:
        rights = array.array("i", [null.fileno()] * 200)
        caller.sendmsg([b'{"do": "status"}\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert "result" in json.loads(answers.read())
    site.assert_unharmed()


def test_a_flood_of_callers_costs_nobody_anything(site: Site) -> None:
    """Callers that say nothing wait; who asks is answered meanwhile, and all are forgotten when they go."""
    callers = [site.call() for _ in range(400)]
    for caller in callers[::2]:
        caller.sendall(b'{"do": "sta')
    assert site.operator.status()["is_serving"]
    site.check()
    for caller in callers:
        caller.close()
    site.assert_unharmed()


def test_a_caller_that_does_not_read_is_hung_up_on(site: Site) -> None:
    """Answers that nobody takes are not kept without end; others are answered meanwhile."""
    with site.call() as caller:
        caller.settimeout(1.0)
        asked = b'{"do": "status"}\n' * 1000
        sent = 0
        try:
            for _ in range(200):
                sent += caller.send(asked)
        except (TimeoutError, ConnectionError):
            pass
        assert sent
        assert site.operator.status()["is_serving"]
        site.check()
    site.assert_unharmed()


def test_a_caller_of_another_user_is_refused(site: Site) -> None:
    """The socket's mode keeps others out; credentials do where it does not, and they are counted."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    before = site.counter("denied")
    for directory in (site.server.directory, site.control.parent):
        directory.chmod(0o711)
    site.control.chmod(0o666)
    try:
        answer = _ask_as_nobody(site.control)
    finally:
        site.control.chmod(0o600)
        for directory in (site.server.directory, site.control.parent):
            directory.chmod(0o700)
    assert "only the holder's own user" in answer["denied"]
    assert site.counter("denied") == before + 1
    site.assert_unharmed()


def _ask_as_nobody(control: Path) -> dict[str, Any]:
    """Ask in a child: a process cannot go back from nobody."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(control))
            os.write(write_end, caller.recv(1000))
        os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as answer:
        told: dict[str, Any] = json.loads(answer.read())
    return told
