"""WebSockets over reloads, with uvicorn: no close frame, no handshake, no message lost, repeated or reordered."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from asgi_servers import (
    EVERY_LOOP,
    PATIENT,
    SOON,
    Deployment,
    kill_worker,
    reloading,
    serve,
    wait_alone,
    wait_blocked,
    wait_phase,
)
from clients import DEADLINE_S
from gates import Gate, lines_of, wait_until
from http_client import HttpClient
from websocket_cases import noise, prose
from websocket_client import DEFLATE, Deflater, Frame, Op, WebSocketClient, close_payload, frame

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from copyover.testing import Server, Servers


def pid_in(answer: str) -> int:
    """Return who answered, of an answer of /number."""
    return int(answer.split()[1])


# ---- under load, with clients that nobody here wrote


async def chat(exchange: Callable[[str], Awaitable[str]], name: str, news: asyncio.Event, rounds: list[int]) -> int:
    """Say one thing after another, most of it said before; check number and text of each answer. How many."""
    chance, said, due = random.Random(name), [name], 0
    while not news.is_set():
        text = (
            chance.choice(said) if chance.random() < 0.7 else f"{name} {prose(chance.choice((5, 200, 3000))).decode()}"
        )
        said = [*said[-20:], text]
        due += 1
        number, _, rest = (await exchange(text)).split(" ", 2)
        assert (int(number), rest) == (due, text)
        rounds[int(name)] += 1
    return due


async def reload_under_load(server: Server, rounds: list[int], count: int) -> None:
    """Reload so often; each client gets on between two reloads."""
    for _ in range(count):
        before = list(rounds)
        result = (await asyncio.to_thread(server.reload)).assert_lossless()
        assert (result.moved, result.kept) == (len(rounds), 0)
        get_on = lambda: all(now > then + 1 for now, then in zip(rounds, before, strict=True))  # noqa: E731, B023
        await asyncio.to_thread(wait_until, get_on, "each client to get on")


@EVERY_LOOP
def test_a_hundred_clients_under_load_over_five_reloads(copyover_server: Servers, loop: str) -> None:
    """The library `websockets`, half of them compressing with a window over all messages: it notices nothing."""
    client = pytest.importorskip("websockets.asyncio.client", reason="websockets is not installed")
    server = serve(copyover_server, loop=loop)
    url = "ws://{}:{}/number".format(*server.address)

    async def run() -> None:
        news, rounds = asyncio.Event(), [0] * 100

        async def one(number: int) -> int:
            async with client.connect(url, compression="deflate" if number % 2 else None, ping_interval=None) as socket:

                async def exchange(text: str) -> str:
                    await socket.send(text)
                    return str(await socket.recv())

                return await chat(exchange, str(number), news, rounds)

        chats = [asyncio.ensure_future(one(number)) for number in range(100)]
        await asyncio.to_thread(wait_until, lambda: all(rounds), "each client to connect")
        await reload_under_load(server, rounds, 5)
        news.set()
        assert await asyncio.gather(*chats) == rounds

    asyncio.run(run())


def test_clients_of_aiohttp(copyover_server: Servers) -> None:
    """Another library, compressing."""
    aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    server = serve(copyover_server)
    url = "ws://{}:{}/number".format(*server.address)

    async def run() -> None:
        news, rounds = asyncio.Event(), [0] * 20

        async def one(session: Any, number: int) -> int:
            async with session.ws_connect(url, compress=15 if number % 2 else 0, autoping=True) as socket:

                async def exchange(text: str) -> str:
                    await socket.send_str(text)
                    return str(await socket.receive_str())

                return await chat(exchange, str(number), news, rounds)

        async with aiohttp.ClientSession() as session:
            chats = [asyncio.ensure_future(one(session, number)) for number in range(20)]
            await asyncio.to_thread(wait_until, lambda: all(rounds), "each client to connect")
            await reload_under_load(server, rounds, 3)
            news.set()
            assert await asyncio.gather(*chats) == rounds

    asyncio.run(run())


# ---- what is under way


SIZES = (5, 200, 70_000)  # each needs another form of the length


@EVERY_LOOP
def test_a_frame_cut_at_every_byte_of_its_header(copyover_server: Servers, loop: str) -> None:
    """Cut in the length, in the mask, in the payload: its other half is understood by the replacement."""
    server = serve(copyover_server, loop=loop)
    with contextlib.ExitStack() as stack:
        cut = []
        for size in SIZES:
            data = noise(size)
            whole = frame(Op.BINARY, data)
            header = len(whole) - size
            for at in (*range(1, header + 3), header + size // 2, len(whole) - 1):
                client = stack.enter_context(WebSocketClient(server.address, "/echo"))
                client.send(whole[:at])
                cut.append((client, data, whole[at:]))
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (len(cut), 0)
        for client, data, rest in cut:
            client.send(rest)
            assert client.receive_frame() == Frame(Op.BINARY, data)


@pytest.mark.parametrize("offer", [None, DEFLATE])
def test_fragments_before_and_after(copyover_server: Servers, offer: str | None) -> None:
    """A message in pieces, a reload between any two, one of them within a character, pings between them."""
    text = prose(5000).decode() + "κόσμε" + prose(5000, 2).decode()
    server = serve(copyover_server)
    with WebSocketClient(server.address, "/echo", offer=offer) as client:
        payload = Deflater().message(text.encode()) if offer else text.encode()
        cuts = [0, 100, len(payload) // 2, len(payload) - 3, len(payload)]
        if not offer:
            cuts[2] = len(prose(5000)) + 1  # within the κ
        for at in range(4):
            first = 4 if offer and at == 0 else 0
            piece = payload[cuts[at] : cuts[at + 1]]
            client.send(frame(Op.CONT if at else Op.TEXT, piece, fin=at == 3, rsv=first))
            if at < 3:
                assert server.reload().assert_lossless().moved == 1
                client.send_frame(Op.PING, b"%d" % at)
                assert client.receive_frame() == Frame(Op.PONG, b"%d" % at)
        assert client.receive_frame() == Frame(Op.TEXT, text.encode(), rsv1=bool(offer))


@EVERY_LOOP
def test_compressed_messages_refer_to_what_was_said_before_the_move(copyover_server: Servers, loop: str) -> None:
    """The server remembers the client's last 32 KiB, over each of three reloads; the client reads fresh windows."""
    server, far = serve(copyover_server, loop=loop), noise(30_000)
    with WebSocketClient(server.address, "/echo", offer=DEFLATE) as client:
        deflater = Deflater()
        for turn in range(4):
            packed = deflater.message(far)
            assert (len(packed) < 1000) == (turn > 0)  # it does refer back
            client.send_frame(Op.BINARY, packed, rsv=4)
            assert client.receive_frame() == Frame(Op.BINARY, far, rsv1=True)
            assert server.reload().assert_lossless().moved == 1


