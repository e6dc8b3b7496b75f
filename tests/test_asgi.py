"""What an ASGI application says to copyover, and that it says nothing to any other server."""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket  # noqa: TC002  # FastAPI looks for it

from copyover import asgi
from copyover.adapters.visit import Visit, greet, is_of, know
from copyover.errors import CopyoverError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _nothing_said() -> Iterator[None]:
    """Keep what a test registers out of the next."""
    routes, shares = dict(asgi.routes), list(asgi.shares)
    asgi.routes.clear()
    asgi.shares.clear()
    yield
    asgi.routes.clear()
    asgi.routes.update(routes)
    asgi.shares[:] = shares


def call(app: Any, *arguments: Any) -> Any:
    async def whole() -> Any:
        return await app(*arguments)

    return asyncio.run(whole())


def call_here(app: Any, *arguments: Any, visit: Visit | None = None, extension: Any = None) -> tuple[Visit, Any]:
    """Call *app* as copyover does."""
    visit = visit or Visit()
    extension = extension or visit.extension()

    async def whole() -> Any:
        scope = arguments[0] if arguments and isinstance(arguments[0], dict) else {}
        greet(scope, extension)
        know(extension)
        return await app(*arguments)

    return visit, asyncio.run(whole())


async def nothing(*_: Any) -> Any:
    """Receive or send nothing."""


# ---- of one connection


def test_a_connection_says_so() -> None:
    """It gets its state, which travels; how its state was written is found in the replacement."""

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        asgi.resumable(scope, version=3)["seen"] = 1
        assert asgi.state(scope) == {"seen": 1}
        assert not asgi.resumed(scope)

    visit = Visit()
    extension = visit.extension()
    call_here(app, {"type": "websocket"}, nothing, nothing, visit=visit, extension=extension)
    assert visit.is_resumable
    assert (visit.name, visit.version) == ("", 3)
    assert visit.state_bytes(extension) == b'{"seen":1}'


def test_one_that_says_nothing_is_not_resumable() -> None:
    """To look is not to say."""

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        asgi.state(scope)["seen"] = 1
        asgi.resumed(scope)

    visit, _ = call_here(app, {"type": "websocket"}, nothing, nothing)
    assert not visit.is_resumable


def test_one_that_was_here_before() -> None:
    """It finds its state, and the version that it was written with."""
    visit, extension = Visit.again({"seen": 7}, name="a.b", version=2)
    found: list[Any] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        found.extend([asgi.resumed(scope), dict(asgi.state(scope)), scope["extensions"]["copyover"]["version"]])

    call_here(app, {"extensions": {"tls": {}}}, nothing, nothing, visit=visit, extension=extension)
    assert found == [True, {"seen": 7}, 2]


def test_without_copyover_a_state_is_there() -> None:
    """It is the same one each time it is asked for, and the other extensions stay."""
    scope: dict[str, Any] = {"type": "http", "extensions": {"tls": {}}}
    assert asgi.resumable(scope) == {}
    assert not asgi.resumed(scope)
    asgi.state(scope)["seen"] = 1
    assert asgi.resumable(scope, version=2) == {"seen": 1}
    assert scope["extensions"] == {"tls": {}, "copyover": {"state": {"seen": 1}, "resumed": False}}


@pytest.mark.parametrize("wrong", ["websocket", 7, object()])
def test_what_is_no_scope(wrong: object) -> None:
    """Whoever passes something else is told what is needed."""
    for function in (asgi.state, asgi.resumed, asgi.resumable):
        with pytest.raises(TypeError, match=f"an ASGI scope is needed.*this is {type(wrong).__name__}"):
            function(wrong)


def test_a_request_or_websocket_will_do() -> None:
    """Starlette's own objects have a scope."""
    scope = {"type": "http", "headers": []}
    request = Request(scope)
    asgi.resumable(request)["seen"] = 1
    assert asgi.state(request) == asgi.state(scope) == {"seen": 1}


# ---- of a route: how it is registered


def test_how_a_route_is_found_again() -> None:
    """By module and name, or by the name that it gives; it reads its own version, and those that it says."""

    @asgi.resumable()
    async def plain(scope: Any, receive: Any, send: Any) -> None: ...

    @asgi.resumable(version=3, reads=[1, 2])
    async def reading(scope: Any, receive: Any, send: Any) -> None: ...

    @asgi.resumable(version=2, name="the chat")
    async def named(scope: Any, receive: Any, send: Any) -> None: ...

    here = f"{__name__}.test_how_a_route_is_found_again.<locals>"
    assert asgi.routes == {
        f"{here}.plain": asgi.Route(1, frozenset({1})),
        f"{here}.reading": asgi.Route(3, frozenset({1, 2, 3})),
        "the chat": asgi.Route(2, frozenset({2})),
    }


