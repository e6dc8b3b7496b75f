"""What an ASGI application meets around its connections: lifespan, factories, its environment, its shared state."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asgi_servers import APPS, SOON, Deployment, serve, wait_alone
from gates import Gate, lines_of, wait_until
from http_client import HttpClient
from websocket_client import WebSocketClient

if TYPE_CHECKING:
    from copyover.testing import Servers

ANSWER = """
import json, os
async def answer(send, **told):
    body = json.dumps({"pid": os.getpid(), **told}).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""

LIFESPAN = (
    ANSWER
    + """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        assert (await receive())["type"] == "lifespan.startup"
STARTUP
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await answer(send, **scope["state"])
"""
)


def starting_with(*lines: str) -> str:
    return LIFESPAN.replace("STARTUP", textwrap.indent("\n".join(lines) or "pass", " " * 8))


# ---- lifespan


def test_a_lifespan_that_fails_is_a_refused_reload(copyover_server: Servers, tmp_path: Path) -> None:
    """With the traceback's last lines; the incumbent serves on, on the same connection."""
    ready = starting_with("scope['state']['ready'] = 'yes'")
    deployment = Deployment(copyover_server, tmp_path, ready, uvicorn={"lifespan": "on"})
    server = deployment.server
    server.expect_errors = True
    with HttpClient(server.address) as client:
        assert client.get("/").told["ready"] == "yes"
        pid = client.get("/").pid
        for startup in (
            "raise ConnectionError('the database is away')",
            "await send({'type': 'lifespan.startup.failed', 'message': 'the database is away'}); return",
        ):
            deployment.deploy(f"broken{len(startup)}", starting_with(startup))
            refused = server.reload().assert_refused()
            assert "the database is away" in "\n".join(refused.answer["stderr_tail"])
            assert "generation 1" in str(refused.error)
            assert client.get("/").pid == pid
        deployment.deploy("mended", starting_with())
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/").pid != pid


def test_a_lifespan_that_hangs_is_a_refused_reload(copyover_server: Servers, tmp_path: Path) -> None:
    """Who is not ready in time is not waited for."""
    deployment = Deployment(copyover_server, tmp_path, starting_with())
    with HttpClient(deployment.server.address) as client:
        pid = client.get("/").pid
        deployment.deploy("hangs", starting_with("import asyncio", "await asyncio.Event().wait()"))
        refused = deployment.server.reload(timeout_s=3).assert_refused()
        assert "was not ready within 3 s" in str(refused.error)
        assert client.get("/").pid == pid


def test_a_first_start_that_fails_says_why(copyover_server: Servers, tmp_path: Path) -> None:
    """Nothing serves, and the reason is the application's own."""
    failing = starting_with("raise ConnectionError('the database is away')")
    with pytest.raises(RuntimeError, match="the database is away"):
        Deployment(copyover_server, tmp_path, failing, uvicorn={"lifespan": "on"})


def test_a_lifespan_of_starlette_that_fails(copyover_server: Servers, tmp_path: Path) -> None:
    """A framework says by itself that its lifespan failed, and sends its traceback along."""
    source = """
import contextlib
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
@contextlib.asynccontextmanager
async def lifespan(app):
    STARTUP
    yield
app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))], lifespan=lifespan)
"""
    deployment = Deployment(copyover_server, tmp_path, source.replace("STARTUP", "pass"))
    deployment.server.expect_errors = True
    with HttpClient(deployment.server.address) as client:
        deployment.deploy("two", source.replace("STARTUP", "raise ConnectionError('the database is away')"))
        refused = deployment.server.reload().assert_refused()
        assert "ConnectionError: the database is away" in "\n".join(refused.answer["stderr_tail"])
        assert "generation 1" in str(refused.error)
        assert client.get("/").body == b"here"


def test_an_application_without_a_lifespan(copyover_server: Servers, tmp_path: Path) -> None:
    """One that knows HTTP only is served, as uvicorn does."""
    source = (
        ANSWER + "async def app(scope, receive, send):\n    assert scope['type'] == 'http'\n    await answer(send)\n"
    )
    server = Deployment(copyover_server, tmp_path, source).server
    with HttpClient(server.address) as client:
        pid = client.get("/").pid
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/").pid != pid