def test_a_large_message_cut_by_the_move(copyover_server: Servers) -> None:
    """A megabyte, in a frame of which half has come; and compressed."""
    server, data = serve(copyover_server), noise(1 << 20)
    with (
        WebSocketClient(server.address, "/echo") as plain,
        WebSocketClient(server.address, "/echo", offer=DEFLATE) as packed,
    ):
        whole = {plain: frame(Op.BINARY, data), packed: frame(Op.BINARY, Deflater().message(data), rsv=4)}
        for client, sent in whole.items():
            client.send(sent[: len(sent) // 2])
        assert server.reload().assert_lossless().moved == 2
        for client, sent in whole.items():
            client.send(sent[len(sent) // 2 :])
            assert client.receive_frame() == Frame(Op.BINARY, data, rsv1=client is packed)


def test_megabytes_that_a_slow_reader_has_not_taken(copyover_server: Servers) -> None:
    """What is written and unsent goes along, in the middle of a frame."""
    server, data = serve(copyover_server), noise(8 << 20)
    with WebSocketClient(server.address, "/echo") as client:
        client.send_frame(Op.BINARY, data)
        assert client.receive(2) == b"\x82\x7f"  # the echo has begun, and does not fit the kernel's buffers
        for _ in range(2):
            assert server.reload().assert_lossless().moved == 1
        assert client.receive(8) == len(data).to_bytes(8, "big")
        assert client.receive(len(data)) == data
        client.send_frame(Op.PING, b"still there")
        assert client.receive_frame() == Frame(Op.PONG, b"still there")


@EVERY_LOOP
def test_a_ping_of_the_server_before_and_its_pong_after(copyover_server: Servers, loop: str) -> None:
    """The replacement knows which pong is due, and goes on pinging; nobody is taken for dead."""
    server = serve(copyover_server, loop=loop, uvicorn={"ws_ping_interval": 0.3, "ws_ping_timeout": 3})
    with WebSocketClient(server.address, "/echo") as client:
        for _ in range(3):
            ping = client.receive_frame()
            assert ping is not None
            assert ping.op == Op.PING
            assert server.reload().assert_lossless().moved == 1
            client.send_frame(Op.PONG, ping.payload)
        client.send_frame(Op.TEXT, b"alive")
        came = client.receive_frame()
        while came is not None and came.op == Op.PING:
            client.send_frame(Op.PONG, came.payload)
            came = client.receive_frame()
        assert came == Frame(Op.TEXT, b"alive")


def test_who_does_not_answer_a_ping_is_closed_also_after_a_move(copyover_server: Servers) -> None:
    """The deadline of a pong goes along: 1011, as under uvicorn alone."""
    server = serve(copyover_server, uvicorn={"ws_ping_interval": 0.3, "ws_ping_timeout": 2})
    with WebSocketClient(server.address, "/echo") as client:
        ping = client.receive_frame()
        assert ping is not None
        assert ping.op == Op.PING
        assert server.reload().assert_lossless().moved == 1
        closed = next(came for came in client.frames_until_end() if came.op != Op.PING)
        assert closed.payload[:2] == close_payload(1011)


def test_messages_that_wait_for_a_busy_application(copyover_server: Servers, tmp_path: Path) -> None:
    """Ten messages at once, the first being worked at: it is finished by the incumbent, the others follow in order."""
    server = serve(copyover_server, **PATIENT)
    with Gate(tmp_path / "gate") as gate, WebSocketClient(server.address, f"/busy?gate={gate.path}") as client:
        client.send(b"".join(frame(Op.TEXT, b"%d" % n) for n in range(10)))
        gate.wait_reached()
        with reloading(server) as result:
            wait_blocked(server)
            for number in range(10):  # it moves where it can; each message waits at the gate
                gate.open()
                assert client.message() == str(number)
                if number < 9:
                    gate.wait_reached()
            assert result().assert_lossless().moved == 1


def test_a_handshake_that_is_not_over_yet(copyover_server: Servers, tmp_path: Path) -> None:
    """Who waits to be accepted stays, is accepted, and is served on."""
    server = serve(copyover_server, **SOON)
    with Gate(tmp_path / "gate") as gate:
        client = WebSocketClient(server.address, f"/late-accept?gate={gate.path}", handshake=False)
        with client:
            gate.wait_reached()
            result = server.reload().assert_lossless()
            assert (result.moved, result.kept) == (0, 1)
            gate.open()
            client.shake_hands()
            assert client.ask_text("hello") == "hello"
            server.reload().assert_lossless()
            assert client.ask_text("again") == "again"


# ---- what the application sees


def test_a_move_raises_nothing_into_the_application(copyover_server: Servers, tmp_path: Path) -> None:
    """Its coroutine stays suspended: no disconnect, no finally, until the client closes, and then once."""
    server, log = serve(copyover_server), tmp_path / "log"
    with WebSocketClient(server.address, f"/lives?log={log}") as client:
        for turn in range(3):
            assert client.ask_text(f"{turn}") == f"{turn}"
            assert server.reload().assert_lossless().moved == 1
            wait_alone(server)  # the incumbent has gone, whatever it wanted to do on its way
        assert client.ask_text("3") == "3"
        assert lines_of(log) == ["fresh", *["resumed"] * 3]
        client.send_frame(Op.CLOSE, close_payload(4321, b"bye"))
        assert client.frames_until_end()[0].payload == close_payload(4321, b"bye")
    wait_until(lambda: "finally" in lines_of(log), "the coroutine to end")
    assert lines_of(log)[4:] == ["websocket.disconnect 4321", "finally"]


def test_a_client_that_goes_without_a_word_is_told_to_the_replacement(copyover_server: Servers, tmp_path: Path) -> None:
    """As under uvicorn alone: 1005, and the coroutine ends."""
    server, log = serve(copyover_server), tmp_path / "log"
    with WebSocketClient(server.address, f"/lives?log={log}") as client:
        assert client.ask_text("x") == "x"
        assert server.reload().assert_lossless().moved == 1
    wait_until(lambda: "finally" in lines_of(log), "the coroutine to end")
    assert lines_of(log)[2:] == ["websocket.disconnect 1005", "finally"]
    wait_until(lambda: not server.connections(), "the connection to be forgotten")


def test_the_application_closes_after_a_move(copyover_server: Servers) -> None:
    """Its code and its reason reach the client."""
    server = serve(copyover_server)
    with WebSocketClient(server.address, "/closes") as client:
        assert server.reload().assert_lossless().moved == 1
        client.send_text("x")
        closed = client.receive_frame()
        assert closed == Frame(Op.CLOSE, close_payload(4001, b"enough"))
        client.send_frame(Op.CLOSE, close_payload(4001, b"enough"))
        assert client.receive(1) == b""


def test_the_scope_is_the_same_after_a_move(copyover_server: Servers) -> None:
    """Path, query, headers, client, subprotocols: an application that is entered again sees its handshake."""
    server = serve(copyover_server, uvicorn={"root_path": "/api"})
    headers = "Sec-WebSocket-Protocol: one, two\r\nCookie: who=anna\r\n"
    with WebSocketClient(server.address, "/scope?a=%C3%A4&b=2", headers=headers) as client:
        assert "sec-websocket-protocol: two" in client.answer.lower()
        assert "x-mark: set" in client.answer.lower()
        before = json.loads(client.ask_text("?"))
        assert (before["cookies"], before["query"]) == (["who=anna"], "a=%C3%A4&b=2")
        for _ in range(2):
            assert server.reload().assert_lossless().moved == 1
            assert json.loads(client.ask_text("?")) == before


def test_a_background_send_to_a_connection_that_has_moved(copyover_server: Servers) -> None:
    """It raises what a closed socket would, and the client hears nothing of it."""
    server = serve(copyover_server, **SOON)
    with WebSocketClient(server.address, "/announce") as stays, WebSocketClient(server.address, "/member") as client:
        assert client.ask_text("here") == "here"
        assert stays.ask_text("before") == "1 heard, 0 raised"
        assert client.message() == "before"
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 1)
        assert stays.ask_text("after") == "0 heard, 1 raised"
        assert client.ask_text("hello") == "hello"
        assert client.is_quiet()


def test_a_task_of_its_own_does_not_speak_for_a_connection_that_has_moved(
    copyover_server: Servers, tmp_path: Path
) -> None:
    """Whatever becomes of its send, the client hears the replacement only."""
    server = serve(copyover_server, **SOON)
    with (
        Gate(tmp_path / "gate") as gate,
        WebSocketClient(server.address, "/announce") as stays,
        WebSocketClient(server.address, f"/member?gate={gate.path}") as client,
    ):
        gate.wait_reached()
        assert server.reload().assert_lossless().moved == 1
        gate.open()
        assert stays.ask_text("after") == "0 heard, 1 raised"  # the incumbent's loop has turned since
        assert client.ask_text("hello") == "hello"
        assert client.is_quiet()


def test_the_whole_application_may_be_said_to_be_resumable(copyover_server: Servers) -> None:
    """--resume websocket: an application that knows nothing of us moves; its streams do not."""
    server = serve(copyover_server, resume=["websocket"], **SOON)
    with WebSocketClient(server.address, "/number-unsaid") as client:
        before = client.ask_text("a")
        assert server.reload().assert_lossless().moved == 1
        after = client.ask_text("b")
        assert (before[:2], after[:2]) == ("1 ", "2 ")
        assert pid_in(before) != pid_in(after)


def test_input_waits_while_many_are_entered_slowly(copyover_server: Servers) -> None:
    """With --reenter-rate a thousand authentications do not come at once: each client is served, a little later."""
    server = serve(copyover_server, reenter_rate=40.0)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WebSocketClient(server.address, "/number")) for _ in range(40)]
        for client in clients:
            assert client.ask_text("a").startswith("1 ")
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (40, 0)
        for client in clients:
            client.send_text("b")
        for client in clients:
            assert client.message().startswith("2 ")


# ---- what stays


@EVERY_LOOP
def test_what_nobody_said_is_resumable_stays_and_is_served(copyover_server: Servers, loop: str) -> None:
    """Kept, counted with its reason in the result, in status and in connections; its worker goes when it ends."""
    server = serve(copyover_server, loop=loop, **SOON)
    with (
        WebSocketClient(server.address, "/number-unsaid") as stays,
        WebSocketClient(server.address, "/number") as moves,
    ):
        incumbent = pid_in(stays.ask_text("a"))
        assert pid_in(moves.ask_text("a")) == incumbent
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 1)
        (kept,) = result.answer["kept"]
        assert "entered again" in kept["reason"]
        status = server.status()
        assert status["connections"]["kept"] == 1
        assert "entered again" in json.dumps(status)
        assert sorted((row["generation"], row["kind"]) for row in server.connections()) == [
            (1, "websocket"),
            (2, "websocket"),
        ]
        answer = stays.ask_text("b")
        assert (answer[:2], pid_in(answer)) == ("2 ", incumbent)
        answer = moves.ask_text("b")
        assert answer[:2] == "2 "
        assert pid_in(answer) != incumbent
        assert incumbent in server.worker_pids()
    assert wait_alone(server) != incumbent


