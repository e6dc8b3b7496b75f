"""HTTP over reloads, with uvicorn: no request lost, none answered twice, on the same connection throughout."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from asgi_servers import (
    BOTH_PARSERS,
    EVERY_STACK,
    PATIENT,
    SOON,
    kill_worker,
    reloading,
    serve,
    wait_alone,
    wait_blocked,
)
from clients import Client
from gates import Gate, lines_of, wait_until
from http_client import HEAD, HttpClient, Response, chunked, request

if TYPE_CHECKING:
    from pathlib import Path

    from copyover.testing import Server, Servers

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def serving_pid(server: Server) -> int:
    """Ask a fresh client's question: who serves?"""
    with HttpClient(server.address) as fresh:
        return fresh.get("/who").pid


# ---- idle


@EVERY_STACK
def test_idle_connections_are_served_by_each_next_generation(copyover_server: Servers, http: str, loop: str) -> None:
    """The same TCP connection, another process; nobody is told to close."""
    server = serve(copyover_server, http=http, loop=loop)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(HttpClient(server.address)) for _ in range(20)]
        pids = []
        for turn in range(4):
            if turn:
                assert server.reload().assert_lossless().moved == 20
            answers = [client.get("/who") for client in clients]
            assert [answer.told["client"] for answer in answers] == [
                list(client.socket.getsockname()) for client in clients
            ]
            (pid,) = {answer.pid for answer in answers}
            pids.append(pid)
        assert len(set(pids)) == 4
        assert all(client.is_quiet() for client in clients)


def test_a_connection_that_has_not_asked_yet_moves(copyover_server: Servers) -> None:
    """A browser's connection in reserve is as good after a reload."""
    server = serve(copyover_server)
    with HttpClient(server.address) as client:
        wait_until(lambda: len(server.connections()) == 1, "the connection to be accepted")
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/who").status == 200


@BOTH_PARSERS
def test_the_keep_alive_timeout_goes_on(copyover_server: Servers, http: str, loop: str) -> None:
    """Who says nothing more is closed after --timeout-keep-alive, also behind a move; a client that asks is not."""
    server = serve(copyover_server, http=http, loop=loop, uvicorn={"timeout_keep_alive": 2})
    with HttpClient(server.address) as idle:
        assert idle.get("/who").status == 200
        assert server.reload().assert_lossless().moved == 1
        assert idle.receive(1) == b""


def test_unix_sockets_too(copyover_server: Servers, tmp_path: Path) -> None:
    """What nginx speaks to on the same host."""
    server = copyover_server("asgi_raw:app", chdir="tests/apps", listen=[f"unix://{tmp_path}/s"])
    with HttpClient(server.path) as client:
        before = client.get("/who").pid
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/who").pid != before


# ---- heads and bodies under way


BODY = b"hello world"
WHOLE = {
    "content-length": request("/digest", method="POST", body=BODY),
    "chunked": request("/digest", method="POST", headers=b"Transfer-Encoding: chunked\r\n")
    + chunked(BODY[:5], BODY[5:]),
}


def assert_digest(answer: Response, body: bytes) -> None:
    assert (answer.status, answer.told["length"]) == (200, len(body))
    assert answer.told["sha256"] == hashlib.sha256(body).hexdigest()


@EVERY_STACK
@pytest.mark.parametrize("framing", WHOLE)
def test_a_request_cut_at_every_byte(copyover_server: Servers, http: str, loop: str, framing: str) -> None:
    """Half a head moves; a request whose body still arrives is answered by who has it, and moves then."""
    whole = WHOLE[framing]
    head = whole.index(b"\r\n\r\n") + 4
    server = serve(copyover_server, http=http, loop=loop, **SOON)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(HttpClient(server.address)) for _ in range(len(whole) + 1)]
        for cut, client in enumerate(clients):
            client.send(whole[:cut])
        assert_digest(clients[-1].response(), BODY)
        result = server.reload().assert_lossless()
        assert result.moved + result.kept == len(clients)
        assert result.kept <= len(whole) - head  # those whose head was whole and whose body was not
        for cut, client in enumerate(clients[:-1]):
            client.send(whole[cut:])
            assert_digest(client.response(), BODY)
        replacement = serving_pid(server)
        for client in clients:
            client.wait_served_by(replacement)
        assert wait_alone(server) == replacement


