"""
uvicorn's HTTP connections: fed one request at a time, frozen between two of them.

The next request stays in the buffer until the last one is answered, so a pipelined request is never half served. What
of uvicorn's protocol classes is touched beyond asyncio's interface is touched here.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from copyover import asgi
from copyover.adapters.framing import HEAD_END, LENGTH, Chunks, Response
from copyover.adapters.keep_alive import KeepAlive
from copyover.adapters.visit import Visit, check_readable, greet, know
from copyover.messages import Kind
from copyover.worker.adapter import Adapter
from copyover.worker.transport import READ_BYTES

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from copyover.adapters.uvicorn import Uvicorn
    from copyover.worker.hosted import Hosted

_find_end = HEAD_END.search
_BLANK = b"\r\n"
_IDLE = b"h"  # a state's first byte: between two requests, with what is left of the keep-alive time in seconds
_STREAM = b"s"  # in the middle of a response without end
_QUIET_TURNS = 12  # of the loop: what an application has sent may pass through a few tasks of its middleware

_ANSWERING = "a request is being answered"
_BEHIND = "its client does not read what it is sent, and its application waits for that in send()"
_SENDING = "its application may be sending"
_HTTP = Kind.HTTP  # a member of an enum costs as much as a call to look up, before Python 3.12

# What is touched of uvicorn's protocol objects.
PARTS = ("app", "connections", "cycle", "flow", "limit_concurrency", "loop", "timeout_keep_alive_task", "transport")

Message = Any


class Flow(FlowControl):
    """uvicorn's, which tells how many *waiting* there are inside of send until the client has read."""

    def __init__(self, transport: Any) -> None:
        super().__init__(transport)
        self.waiting = 0

    async def drain(self) -> None:
        self.waiting += 1
        try:
            await super().drain()
        finally:
            self.waiting -= 1