def test_what_stays_is_closed_at_the_drain_limit(copyover_server: Servers) -> None:
    """The limit is a limit: ended, and counted as expired."""
    server = serve(copyover_server, drain_timeout_s=0.5, **SOON)
    with WebSocketClient(server.address, "/number-unsaid") as client:
        client.ask_text("a")
        assert server.reload().assert_lossless().kept == 1
        assert client.frames_until_end()
    wait_until(lambda: server.status()["counters"]["expired"] == 1, "it to be counted")


@pytest.mark.parametrize(("wish", "reason"), [("set", "set"), ("large 40000000", "quota")])
def test_a_state_that_cannot_travel_stays_with_its_connection(copyover_server: Servers, wish: str, reason: str) -> None:
    """Not serialisable, or too large: never a state that comes out other than it went in; the log names it."""
    server = serve(copyover_server, **SOON)
    with WebSocketClient(server.address, "/odd-state") as odd, WebSocketClient(server.address, "/odd-state") as even:
        incumbent = int(odd.ask_text(wish).split()[0])
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 1)
        assert reason in result.answer["kept"][0]["reason"]
        assert reason in server.log
        assert int(odd.ask_text("x").split()[0]) == incumbent
        assert int(even.ask_text("x").split()[0]) != incumbent


# ---- deaths and ways back


