"""Streams over reloads, with uvicorn: the same response goes on, every chunk framed, no event lost or repeated."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Self

import pytest

from asgi_servers import EVERY_STACK, SOON, Deployment, reloading, serve, wait_alone, wait_phase
from clients import Client
from gates import lines_of, wait_until
from http_client import HEAD, HttpClient, request

if TYPE_CHECKING:
    from pathlib import Path

    from copyover.testing import Servers

APPS = {
    "raw": "asgi_raw:app",
    "starlette": "asgi_starlette:app",
    "middleware": "asgi_starlette:behind_middleware",
    "fastapi": "asgi_fastapi:app",
}


class Ticker(HttpClient):
    """A client of server-sent events that misses none: each chunk is one event, with the next number."""

    def __init__(self, address: tuple[str, int] | str, path: str) -> None:
        super().__init__(address)
        self.last = 0
        self.pids: list[int] = []
        self.send(request(path))
        head = self.head()
        assert head.status == 200
        assert head.headers["transfer-encoding"] == "chunked"

    def __enter__(self) -> Self:
        return self

    def event(self) -> int:
        """Take one event; return who sent it."""
        return self._check(self.chunk())

    def _check(self, piece: bytes) -> int:
        found = re.fullmatch(rb"id: (\d+)\ndata: (\d+)\n\n", piece)
        assert found is not None, piece
        assert int(found[1]) == self.last + 1, (piece, self.last)
        self.last += 1
        pid = int(found[2])
        if pid not in self.pids:
            self.pids.append(pid)
        assert pid == self.pids[-1], "one that had gone spoke again"
        return pid

    def wait_sent_by_another(self) -> None:
        before = self.pids[-1]
        while self.event() == before:
            continue

    def take_the_rest(self) -> None:
        """Take all up to the end of the response, which must be a proper one."""
        for piece in self.chunks():
            self._check(piece)


@EVERY_STACK
@pytest.mark.parametrize("kind", APPS)
def test_a_resumable_stream_goes_on_in_the_same_response(
    copyover_server: Servers, tmp_path: Path, http: str, loop: str, kind: str
) -> None:
    """Five reloads, ten clients, an event each five milliseconds; then it ends, and the connection goes on."""
    server = serve(copyover_server, APPS[kind], http=http, loop=loop)
    until = tmp_path / "until"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Ticker(server.address, f"/events?until={until}")) for _ in range(10)]
        for client in clients:
            client.event()
        for _ in range(5):
            result = server.reload().assert_lossless()
            assert (result.moved, result.kept) == (10, 0)
            for client in clients:
                client.wait_sent_by_another()
        until.touch()
        for client in clients:
            client.take_the_rest()
            assert len(client.pids) == 6
            assert client.get("/who").pid == client.pids[-1]


@pytest.mark.parametrize("kind", ["raw", "starlette"])
def test_a_stream_that_nobody_said_is_resumable_stays(copyover_server: Servers, tmp_path: Path, kind: str) -> None:
    """It goes on from the incumbent, is counted with its reason, and holds the incumbent until it ends."""
    server = serve(copyover_server, APPS[kind], **SOON)
    until = tmp_path / "until"
    with (
        Ticker(server.address, f"/events-unsaid?until={until}") as stays,
        Ticker(server.address, f"/events?until={until}") as moves,
    ):
        incumbent = stays.event()
        moves.event()
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 1)
        (kept,) = result.answer["kept"]
        assert "entered again" in kept["reason"]
        status = server.status()
        assert status["connections"]["kept"] == 1
        assert "entered again" in json.dumps(status)
        moves.wait_sent_by_another()
        for _ in range(20):
            assert stays.event() == incumbent
        assert incumbent in server.worker_pids()
        until.touch()
        for client in (stays, moves):
            client.take_the_rest()
        assert wait_alone(server) != incumbent
        stays.wait_served_by(moves.pids[-1])  # its response is over: it is a keep-alive connection like any other


def test_the_whole_application_may_be_said_to_be_resumable(copyover_server: Servers, tmp_path: Path) -> None:
    """--resume stream: an application that keeps to its state and has not heard of us."""
    server = serve(copyover_server, resume=["stream"], **SOON)
    with Ticker(server.address, f"/events-unsaid?until={tmp_path}/until") as client:
        client.event()
        assert server.reload().assert_lossless().moved == 1
        client.wait_sent_by_another()
        (tmp_path / "until").touch()
        client.take_the_rest()


@EVERY_STACK
def test_a_body_of_a_stated_length_goes_on(copyover_server: Servers, tmp_path: Path, http: str, loop: str) -> None:
    """How much is left of it travels: not a byte more or less, and the next request is served."""
    server = serve(copyover_server, http=http, loop=loop)
    with HttpClient(server.address) as client:
        client.send(request(f"/sized?until={tmp_path}/until"))
        assert client.head().headers["content-length"] == "100000"
        body = client.receive(50_000)
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 0)
        (tmp_path / "until").touch()
        body += client.receive(50_000)
        pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
        assert [int(piece[:3]) for piece in pieces] == list(range(100))
        assert len({piece[4:10] for piece in pieces}) == 2
        assert client.get("/who").status == 200


def test_a_stream_to_a_client_of_http_1_0(copyover_server: Servers, tmp_path: Path) -> None:
    """No chunks, no length: its end is the end of the connection, and neither comes too early."""
    server = serve(copyover_server, http="h11")  # httptools makes chunks, which HTTP/1.0 does not know
    until = tmp_path / "until"
    with Client(server.address) as client:
        client.send(f"GET /events?until={until} HTTP/1.0\r\n".encode() + HEAD + b"\r\n")
        while client.line() != b"\r\n":
            continue
        assert client.line() == b"id: 1\n"
        assert server.reload().assert_lossless().moved == 1
        until.touch()
        rest = client.receive(1 << 24)
        ids = [int(found) for found in re.findall(rb"^id: (\d+)$", rest, re.MULTILINE)]
        assert ids == list(range(2, len(ids) + 2))
        assert rest.endswith(b"\n\n")


def test_a_client_that_leaves_is_told_to_the_replacement(copyover_server: Servers, tmp_path: Path) -> None:
    """The application hears of it once, in the worker that serves it by then."""
    server, log = serve(copyover_server), tmp_path / "log"
    with HttpClient(server.address) as client:
        incumbent = client.get("/who").pid
        client.send(request(f"/until-gone?log={log}"))
        client.head()
        assert client.chunk() == b"data: here\n\n"
        assert server.reload().assert_lossless().moved == 1
        wait_alone(server)
        assert lines_of(log) == []
    wait_until(lambda: lines_of(log), "the application to hear of it")
    (told,) = lines_of(log)
    assert told != f"gone {incumbent}"


def test_a_roll_back_brings_streams_back(copyover_server: Servers, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Events that the replacement has sent are not sent again by the incumbent, and none is missing."""
    source = f"import sys\nsys.path.insert(0, {str(pytestconfig.rootpath / 'tests/apps')!r})\nfrom asgi_raw import *\n"
    deployment = Deployment(copyover_server, tmp_path, source)
    server, sick = deployment.server, tmp_path / "sick"
    with Ticker(server.address, f"/events?until={tmp_path}/until") as client:
        incumbent = client.event()
        deployment.deploy("two", source)
        with reloading(server, bake=50, health=f"test ! -e {sick}") as result:
            wait_phase(server, "baking")
            client.wait_sent_by_another()
            sick.touch()
            result().assert_refused()
        client.pids.clear()
        while client.event() != incumbent:
            client.pids.clear()
        (tmp_path / "until").touch()
        client.take_the_rest()