class Http(Adapter):
    """What both of uvicorn's HTTP protocols have in common here; mixed into each of them."""

    # Apart from what the protocols have: with more than thirty attributes beside them Python before 3.13 gives each
    # object a dict of its own, and finds nothing in it as fast.
    __slots__ = (
        "_app",
        "_body",
        "_extension",
        "_frozen",
        "_head",
        "_host",
        "_hosted",
        "_is_quiet",
        "_keep_alive_s",
        "_quiet_state",
        "_quiet_turns",
        "_response_head",
        "_response_read",
        "_returning",
        "_seen",
        "_sent_bytes",
        "_turning",
        "_visit",
    )

    kind = Kind.HTTP

    if TYPE_CHECKING:  # what the protocols have
        app: Any
        cycle: Any
        flow: Any
        limit_concurrency: int | None
        loop: Any
        transport: Any
        timeout_keep_alive_task: Any

        def data_received(self, data: bytes) -> None: ...
        def timeout_keep_alive_handler(self) -> None: ...

    def _begin(self, host: Uvicorn) -> None:
        self._host = host
        self._hosted: Hosted
        self.loop = KeepAlive(self.loop)
        self._app = self.app
        self.app = self._enter
        self._visit: Visit | None = None
        self._extension: dict[str, Any] = {}  # of that visit
        self._returning: tuple[Visit, dict[str, Any], dict[str, Any]] | None = None
        self._seen = 0  # bytes of an incomplete head that the parser has
        self._body: int | Chunks = 0  # what is to come of the body
        self._head = b""  # of the request under way
        self._response_head: bytes | bytearray | memoryview | None = None
        self._response_read: Response | None = None  # that head, once somebody asked
        self._sent_bytes = 0  # of its body, in the framing that its head told
        self._keep_alive_s: float | None = None
        self._frozen: bytes | Exception = b""
        self._quiet_turns = 0
        self._turning: asyncio.Handle | None = None
        self._is_quiet = False
        self._quiet_state: bytes | str | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)  # type: ignore[misc]  # of the protocol
        self.flow = Flow(transport)
        self._hosted = transport.hosted

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # type: ignore[misc]  # of the protocol
        self.loop.stop()

    # ---- feeding

    def feed(self, buffer: bytearray) -> bool:
        if self._body:
            return self._feed_body(buffer)
        before, seen = self.cycle, self._seen
        if before is not None and not before.response_complete:
            return False
        found = _find_end(buffer, seen - 2)  # from the first, if that is negative
        stop = len(buffer) if found is None else found.end()
        if stop == seen:
            return False
        head = bytes(buffer) if stop == len(buffer) else bytes(buffer[:stop])
        self._seen = stop
        self.data_received(head[seen:])
        if self.cycle is not before:
            self._drop(buffer, stop)
            self._head = head
            self._visit = self._response_head = self._response_read = None
            if self.cycle.more_body:
                self._body = _body_of(self.cycle.scope["headers"])
        elif self._hosted.is_closing() or self._hosted.protocol is not self or not head.strip(_BLANK):
            self._drop(buffer, stop)
        elif found is None:
            self._hosted.transport.want(stop + READ_BYTES)
        return found is not None

    @property
    def is_busy(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _drop(self, buffer: bytearray, count: int) -> None:
        del buffer[:count]
        self._seen = 0

    def _feed_body(self, buffer: bytearray) -> bool:
        if isinstance(self._body, Chunks):
            count = self._body.take(buffer)
        else:
            count = min(self._body, len(buffer))
            self._body -= count
        if not count:
            return False
        piece = bytes(buffer[:count])
        del buffer[:count]
        if isinstance(self._body, Chunks) and self._body.is_over:
            self._body = 0
        self.data_received(piece)
        return True

    # ---- the application

    async def _enter(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        host = self._host
        if self._returning is None:
            visit = Visit()
            if host.resumes_streams:
                visit.is_resumable = True
            extension = visit.extension()
        else:
            (visit, extension, said), self._returning = self._returning, None
            await self._respond_again(said, send)
            send = _without_start(send)
        self._visit, self._extension = visit, extension
        greet(scope, extension)
        if asgi.routes:  # only they ask for it
            know(extension)
        host.visits.add(visit)
        try:
            await self._app(scope, receive, send)
        finally:
            host.leave(visit)

    async def _respond_again(self, said: dict[str, Any], send: Any) -> None:
        """Bring the protocol to where the response was; the client has its head."""
        response = Response(framing=said["framing"], left=said["left"], is_last=said["last"])
        headers = response.headers()
        self.cycle.access_log = False  # it was logged when it began
        self._hosted.mute(is_muted=True)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._hosted.mute(is_muted=False)
        self._response_head = b"\r\n".join(b": ".join(header) for header in headers)
        self._response_read, self._sent_bytes = None, 0
        self._hosted.arrive()

    @property
    def _response(self) -> Response | None:
        """How the response under way goes on after its head; None before it has begun."""
        if self._response_read is None and self._response_head is not None:
            self._response_read = Response.of(bytes(self._response_head))
        return self._response_read

    def answered(self) -> None:
        """The response is complete; the next request may come, or a reload."""
        if self.kind is not _HTTP:
            self._became(_HTTP)
        self._hosted.settle_next()

    def _became(self, kind: Kind) -> None:
        self.kind = kind
        self._hosted.became(kind)

    def wrote(self, data: bytes | bytearray | memoryview) -> None:
        """Note that something of a response is on its way; its head comes first, and alone."""
        visit = self._visit
        if visit is None or not self.cycle.response_started or self.cycle.response_complete:
            return
        if self._response_head is None:
            self._response_head, self._sent_bytes = data, 0
        else:
            self._sent_bytes += len(data)
        if visit.is_resumable and self._why_no_stream() is None:
            self._became(Kind.STREAM)
            self._await_quiet()

    # ---- freezing

    def can_freeze(self) -> str | None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._response_head is None:
                return _ANSWERING
            return self._why_no_stream() or (None if self._is_quiet else _SENDING)
        if self._body:
            return "the rest of a request is still to come"
        return None

    @property
    def obstacle(self) -> str | None:
        response = self._response if self._is_answering and not self._body else None
        if response is None:
            return None
        reason = self._why_no_stream()
        if reason is None:
            return _BEHIND if self.flow.waiting else None
        # What has an end may well be over soon.
        return None if response.framing == LENGTH or self.flow.write_paused else reason

    def _why_no_stream(self) -> str | None:
        """Return why what is under way cannot be gone on with elsewhere."""
        visit, response = self._visit, self._response
        if visit is None or response is None or self.cycle.scope["method"] == "HEAD":
            return _ANSWERING
        # Who speaks for the whole application does not speak for its files.
        if response.framing == LENGTH and not visit.has_said:
            return _ANSWERING
        if not visit.is_resumable:
            return "its response is a stream, and its application has not said that it can be entered again"
        if self.cycle.more_body or _body_of(self.cycle.scope["headers"]):
            return "its response is a stream, and its request has a body, which would have to be read again"
        return None

    def asked(self) -> None:
        if self._is_answering and self._why_no_stream() is None:
            self._await_quiet()

    def _await_quiet(self) -> None:
        """
        Have a boundary once nothing is on its way any more between the application and us.

        Then its state is what it was, and nothing was sent, for so many turns of the loop that what the state speaks of
        has come through the tasks of any middleware. A turn later the application may have sent again.
        """
        self._quiet_turns = 0
        if self._turning is None:
            self._quiet_state = None
            self._turning = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = None
        if not self._is_answering or self._why_no_stream() is not None:
            return
        self._quiet_turns += 1
        if self._quiet_turns == 1 or self._quiet_turns >= _QUIET_TURNS:
            state = self._state_or_problem()
            if state == self._quiet_state and self._quiet_turns >= _QUIET_TURNS:
                # Inside of send it is before or after its change of the state: who knows.
                self._is_quiet = not self.flow.waiting
                self._hosted.settle()
                self._is_quiet = False
                return
            self._quiet_state, self._quiet_turns = state, 1
        self._turning = asyncio.get_running_loop().call_soon(self._turn)

    def _state_or_problem(self) -> bytes | str:
        """Return the application's state, or what is wrong with it: that is said once its record is to be taken."""
        assert self._visit is not None
        try:
            return self._visit.state_bytes(self._extension)
        except Exception as problem:  # noqa: BLE001  # whatever its types raise
            return str(problem)

    def halted(self) -> None:
        self._keep_alive_s = self.loop.left_s
        self.loop.stop()
        self.timeout_keep_alive_task = None
        if self._is_answering:
            try:
                self._frozen = self._stream_state()
            except Exception as problem:  # noqa: BLE001  # whatever is wrong with it is said when its record is taken
                self._frozen = problem
            self.flow.pause_writing()

    def _stream_state(self) -> bytes:
        """Return where the stream is; what the application's state raises passes."""
        assert self._visit is not None
        assert self._response is not None
        response = self._response
        said = {
            "framing": response.framing,
            "left": response.left - self._sent_bytes,
            "last": response.is_last,
            "name": self._visit.name,
            "version": self._visit.version,
        }
        return b"\n".join([_STREAM + json.dumps(said).encode(), self._visit.state_bytes(self._extension), self._head])

    def going_on(self) -> None:
        if self._keep_alive_s is not None:
            self.timeout_keep_alive_task = self.loop.call_later(self._keep_alive_s, self.timeout_keep_alive_handler)
        if self._is_answering and not self._hosted.is_full:
            self.flow.resume_writing()

    def freeze(self) -> bytes:
        if not self._is_answering:
            return _IDLE if self._keep_alive_s is None else _IDLE + b"%.3f" % self._keep_alive_s
        if isinstance(self._frozen, Exception):
            raise self._frozen
        return self._frozen

    def snapshot(self) -> bytes:
        return self._stream_state() if self._is_answering else _IDLE

    def thaw(self, state: bytes) -> None:
        if state[:1] == _STREAM:
            said, app_state, head = state[1:].split(b"\n", 2)
            told = json.loads(said)
            again = Visit.again(json.loads(app_state), name=told["name"], version=told["version"])
            self._returning = *again, told
            self._became(Kind.STREAM)
            self._head = head
            self.limit_concurrency = None  # it was let in long ago
            self.data_received(head)
        elif state[1:]:
            self._keep_alive_s = float(state[1:])
            self.going_on()

    @property
    def visit(self) -> Visit | None:
        return self._visit if self._is_answering else None


def check(state: bytes) -> None:
    """
    See that this release can go on from *state*.

    Raises:
        CannotFreeze: it has no such route, or one that reads other versions.

    """
    if state[:1] == _STREAM:
        told = json.loads(state[1:].partition(b"\n")[0])
        check_readable(told["name"], told["version"])


def _body_of(headers: list[tuple[bytes, bytes]]) -> int | Chunks:
    """Return what body a request has that says this of it."""
    length = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return Chunks()
        if name == b"content-length" and value.isdigit():
            length = int(value)
    return length


def _without_start(send: Any) -> Any:
    """Swallow the first start of a response."""
    is_begun = False

    async def go_on(message: Message) -> None:
        nonlocal is_begun
        if not is_begun and message["type"] == "http.response.start":
            is_begun = True
            return
        await send(message)

    return go_on


class H11(Http, H11Protocol):
    """``--http h11``"""

    def __init__(self, host: Uvicorn, **kwargs: Any) -> None:
        H11Protocol.__init__(self, **kwargs)
        self._begin(host)

    def on_response_complete(self) -> None:
        H11Protocol.on_response_complete(self)
        self.answered()