@EVERY_LOOP
def test_kill_9_of_a_worker_costs_idle_websockets_nothing(copyover_server: Servers, loop: str) -> None:
    """Exactly: number, half a frame, half a message, and the window of a compressing client."""
    server, data = serve(copyover_server, loop=loop), noise(2000)
    whole = frame(Op.TEXT, b"cut")
    with contextlib.ExitStack() as stack:
        numbered = [stack.enter_context(WebSocketClient(server.address, "/number")) for _ in range(10)]
        packed = [stack.enter_context(WebSocketClient(server.address, "/echo", offer=DEFLATE)) for _ in range(10)]
        pieces = stack.enter_context(WebSocketClient(server.address, "/echo"))
        pieces.send_frame(Op.TEXT, b"one ", fin=False)
        pieces.send_frame(Op.PING, b"taken")
        assert pieces.receive_frame() == Frame(Op.PONG, b"taken")
        deflaters = [Deflater() for _ in packed]
        for turn in range(1, 4):
            for at, client in enumerate(numbered):
                assert client.ask_text("x").startswith(f"{2 * turn - 1} ")
                client.send(whole[:at])
            for client, deflater in zip(packed, deflaters, strict=True):
                client.send_frame(Op.BINARY, deflater.message(data), rsv=4)
                assert client.receive_frame() == Frame(Op.BINARY, data, rsv1=True)
            if turn < 3:
                kill_worker(server)
            else:
                server.reload().assert_lossless()
            for at, client in enumerate(numbered):
                client.send(whole[at:])
                assert client.message().startswith(f"{2 * turn} ")
        pieces.send_frame(Op.CONT, b"two")
        assert pieces.receive_frame() == Frame(Op.TEXT, b"one two")
        assert server.status()["counters"].get("lost", 0) == 0