def test_an_object_is_found_by_its_class() -> None:
    """An instance has no name of its own."""

    class App:
        async def __call__(self, _scope: Any, _receive: Any, _send: Any) -> str:
            return "served"

    served = asgi.resumable(version=2)(App())
    visit, answer = call_here(served, {}, nothing, nothing)
    assert answer == "served"
    assert (visit.is_resumable, visit.version) == (True, 2)
    assert list(asgi.routes) == [visit.name] == [f"{App.__module__}.{App.__qualname__}"]


def test_an_object_may_have_a_name() -> None:
    """Two instances of one class are told apart by it."""

    class App:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    first, second = asgi.resumable(name="first")(App()), asgi.resumable(name="second")(App())
    assert call_here(first, {}, nothing, nothing)[0].name == "first"
    assert call_here(second, {}, nothing, nothing)[0].name == "second"


# ---- of a route: that it says so when it is entered


def raw() -> tuple[Any, tuple[Any, ...]]:
    @asgi.resumable(name="route", version=2)
    async def app(scope: Any, _receive: Any, _send: Any) -> str:
        return str(asgi.state(scope))

    return app, ({}, nothing, nothing)


def awaited_endpoint() -> tuple[Any, tuple[Any, ...]]:
    @asgi.resumable(name="route", version=2)
    async def endpoint(request: Request) -> str:
        return str(asgi.state(request))

    return endpoint, (Request({"type": "http", "headers": []}),)


def method() -> tuple[Any, tuple[Any, ...]]:
    class App:
        async def serve(self, scope: Any, _receive: Any, _send: Any) -> str:
            return str(asgi.state(scope))

    return asgi.resumable(name="route", version=2)(App().serve), ({}, nothing, nothing)


def partial() -> tuple[Any, tuple[Any, ...]]:
    async def app(said: str, scope: Any, _receive: Any, _send: Any) -> str:
        return said + str(asgi.state(scope))

    return asgi.resumable(name="route", version=2)(functools.partial(app, "")), ({}, nothing, nothing)


@pytest.mark.parametrize("make", [raw, awaited_endpoint, method, partial])
def test_a_route_says_so_when_it_is_entered(make: Callable[[], tuple[Any, tuple[Any, ...]]]) -> None:
    """Not when it is defined: only the connection that came to it."""
    route, arguments = make()
    visit, answer = call_here(route, *arguments)
    assert (visit.is_resumable, visit.name, visit.version) == (True, "route", 2)
    assert answer == "{}"
    assert call(route, *make()[1]) == "{}"  # under another server


class Shop:
    """Has endpoints that are methods."""

    def endpoint(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(asgi.state(request)))


def endpoint(request: Request) -> PlainTextResponse:
    return Shop().endpoint(request)


@pytest.mark.parametrize("given", [endpoint, Shop().endpoint, functools.partial(Shop.endpoint, Shop())])
def test_an_endpoint_that_is_no_coroutine(given: Callable[..., Any]) -> None:
    """Starlette runs it in a thread: it says so there, before it begins."""
    endpoint = asgi.resumable(name="route")(given)
    assert not inspect.iscoroutinefunction(endpoint)

    async def in_a_thread() -> Any:
        return await asyncio.to_thread(endpoint, Request({"type": "http", "headers": []}))

    visit, response = call_here(in_a_thread)
    assert visit.is_resumable
    assert response.body == b"{}"


def test_endpoints_that_are_classes() -> None:
    """They stay classes that Starlette knows, and what they are made with is what they serve."""

    @asgi.resumable(name="socket", version=4)
    class Socket(WebSocketEndpoint):
        """Tell what it serves."""

        encoding = "text"

        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            state = asgi.state(websocket)
            state["seen"] = state.get("seen", 0) + 1
            await websocket.send_text(f"{data} {state['seen']}")

    assert inspect.isclass(Socket)
    assert issubclass(Socket, WebSocketEndpoint)
    assert (Socket.__name__, Socket.__module__, Socket.__doc__) == ("Socket", __name__, "Tell what it serves.")
    visit = Visit()

    async def make() -> Any:
        know(visit.extension())
        return Socket({"type": "websocket"}, nothing, nothing)

    made = asyncio.run(make())
    assert isinstance(made, Socket)
    assert (visit.name, visit.version) == ("socket", 4)
    client = TestClient(Starlette(routes=[WebSocketRoute("/", Socket)]))
    with client.websocket_connect("/") as websocket:
        for count in (1, 2):
            websocket.send_text("hello")
            assert websocket.receive_text() == f"hello {count}"


