"""
uvicorn without its server: its configuration, lifespan and protocol classes, on connections of ours.

It accepts nothing and says goodbye to nobody that moves; how connections freeze is told in http and websocket.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import logging
from typing import TYPE_CHECKING, Any

from copyover import asgi
from copyover.adapters import versions
from copyover.errors import StartupFailed
from copyover.messages import Kind, Record, RecordFlag
from copyover.worker.adapter import Staying
from copyover.worker.application import json_bytes
from copyover.worker.host import Host
from copyover.worker.hosted import Hosted
from copyover.worker.outbox import Outbox
from copyover.worker.served import CannotFreeze, Limits, Served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import uvicorn

    from copyover.adapters.visit import Visit
    from copyover.worker.application import Asgi
    from copyover.worker.transport import Transport

log = logging.getLogger("copyover.worker")

SCHEMA = 0xA501  # of the states that this adapter writes, whatever the application's own is
ENTERED_AT_ONCE = 64
SLOT_BYTES = 16 << 10  # a half holds a compression window of 4 KiB, the request's head and a state
SHARED_BYTES = 64 << 20
_TICK_S = 1.0  # uvicorn's Date header is as old as that
_JSON, _BYTES = b"j", b"b"


class Uvicorn(Host):
    """An ASGI application and the server that serves it."""

    kind = Kind.HTTP
    is_json = False
    schema = SCHEMA
    enters_at_once = ENTERED_AT_ONCE
    slot_bytes = SLOT_BYTES

    def __init__(
        self, loop: asyncio.AbstractEventLoop, application: Asgi, limits: Limits, options: dict[str, Any]
    ) -> None:
        versions.require()
        self._loop = loop
        self._outbox = Outbox(loop)
        self._application = application
        self._limits = limits
        self._is_live = options.get("handoff", "live") == "live"
        self.interface = "asgi" if self._is_live else "listeners"
        self._shared_bytes = int(options.get("shared_bytes", SHARED_BYTES))
        resume = options.get("resume", ())
        self.resumes_websockets = "websocket" in resume
        self.resumes_streams = "stream" in resume
        self.readable = [SCHEMA]
        self.shares = bool(asgi.shares)
        self.visits: set[Visit] = set()
        self._asleep: list[Any] = []  # protocols of connections that moved: their coroutines must not be collected
        self._late_sends = 0
        if self._is_live:
            versions.check()
        self._config = self._configure(dict(options.get("uvicorn") or {}))
        self._server: uvicorn.Server
        self._make: Callable[..., Any]
        self._moves_websockets = False
        self._ticking: asyncio.Task[None] | None = None

    # ---- start and stop

    def _configure(self, options: dict[str, Any]) -> uvicorn.Config:
        import uvicorn  # noqa: PLC0415  # it may not be installed

        options.pop("env_file", None)  # it was loaded before the application
        options.pop("factory", None)
        try:
            interface: Any = "auto" if self._application.interface == "asgi" else self._application.interface
            return uvicorn.Config(self._application.app, interface=interface, **options)
        except TypeError as problem:
            raise StartupFailed(f"uvicorn {uvicorn.__version__} does not take these options: {problem}") from problem
        except (ValueError, OSError, KeyError) as problem:  # a file of logging, a level that there is not
            raise StartupFailed(f"uvicorn cannot be configured: {type(problem).__name__}: {problem}") from problem

    async def start(self) -> None:
        import uvicorn  # noqa: PLC0415

        config = self._config
        if self._is_live:
            self._adapt(config)
        try:
            config.load()
        except SystemExit as exited:
            raise StartupFailed("uvicorn could not load the application; what it wrote says why") from exited
        if not self._is_live:
            self._make = config.http_protocol_class
        self._moves_websockets &= config.ws_protocol_class is not None  # WSGI has none
        self._server = uvicorn.Server(config)
        self._check_parts()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.lifespan.startup()
        if self._server.lifespan.should_exit:
            raise StartupFailed("the application's lifespan failed at its start")
        self._ticking = self._loop.create_task(self._tick())
        await asyncio.sleep(0)  # its first turn makes the headers of every response

    def _check_parts(self) -> None:
        """Make one of each, before anything depends on it."""
        if not self._is_live:
            return
        from copyover.adapters import http  # noqa: PLC0415

        given = self._given({})
        versions.check_parts(self._make(**given), http.PARTS)
        if self._moves_websockets:
            from copyover.adapters import websocket  # noqa: PLC0415

            versions.check_parts(self._config.ws_protocol_class(**given), websocket.PARTS)  # type: ignore[misc]

    def _adapt(self, config: uvicorn.Config) -> None:
        """Have our classes serve, in the place of those that they are made of."""
        from copyover.adapters.http import H11  # noqa: PLC0415

        http = config.http
        if http == "auto":
            http = "httptools" if importlib.util.find_spec("httptools") else "h11"
        made: type = H11
        if http == "httptools":
            from copyover.adapters.httptools import HttpTools  # noqa: PLC0415

            made = HttpTools
        elif http != "h11":
            raise StartupFailed(f"connections of uvicorn's http={http} cannot move: say h11, httptools or auto")
        self._make = functools.partial(made, self)
        config.http = made
        if config.ws in ("auto", "websockets-sansio") and importlib.util.find_spec("websockets"):
            from copyover.adapters.websocket import WebSocket  # noqa: PLC0415

            # A callable serves as well as a class: it is only called.
            config.ws = functools.partial(WebSocket, self)  # type: ignore[assignment]
            self._moves_websockets = True

    async def _tick(self) -> None:
        while True:
            await self._server.on_tick(0)
            await asyncio.sleep(_TICK_S)

    async def stop(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        if self._late_sends:
            log.info("event=late-sends count=%d", self._late_sends)
        await self._server.lifespan.shutdown()

    # ---- connections

    def build(self, transport: Transport, *, cookie: int, listener: str) -> Hosted:
        served = Hosted(
            self._loop,
            transport,
            cookie=cookie,
            listener=listener,
            limits=self._limits,
            host=self,
            outbox=self._outbox,
        )
        served.kind = self.kind
        return served

    def enter(self, served: Served) -> None:
        assert isinstance(served, Hosted)
        served.begin(self._protocol_for(served.brought))

    def _protocol_for(self, state: bytes) -> Any:
        given = self._given(self._server.lifespan.state)
        if not self._is_live:
            return Staying(self._make(**given), "the listeners only pass from release to release here (--handoff)")
        if _is_websocket(state):
            return self._config.ws_protocol_class(**given)  # type: ignore[misc]  # it was there for its state
        return self._make(**given)

    def _given(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what uvicorn's protocol classes are called with."""
        server_state = self._server.server_state
        return {"config": self._config, "server_state": server_state, "app_state": state, "_loop": self._loop}

    @property
    def is_busy(self) -> bool:
        return bool(self.visits)

    def leave(self, visit: Visit) -> None:
        """The application has returned."""
        self.visits.discard(visit)
        if not self.visits:
            self.left()

    def count_late_send(self) -> None:
        """Somebody has sent to a WebSocket that has moved."""
        self._late_sends += 1
        if self._late_sends == 1:
            log.warning("event=late-send the application sends to WebSockets that have moved; counted from here on")

    def put_to_sleep(self, served: Served) -> None:
        assert isinstance(served, Hosted)
        protocol = served.protocol
        if protocol is not None:
            protocol.abandon()
            self.visits.discard(protocol.visit)
            self._server.server_state.connections.discard(protocol)
            self._asleep.append(protocol)

    def forget(self, served: Served) -> None:
        """Nothing is noted of it here."""

    # ---- states

    def encode_state(self, state: Any) -> bytes:
        assert isinstance(state, Hosted)
        return state.encode()

    def decode_state(self, record: Record) -> bytes:
        if record.flags & (RecordFlag.FRESH | RecordFlag.FINISHED):
            return b""
        if record.schema != SCHEMA:
            raise CannotFreeze(f"it is of schema {record.schema}, and was no connection of an ASGI application")
        if not self._is_live:
            raise CannotFreeze("this release was started with --handoff listeners, and takes no connections")
        self._check(record.state)
        return record.state

    def _check(self, state: bytes) -> None:
        """See that this release can go on from *state*; CannotFreeze if not."""
        from copyover.adapters import http  # noqa: PLC0415  # a release that reads it has it

        if not _is_websocket(state):
            http.check(state)
        elif not self._moves_websockets:
            raise CannotFreeze("this release serves no WebSockets (--ws none, or websockets is not installed)")
        else:
            from copyover.adapters import websocket  # noqa: PLC0415

            websocket.check(state)

    # ---- what the application shares

    def encode_shared(self) -> bytes | None:
        if not asgi.shares:
            return None
        share = asgi.shares[0]
        exported = share.export()
        encoded = _BYTES + exported if isinstance(exported, bytes) else _JSON + json_bytes(exported, "shared")
        if len(encoded) > self._shared_bytes:
            raise CannotFreeze(f"{len(encoded)} bytes are more than shared_bytes, {self._shared_bytes}")
        return share.version.to_bytes(4, "big") + encoded

    def decode_shared(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            if not asgi.shares:
                raise CannotFreeze("the incumbent shares state, and this release has no copyover.asgi.share")
            share, version = asgi.shares[0], int.from_bytes(part[:4], "big")
            if version not in share.reads:
                reads = ", ".join(map(str, sorted(share.reads)))
                raise CannotFreeze(f"the incumbent shares version {version}, this release reads {reads}")
            share.import_(json.loads(part[5:]) if part[4:5] == _JSON else part[5:])


def _is_websocket(state: bytes) -> bool:
    return state[:1] == b"w"