def test_kill_9_of_a_worker_resets_a_message_that_it_was_given_with_the_connection(
    copyover_server: Servers, tmp_path: Path
) -> None:
    """The last of a cut to arrive is given its message as it arrives: it is not lost in silence, nor served twice."""
    server = serve(copyover_server, **PATIENT)
    with Gate(tmp_path / "gate") as gate, WebSocketClient(server.address, f"/busy?gate={gate.path}") as client:
        client.send(frame(Op.TEXT, b"first") + frame(Op.TEXT, b"second"))
        gate.wait_reached()
        with reloading(server) as result:
            wait_phase(server, "moving")
            gate.open()
            assert result().assert_lossless().moved == 1
        assert client.message() == "first"
        gate.wait_reached()
        os.kill(server.worker_pids()[-1], signal.SIGKILL)
        assert client.receive_frame() is None


def test_kill_9_of_a_worker_resets_what_nobody_said_is_resumable(copyover_server: Servers) -> None:
    """Nobody is left waiting for an answer that never comes."""
    server = serve(copyover_server)
    with (
        WebSocketClient(server.address, "/number-unsaid") as unsaid,
        WebSocketClient(server.address, "/number") as said,
    ):
        assert unsaid.ask_text("a").startswith("1 ")
        assert said.ask_text("a").startswith("1 ")
        kill_worker(server)
        with pytest.raises(ConnectionResetError):
            unsaid.receive(1)
        assert said.ask_text("b").startswith("2 ")
        assert server.status()["counters"]["lost"] == 1