def test_two_visits_at_the_same_time() -> None:
    """Each says so of itself, though they are served by one loop."""

    @asgi.resumable(name="route")
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.sleep(0)

    async def other(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.sleep(0)

    async def serve(visit: Visit, app: Any) -> None:
        scope: dict[str, Any] = {}
        extension = visit.extension()
        greet(scope, extension)
        know(extension)
        await app(scope, nothing, nothing)
        assert is_of(extension)
        assert not is_of(visit.extension())

    async def both() -> tuple[Visit, Visit]:
        first, second = Visit(), Visit()
        await asyncio.gather(serve(first, app), serve(second, other))
        return first, second

    first, second = asyncio.run(both())
    assert (first.is_resumable, second.is_resumable) == (True, False)


# ---- under another server nothing changes


def test_starlette_under_another_server() -> None:
    """Endpoints of each shape are served as they were, and a state is there."""

    @asgi.resumable()
    async def awaited(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"awaited {asgi.state(request)} {asgi.resumed(request)}")

    @asgi.resumable()
    def threaded(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"threaded {asgi.state(request)}")

    @asgi.resumable()
    class Made(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"made {request.scope['extensions']['copyover']['state']}")

    @asgi.resumable()
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(websocket.scope["extensions"]["copyover"])
        await websocket.close()

    app = Starlette(
        routes=[
            Route("/awaited", awaited),
            Route("/threaded", threaded),
            Route("/made", Made),
            WebSocketRoute("/socket", socket),
        ]
    )
    client = TestClient(app)
    assert client.get("/awaited").text == "awaited {} False"
    assert client.get("/threaded").text == "threaded {}"
    assert client.get("/made").text == "made {}"
    with client.websocket_connect("/socket") as websocket:
        assert websocket.receive_json() == {"state": {}, "resumed": False}


def a_user(name: str = "nobody") -> str:
    return name


User = Annotated[str, Depends(a_user)]


def fast() -> FastAPI:
    app = FastAPI()

    @app.get("/items/{item}")
    @asgi.resumable()
    async def item(item: int, user: User, limit: int = 10) -> dict[str, Any]:
        return {"item": item, "user": user, "limit": limit}

    @app.get("/threaded/{item}")
    @asgi.resumable()
    def threaded(item: int, request: Request) -> dict[str, Any]:
        return {"item": item, "state": request.scope["extensions"]["copyover"]["state"]}

    @app.websocket("/socket/{room}")
    @asgi.resumable(version=2)
    async def socket(websocket: WebSocket, room: str, user: User) -> None:
        await websocket.accept()
        await websocket.send_json([room, user, asgi.state(websocket), asgi.resumed(websocket)])
        await websocket.close()

    return app


def test_fastapi_under_another_server() -> None:
    """It reads an endpoint's signature: paths, queries and dependencies are what they were."""
    client = TestClient(fast())
    assert client.get("/items/7?name=ann").json() == {"item": 7, "user": "ann", "limit": 10}
    assert client.get("/items/seven").status_code == 422
    assert client.get("/threaded/7").json() == {"item": 7, "state": {}}
    with client.websocket_connect("/socket/lobby?name=ann") as websocket:
        assert websocket.receive_json() == ["lobby", "ann", {}, False]
    parameters = client.get("/openapi.json").json()["paths"]["/items/{item}"]["get"]["parameters"]
    assert [each["name"] for each in parameters] == ["item", "limit", "name"]


def test_fastapi_under_copyover() -> None:
    """The endpoint says so of the connection that came to it, whatever stands between."""
    app = fast()
    said: list[Any] = []
    visit = Visit()

    async def served(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            extension = visit.extension()
            greet(scope, extension)
            know(extension)
        await app(scope, receive, send)
        said.append((visit.is_resumable, visit.name.rpartition(".")[2], visit.version))

    with TestClient(served).websocket_connect("/socket/lobby") as websocket:
        assert websocket.receive_json() == ["lobby", "nobody", {}, False]
    assert said == [(True, "socket", 2)]


def test_signature_and_name_are_kept() -> None:
    """Whoever reads them finds what was written."""

    async def awaited(item: int, *, limit: int = 3) -> str:
        """Return an item."""
        return f"{item} {limit}"

    def called(item: int) -> str:
        return str(item)

    for function in (awaited, called):
        wrapped = asgi.resumable()(function)
        assert inspect.signature(wrapped) == inspect.signature(function)
        assert (wrapped.__name__, wrapped.__doc__) == (function.__name__, function.__doc__)
        assert inspect.iscoroutinefunction(wrapped) == inspect.iscoroutinefunction(function)


# ---- what the whole application shares


def test_share_once() -> None:
    """One pair of functions carries all of it; a second would be forgotten."""
    imported: list[Any] = []
    asgi.share(lambda: {"rooms": []}, imported.append, version=2, reads=[1])
    (share,) = asgi.shares
    assert share.export() == {"rooms": []}
    assert (share.version, share.reads) == (2, frozenset({1, 2}))
    with pytest.raises(CopyoverError, match=r"copyover\.asgi\.share was called before"):
        asgi.share(dict, imported.append)
    assert asgi.shares == [share]