def test_the_lifespan_of_a_generation_that_has_gone_ends(copyover_server: Servers, tmp_path: Path) -> None:
    """Each generation starts, and shuts down once its last connection has ended; none twice."""
    log = tmp_path / "log"
    source = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
def note(line):
    with open({str(log)!r}, "a") as file:
        file.write(f"{{line}}\\n")
""" + starting_with("note('up')").replace(
        "        await receive()\n", "        await receive()\n        note('down')\n"
    )
    server = Deployment(copyover_server, tmp_path, source).server
    with HttpClient(server.address) as client:
        client.get("/")
        server.reload().assert_lossless()
        wait_alone(server)
        assert sorted(lines_of(log)) == ["down", "up", "up"]
    server.stop()
    assert sorted(lines_of(log)) == ["down", "down", "up", "up"]


# ---- how it is made


def test_a_factory_is_called_in_each_generation(copyover_server: Servers) -> None:
    """--factory, as uvicorn has it."""
    server = serve(copyover_server, "asgi_starlette:create_app", uvicorn={"factory": True})
    with HttpClient(server.address) as client:
        pid = client.get("/who").pid
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/who").pid != pid


def test_an_environment_file_is_read_at_each_reload(copyover_server: Servers, tmp_path: Path) -> None:
    """--env-file: before the application is imported; the next generation reads what it says by then."""
    env = tmp_path / "env"
    env.write_text("COPYOVER_TEST_COLOUR=blue\n", encoding="utf-8")
    source = ANSWER + (
        "COLOUR = os.environ['COPYOVER_TEST_COLOUR']\n"
        "async def app(scope, receive, send):\n    assert scope['type'] == 'http'\n"
        "    await answer(send, colour=COLOUR)\n"
    )
    server = Deployment(copyover_server, tmp_path, source, uvicorn={"env_file": str(env)}).server
    with HttpClient(server.address) as client:
        assert client.get("/").told["colour"] == "blue"
        env.write_text("COPYOVER_TEST_COLOUR=green\n", encoding="utf-8")
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/").told["colour"] == "green"


# ---- the shared state


ROOM = (
    ANSWER
    + """
from copyover import asgi
seen = []
def export():
    EXPORT
def import_(shared, *_):
    IMPORT
asgi.share(export, import_, version=VERSION, reads=READS)
async def app(scope, receive, send):
    assert scope["type"] == "http"
    if scope["path"] != "/seen":
        seen.append(scope["path"])
    await answer(send, seen=seen, version=VERSION)