RELEASE = """
import sys
sys.path.insert(0, {apps!r})
from asgi_raw import *
RELEASE = {name!r}
"""


def source(name: str) -> str:
    """Return a release that is asgi_raw under another name."""
    return RELEASE.format(apps=os.path.abspath("tests/apps"), name=name)  # noqa: PTH100  # a path for another process


@EVERY_LOOP
@pytest.mark.parametrize("way", ["health", "cancel", "kill"])
def test_a_roll_back_brings_websockets_back_with_every_message(
    copyover_server: Servers, tmp_path: Path, loop: str, way: str
) -> None:
    """What the replacement served meanwhile goes on in the incumbent with its newest state, windows included."""
    deployment = Deployment(copyover_server, tmp_path, source("one"), loop=loop)
    server, sick, data = deployment.server, tmp_path / "sick", noise(2000)
    deflater = Deflater()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WebSocketClient(server.address, "/number")) for _ in range(10)]
        packed = stack.enter_context(WebSocketClient(server.address, "/echo", offer=DEFLATE))

        def check(number: int) -> int:
            packed.send_frame(Op.BINARY, deflater.message(data), rsv=4)
            assert packed.receive_frame() == Frame(Op.BINARY, data, rsv1=True)
            answers = [client.ask_text("x") for client in clients]
            assert {answer.split()[0] for answer in answers} == {str(number)}
            (pid,) = {pid_in(answer) for answer in answers}
            return pid

        incumbent = check(1)
        deployment.deploy("two", source("two"))
        with reloading(server, bake=50, health=f"test ! -e {sick}") as result:
            wait_phase(server, "baking")
            replacement = check(2)
            assert replacement != incumbent
            late = stack.enter_context(WebSocketClient(server.address, "/number"))
            assert late.ask_text("x").startswith("1 ")
            if way == "kill":
                with HttpClient(server.address) as other:  # its loop turns, and so all have come to their boundary
                    assert other.get("/who").pid == replacement
                wait_until(lambda: len(server.connections()) == 12, "the visitor to have gone")
                os.kill(replacement, signal.SIGKILL)
            elif way == "health":
                sick.touch()
            else:
                assert server.command("cancel", "--json").exit_code == 0
            result().assert_refused()
        assert check(3) == incumbent
        assert late.ask_text("x").startswith("2 ")
        server.reload().assert_lossless()
        assert check(4) != incumbent


def test_who_goes_in_the_middle_of_a_frame_is_gone(copyover_server: Servers) -> None:
    """Also where nobody said that the application can be entered again: nothing waits for the rest of it."""
    server = serve(copyover_server)
    with WebSocketClient(server.address, "/echo-unsaid") as client:
        assert client.ask_text("x") == "x"
        client.send(b"\x81\xfe\x00")
    wait_until(lambda: server.status()["connections"]["live"] == 0, "the connection to end")


def test_a_client_that_never_stops_talking_moves(copyover_server: Servers) -> None:
    """With messages always on their way there is no silence, and still a boundary between two of them."""
    server = serve(copyover_server, **PATIENT)
    stop = threading.Event()
    with WebSocketClient(server.address, "/number") as client:
        for _ in range(8):
            client.send_text("x")

        def talk() -> list[str]:
            answers = []
            while not stop.is_set():
                answers.append(client.message())
                client.send_text("x")
            return answers

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            talking = pool.submit(talk)
            for _ in range(3):
                assert server.reload().assert_lossless().moved == 1
            stop.set()
            answers = talking.result(DEADLINE_S)
    assert [int(answer.split()[0]) for answer in answers] == list(range(1, len(answers) + 1))
    assert len({pid_in(answer) for answer in answers}) >= 3