@BOTH_PARSERS
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_arrives_over_a_reload(
    copyover_server: Servers, http: str, loop: str, *, is_chunked: bool
) -> None:
    """Four megabytes, half of them after the reload."""
    body = random.Random(7).randbytes(4 << 20)
    server = serve(copyover_server, http=http, loop=loop, **SOON)
    if is_chunked:
        pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
        whole = request("/digest", method="POST", headers=b"Transfer-Encoding: chunked\r\n") + chunked(*pieces)
    else:
        whole = request("/digest", method="POST", body=body)
    with HttpClient(server.address) as client:
        client.send(whole[: len(whole) // 2])
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (0, 1)
        assert result.answer["kept"][0]["reason"]
        client.send(whole[len(whole) // 2 :])
        assert_digest(client.response(), body)
        client.wait_served_by(serving_pid(server))


@BOTH_PARSERS
def test_a_client_that_waits_to_be_told_to_continue(copyover_server: Servers, http: str, loop: str) -> None:
    """Whether it was told before the reload, or after it, it is told once."""
    server = serve(copyover_server, http=http, loop=loop, **SOON)
    head = request("/digest", method="POST", headers=b"Expect: 100-continue\r\nContent-Length: 11\r\n")
    with HttpClient(server.address) as told, HttpClient(server.address) as late:
        told.send(head)
        assert told.head().status == 100
        late.send(head[:-10])
        server.reload().assert_lossless()
        late.send(head[-10:])
        assert late.head().status == 100
        for client in (told, late):
            client.send(BODY)
            assert_digest(client.response(), BODY)


@BOTH_PARSERS
def test_head_has_no_body(copyover_server: Servers, http: str, loop: str) -> None:
    """An answer to HEAD leaves the connection ready for the next request, in the next generation."""
    server = serve(copyover_server, http=http, loop=loop)
    with HttpClient(server.address) as client:
        for _ in range(2):
            client.send(request("/who", method="HEAD") + request("/who"))
            assert client.response(has_body=False).headers["content-length"] != "0"
            assert client.response().status == 200
            assert server.reload().assert_lossless().moved == 1


@BOTH_PARSERS
def test_http_1_0_is_answered_and_closed(copyover_server: Servers, http: str, loop: str) -> None:
    """As under uvicorn alone, also where the head came half before and half after the reload."""
    server = serve(copyover_server, http=http, loop=loop)
    whole = b"GET /who HTTP/1.0\r\n" + HEAD + b"\r\n"
    with Client(server.address) as client:
        client.send(whole[:20])
        wait_until(lambda: len(server.connections()) == 1, "the connection to be accepted")
        assert server.reload().assert_lossless().moved == 1
        client.send(whole[20:])
        answer = client.receive(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"}")


@BOTH_PARSERS
def test_a_bad_request_is_refused_as_ever(copyover_server: Servers, http: str, loop: str) -> None:
    """A head that goes wrong behind a move: 400, and closed; its neighbour does not notice."""
    server = serve(copyover_server, http=http, loop=loop)
    with Client(server.address) as bad, HttpClient(server.address) as good:
        bad.send(b"GET / HTTP/1.1\r\nHo")
        assert good.get("/who").status == 200
        assert server.reload().assert_lossless().moved == 2
        bad.send(b" st\x00: x\r\n\r\n")
        assert bad.receive(1 << 16).startswith(b"HTTP/1.1 400 ")
        assert good.get("/who").status == 200


# ---- in flight


@EVERY_STACK
def test_a_request_in_flight_finishes_and_then_its_connection_moves(
    copyover_server: Servers, tmp_path: Path, http: str, loop: str
) -> None:
    """Answered by the incumbent, within the reload; the next request on it is the replacement's."""
    server = serve(copyover_server, http=http, loop=loop, **PATIENT)
    with HttpClient(server.address) as client, Gate(tmp_path / "gate") as gate:
        incumbent = client.get("/who").pid
        client.send(request(f"/count?id=a&log={tmp_path}/log&gate={gate.path}"))
        gate.wait_reached()
        with reloading(server) as result:
            wait_blocked(server)
            gate.open()
            assert client.response().pid == incumbent
            assert result().assert_lossless().moved == 1
        assert client.get("/who").pid == serving_pid(server) != incumbent
    assert lines_of(tmp_path / "log") == ["a"]


@EVERY_STACK
def test_a_request_that_takes_longer_than_any_limit(
    copyover_server: Servers, tmp_path: Path, http: str, loop: str
) -> None:
    """It is kept and counted with its reason; once answered, its connection goes to who serves by then."""
    server = serve(copyover_server, http=http, loop=loop, **SOON)
    with HttpClient(server.address) as client, Gate(tmp_path / "gate") as gate:
        incumbent = client.get("/who").pid
        client.send(request(f"/count?id=a&log={tmp_path}/log&gate={gate.path}"))
        gate.wait_reached()
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (0, 1)
        assert "request" in result.answer["kept"][0]["reason"]
        assert server.status()["connections"]["kept"] == 1
        gate.open()
        assert client.response().pid == incumbent
        client.wait_served_by(serving_pid(server))
        assert wait_alone(server) != incumbent
        assert server.status()["connections"]["kept"] == 0
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/who").status == 200
    assert lines_of(tmp_path / "log") == ["a"]


@EVERY_STACK
@pytest.mark.parametrize("pace", [SOON, PATIENT], ids=["kept", "waited for"])
def test_ten_requests_at_once_of_which_the_first_is_slow(
    copyover_server: Servers, tmp_path: Path, http: str, loop: str, pace: dict[str, Any]
) -> None:
    """Each is answered once and in order, whoever answers it; none before the first."""
    server = serve(copyover_server, http=http, loop=loop, **pace)
    with HttpClient(server.address) as client, Gate(tmp_path / "gate") as gate:
        slow = f"&gate={gate.path}"
        client.send(b"".join(request(f"/count?id={n}&log={tmp_path}/log{'' if n else slow}") for n in range(10)))
        gate.wait_reached()
        with reloading(server) as result:
            if pace is PATIENT:
                wait_blocked(server)
            else:
                result()
            gate.open()
            assert [client.response().told["id"] for _ in range(10)] == [str(n) for n in range(10)]
            result().assert_lossless()
        client.wait_served_by(serving_pid(server))
    assert lines_of(tmp_path / "log") == [str(n) for n in range(10)]


async def hammer(address: tuple[str, int], name: str, log: Path, stop: asyncio.Event) -> list[str]:
    """Send batches of numbered requests on one connection until told to stop; return the ids, in order."""
    chance = random.Random(name)
    ids: list[str] = []
    reader, writer = await asyncio.open_connection(*address)
    while not stop.is_set():
        batch = [f"{name}.{len(ids) + at}" for at in range(chance.randint(1, 4))]
        ids += batch
        data = b"".join(
            request(f"/count?id={id_}&log={log}")
            if chance.random() < 0.5
            else request(f"/digest?id={id_}&log={log}", method="POST", body=BODY)
            for id_ in batch
        )
        cut = chance.randrange(len(data))
        writer.write(data[:cut])
        await asyncio.sleep(0)
        writer.write(data[cut:])
        for id_ in batch:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200 "), head
            assert b"connection: close" not in head
            found = re.search(rb"content-length: (\d+)", head)
            assert found is not None
            body = await reader.readexactly(int(found[1]))
            assert f'"id": "{id_}"'.encode() in body or b'"length": 11' in body
    writer.close()
    await writer.wait_closed()
    return ids


@EVERY_STACK
def test_no_request_is_lost_or_done_twice_under_load(
    copyover_server: Servers, tmp_path: Path, http: str, loop: str
) -> None:
    """Thirty clients, pipelined and cut anywhere, four reloads: the application has seen each request once."""
    server, log = serve(copyover_server, http=http, loop=loop), tmp_path / "log"

    async def run() -> list[str]:
        stop = asyncio.Event()
        clients = [asyncio.ensure_future(hammer(server.address, str(n), log, stop)) for n in range(30)]
        for _ in range(4):
            so_far = len(lines_of(log))
            (await asyncio.to_thread(server.reload)).assert_lossless()
            await asyncio.to_thread(wait_until, lambda: len(lines_of(log)) > so_far + 30, "requests")  # noqa: B023  # waited for
        stop.set()
        return [id_ for ids in await asyncio.gather(*clients) for id_ in ids]

    sent = asyncio.run(run())
    assert Counter(lines_of(log)) == Counter(sent)


# ---- clients that nobody here wrote


@needs_wrk
@BOTH_PARSERS
def test_wrk_sees_no_error_during_three_reloads(copyover_server: Servers, http: str, loop: str) -> None:
    """64 keep-alive connections as fast as they can: no socket error, nothing but 200."""
    server = serve(copyover_server, http=http, loop=loop)
    host, port = server.address
    command = ["wrk", "--threads", "2", "--connections", "64", "--duration", "120s", f"http://{host}:{port}/who"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
        wait_until(lambda: len(server.connections()) >= 64, "wrk to connect")
        for _ in range(3):
            result = server.reload().assert_lossless()
            assert result.moved + result.kept >= 64
        assert wrk.poll() is None
        wrk.send_signal(signal.SIGINT)  # it stops, and says what it saw
        told, _ = wrk.communicate()
    assert re.search(r"\d+ requests in", told), told
    assert "Socket errors" not in told, told
    assert "Non-2xx" not in told, told


def curl(*arguments: str | Path) -> subprocess.Popen[str]:
    written = "\n%{http_code} %{num_connects} %{local_port}\n"
    return subprocess.Popen(
        ["curl", "--silent", "--show-error", "--max-time", "60", "--write-out", written, *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


@needs_curl
@BOTH_PARSERS
def test_curl_keeps_its_connection_over_a_request_in_flight(
    copyover_server: Servers, tmp_path: Path, http: str, loop: str
) -> None:
    """The second address is fetched over the connection of the first, which the reload has outrun."""
    server = serve(copyover_server, http=http, loop=loop, **SOON)
    url = "http://{}:{}".format(*server.address)
    path = f"/count?id=1&log={tmp_path}/log&gate={tmp_path}/gate"
    with Gate(tmp_path / "gate") as gate, curl(url + path, f"{url}/who") as client:
        gate.wait_reached()
        server.reload().assert_lossless()
        gate.open()
        told, _ = client.communicate()
    first, second = re.findall(r"^(\d+) (\d+) (\d+)$", told, re.MULTILINE)
    assert (first[:2], second[:2]) == (("200", "1"), ("200", "0"))
    assert first[2] == second[2]


@needs_curl
@BOTH_PARSERS
def test_curl_finds_its_idle_connection_again(copyover_server: Servers, tmp_path: Path, http: str, loop: str) -> None:
    """It waits for a file to upload, idle, while the server is replaced; then it uploads over the same connection."""
    server = serve(copyover_server, http=http, loop=loop)
    url, fifo = "http://{}:{}".format(*server.address), tmp_path / "upload"
    os.mkfifo(fifo)
    options = ("--silent", "--show-error", "--write-out", "\n%{http_code} %{num_connects} %{local_port}\n")
    first_url = f"{url}/count?id=1&log={tmp_path}/log"
    with curl(first_url, "--next", *options, "--upload-file", fifo, f"{url}/digest") as client:
        wait_until(lambda: lines_of(tmp_path / "log"), "the first request")
        assert server.reload().assert_lossless().moved == 1
        fifo.write_bytes(BODY)  # curl begins its second request once there is a file
        told, _ = client.communicate()
    first, second = re.findall(r"^(\d+) (\d+) (\d+)$", told, re.MULTILINE)
    assert (first[:2], second[:2]) == (("200", "1"), ("200", "0")), told
    assert first[2] == second[2]
    assert '"length": 11' in told


# ---- deaths


@BOTH_PARSERS
def test_kill_9_of_a_worker_costs_idle_connections_nothing(copyover_server: Servers, http: str, loop: str) -> None:
    """They live on, exactly, also with half a head on its way; twice in a row, and over a reload."""
    server = serve(copyover_server, http=http, loop=loop)
    whole = request("/who")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(HttpClient(server.address)) for _ in range(12)]
        for turn in range(3):
            for at, client in enumerate(clients):
                assert client.get("/who").status == 200
                client.send(whole[: 3 * at])
            if turn < 2:
                kill_worker(server)
            else:
                server.reload().assert_lossless()
            for at, client in enumerate(clients):
                client.send(whole[3 * at :])
                assert client.response().status == 200
        assert server.status()["counters"].get("lost", 0) == 0


def test_kill_9_of_a_worker_costs_idle_connections_on_a_unix_socket_nothing(
    copyover_server: Servers, tmp_path: Path
) -> None:
    """The kernel counts no bytes there: a mark in the slot tells that the socket was used, and is taken away again."""
    server = copyover_server("asgi_raw:app", chdir="tests/apps", listen=[f"unix://{tmp_path}/s"])
    with HttpClient(server.path) as client:
        for _ in range(3):
            before = client.get("/who").pid
            kill_worker(server)
            assert client.get("/who").pid != before
        assert server.status()["counters"].get("lost", 0) == 0


def test_kill_9_of_a_worker_resets_a_request_that_it_had_begun(copyover_server: Servers, tmp_path: Path) -> None:
    """Whether it was done nobody knows: the client is told at once, and nothing is done twice."""
    server = serve(copyover_server)
    with HttpClient(server.address) as busy, HttpClient(server.address) as idle, Gate(tmp_path / "gate") as gate:
        assert idle.get("/who").status == 200
        busy.send(request(f"/count?id=a&log={tmp_path}/log&gate={gate.path}"))
        gate.wait_reached()
        kill_worker(server)
        with pytest.raises(ConnectionResetError):
            busy.receive(1)
        assert idle.get("/who").status == 200
        assert server.status()["counters"]["lost"] == 1
    assert lines_of(tmp_path / "log") == ["a"]


def test_kill_9_of_a_worker_does_no_pipelined_request_twice(copyover_server: Servers, tmp_path: Path) -> None:
    """The second came with the first, so the kernel has seen nothing since the boundary between them."""
    server = serve(copyover_server)
    with HttpClient(server.address) as busy, Gate(tmp_path / "gate") as gate:
        busy.send(request("/who") + request(f"/count?id=a&log={tmp_path}/log&gate={gate.path}"))
        assert busy.response().status == 200
        gate.wait_reached()
        kill_worker(server)
        with pytest.raises(ConnectionResetError):
            busy.receive(1)
        assert server.status()["counters"]["lost"] == 1
    assert lines_of(tmp_path / "log") == ["a"]