"""
)


def room(version: int, *reads: int, to: str = "return seen", back: str = "seen.extend(shared)") -> str:
    """Return a release whose shared state is what it has seen."""
    return (
        ROOM.replace("VERSION", str(version))
        .replace("READS", repr(reads))
        .replace("EXPORT", to)
        .replace("IMPORT", back)
    )


AS_BYTES = {"to": "return ','.join(seen).encode()", "back": "seen.extend(shared.decode().split(','))"}


@pytest.mark.parametrize("codec", [{}, AS_BYTES], ids=["json", "bytes"])
def test_the_shared_state_travels(copyover_server: Servers, tmp_path: Path, codec: dict[str, str]) -> None:
    """Once a generation, before any connection is served by it."""
    deployment = Deployment(copyover_server, tmp_path, room(1, **codec))
    server = deployment.server
    with HttpClient(server.address) as client:
        client.get("/a")
        for turn in range(3):
            assert server.reload().assert_lossless().moved == 1
            assert client.get(f"/{turn}").told["seen"] == ["/a", *[f"/{n}" for n in range(turn + 1)]]


def test_a_release_reads_the_shared_state_of_the_one_before(copyover_server: Servers, tmp_path: Path) -> None:
    """Version 2 says that it reads 1; what reads neither is refused before anything moves."""
    deployment = Deployment(copyover_server, tmp_path, room(1))
    server = deployment.server
    with HttpClient(server.address) as client:
        client.get("/a")
        deployment.deploy("stranger", room(7))
        refused = server.reload().assert_refused()
        assert "generation 1" in str(refused.error)
        assert "7" in str(refused.error)
        assert client.get("/seen").told == {"pid": client.get("/seen").pid, "seen": ["/a"], "version": 1}
        deployment.deploy("two", room(2, 1))
        server.reload(one_way=True).assert_lossless()
        assert client.get("/b").told["seen"] == ["/a", "/b"]
        assert client.get("/seen").told["version"] == 2


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (room(1, to="raise RuntimeError('the cache is being rebuilt')"), "the cache is being rebuilt"),
        (room(1, to="return {1, 2}"), "set"),
        (room(1, to="return 'x' * 3000000"), "shared"),
    ],
    ids=["raises", "not JSON", "too large"],
)
def test_a_shared_state_that_cannot_be_exported_rolls_back(
    copyover_server: Servers, tmp_path: Path, source: str, reason: str
) -> None:
    """A new generation that has forgotten everything is no upgrade: the incumbent serves on, and it is said why."""
    server = Deployment(copyover_server, tmp_path, source, shared_bytes=1 << 20).server
    server.expect_errors = True
    with HttpClient(server.address) as client:
        pid = client.get("/a").pid
        refused = server.reload().assert_refused()
        assert reason in str(refused.error)
        told = client.get("/b").told
        assert (told["pid"], told["seen"]) == (pid, ["/a", "/b"])


# ---- frameworks


def test_work_behind_an_answer_is_finished(copyover_server: Servers, tmp_path: Path) -> None:
    """A background task of Starlette or FastAPI runs on in the incumbent, which does not go before it is done."""
    for app in ("asgi_starlette:app", "asgi_fastapi:app"):
        server = serve(copyover_server, app, name=app.partition(":")[0], **SOON)
        directory = tmp_path / app
        directory.mkdir()
        with HttpClient(server.address) as client, Gate(directory / "gate") as gate:
            incumbent = client.get(f"/afterwards?gate={gate.path}&log={directory}/log").pid
            gate.wait_reached()
            server.reload().assert_lossless()
            gate.open()
            wait_until(lambda: lines_of(directory / "log"), "the work to be done")  # noqa: B023  # waited for at once
            assert lines_of(directory / "log") == [f"done by {incumbent}"]
            assert wait_alone(server) != incumbent
            client.wait_served_by(server.worker_pids()[0])


def test_fastapi(copyover_server: Servers) -> None:
    """Validation, dependencies, lifespan state, a WebSocket route under the decorator: the same in each generation."""
    server = serve(copyover_server, "asgi_fastapi:app")
    item = json.dumps({"name": "tea", "price": 2.5}).encode()
    as_json = b"Content-Type: application/json\r\n"
    with (
        HttpClient(server.address) as client,
        WebSocketClient(server.address, "/rooms/kitchen?name=anna") as socket,
    ):
        pids = set()
        for turn in range(1, 4):
            told = client.get("/who").told
            assert told["started"] == f"by {told['pid']}"
            pids.add(told["pid"])
            answer = client.get("/items?name=anna", method="POST", body=item, headers=as_json)
            assert (answer.status, answer.told["by"], answer.told["price"]) == (200, "user anna", 2.5)
            answer = client.get("/items", method="POST", body=b'{"name": 1}', headers=as_json)
            assert answer.status == 422
            number, pid, rest = socket.ask_text("hello").split(" ", 2)
            assert (number, int(pid), rest) == (str(turn), told["pid"], "kitchen user anna hello")
            assert server.reload().assert_lossless().moved == 2
        assert len(pids) == 3


def test_starlette_behind_a_middleware(copyover_server: Servers) -> None:
    """BaseHTTPMiddleware does not see a WebSocket, and hides nothing from the decorator."""
    server = serve(copyover_server, "asgi_starlette:behind_middleware")
    with HttpClient(server.address) as client, WebSocketClient(server.address, "/number") as socket:
        for turn in range(1, 4):
            answer = client.get("/who")
            assert answer.headers["x-mark"] == "set"
            number, pid, _ = socket.ask_text("x").split()
            assert (int(number), int(pid)) == (turn, answer.pid)
            assert server.reload().assert_lossless().moved == 2


ROUTE = """
import sys
sys.path.insert(0, APPS)
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from asgi_starlette import talk
from copyover import asgi
@asgi.resumable(VERSION)
async def number(websocket):
    await talk(websocket)
@asgi.resumable()
async def same(websocket):
    await talk(websocket)
app = Starlette(routes=[WebSocketRoute("/number", number), WebSocketRoute("/same", same)])
"""


def route(version: str) -> str:
    return ROUTE.replace("APPS", repr(str(Path.cwd() / APPS))).replace("VERSION", version)


def test_a_route_whose_state_has_another_version(copyover_server: Servers, tmp_path: Path) -> None:
    """What the replacement's route cannot read stays with the incumbent, which serves it on."""
    deployment = Deployment(copyover_server, tmp_path, route("version=1"), **SOON)
    server = deployment.server
    with WebSocketClient(server.address, "/number") as client, WebSocketClient(server.address, "/same") as other:
        first = client.ask_text("x").split()
        assert other.ask_text("x").split() == first
        deployment.deploy("two", route("version=2"))
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 1)
        assert "version" in result.answer["kept"][0]["reason"]
        second = client.ask_text("x").split()
        assert (second[0], second[1]) == ("2", first[1])
        second = other.ask_text("x").split()
        assert second[0] == "2"
        assert second[1] != first[1]


def test_a_route_that_reads_the_version_before(copyover_server: Servers, tmp_path: Path) -> None:
    """It moves: a newer release says which states of older ones it understands."""
    deployment = Deployment(copyover_server, tmp_path, route("version=1"))
    with WebSocketClient(deployment.server.address, "/number") as client:
        first = client.ask_text("x").split()
        deployment.deploy("two", route("version=2, reads=(1,)"))
        assert deployment.server.reload().assert_lossless().moved == 1
        second = client.ask_text("x").split()
        assert second[0] == "2"
        assert second[1] != first[1]


def test_django_with_channels_unmodified(copyover_server: Servers) -> None:
    """Its keep-alive connections move; its WebSockets, of which nobody said anything, stay and go on together."""
    server = serve(copyover_server, "asgi_django:app", **SOON)
    with (
        HttpClient(server.address) as client,
        WebSocketClient(server.address, "/room") as one,
        WebSocketClient(server.address, "/room") as two,
    ):
        answer = client.get("/who", method="POST", body=b"12345")
        assert (answer.status, answer.told["length"]) == (200, 5)
        incumbent = answer.pid
        one.send_text("hello")
        assert one.message() == two.message() == f"{incumbent} hello"
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (1, 2)
        assert client.get("/who").pid != incumbent
        two.send_text("still here")
        assert one.message() == two.message() == f"{incumbent} still here"


def test_django_with_channels_said_to_be_resumable(copyover_server: Servers) -> None:
    """A consumer that joins its group in connect() is in it again after a move."""
    server = serve(copyover_server, "asgi_django:app", resume=["websocket"])
    with WebSocketClient(server.address, "/room") as one, WebSocketClient(server.address, "/room") as two:
        pids = set()
        for turn in range(3):
            one.send_text(f"{turn}")
            said = one.message()
            assert said == two.message()
            pid, text = said.split()
            pids.add(pid)
            assert text == str(turn)
            result = server.reload().assert_lossless()
            assert (result.moved, result.kept) == (2, 0)
        assert len(pids) == 3


OLDER = """
def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


class Asgi2:
    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.mark.parametrize(("interface", "name"), [("wsgi", "wsgi"), ("asgi2", "Asgi2")])
def test_older_interfaces_are_served_where_they_are_named(
    copyover_server: Servers, tmp_path: Path, interface: str, name: str
) -> None:
    """Their kept connections move as any."""
    (tmp_path / "app.py").write_text(OLDER, encoding="utf-8")
    server = serve(copyover_server, f"app:{name}", chdir=str(tmp_path), interface=interface)
    with HttpClient(server.address) as client:
        assert client.get("/").body == b"ok"
        assert server.reload().assert_lossless().moved == 1
        assert client.get("/").body == b"ok"
