"""
uvicorn's WebSockets: fed whole messages only, frozen while the application waits for the next one.

A frame or a message that is not complete stays in the buffer, so there is no half of one to carry over; control frames
among its fragments are answered at once. What of uvicorn's class is touched beyond asyncio's interface is touched here.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.protocol import OPEN

from copyover.adapters.deflate import Deflate
from copyover.adapters.framing import CLOSE, CONTINUATION, FrameHeader, frame_header
from copyover.adapters.visit import Visit, check_readable, greet, is_of, know
from copyover.messages import Kind
from copyover.worker.adapter import Adapter
from copyover.worker.served import CannotFreeze
from copyover.worker.transport import READ_BYTES

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from websockets.http11 import Request

    from copyover.adapters.uvicorn import Uvicorn
    from copyover.worker.face import Face

# What is touched of uvicorn's protocol objects, and of the websockets connection in them.
PARTS = (
    *(
        "app",
        "close_sent",
        "config",
        "conn",
        "connections",
        "disconnected",
        "handshake_complete",
        "handshake_initiated",
    ),
    *("last_ping_rtt", "pending_ping_payload", "ping_interval", "ping_sent_at", "ping_timeout", "ping_timer"),
    *("pong_timer", "queue", "transport"),
)

_STATE = struct.Struct(">cIII")  # its kind, and the lengths of: what is said of it, the application's state, the head
_KIND = b"w"
_UNSAID = "its application has not said that it can be entered again"


class WebSocket(Adapter, WebSocketsSansIOProtocol):
    kind = Kind.WEBSOCKET

    def __init__(self, host: Uvicorn, **kwargs: Any) -> None:
        WebSocketsSansIOProtocol.__init__(self, **kwargs)
        self._host = host
        self._app = self.app
        self.app = self._enter
        self._visit = Visit()
        self._visit.is_resumable = host.resumes_websockets
        self._extension = self._visit.extension()
        self._head = b""
        self._whole = 0  # bytes of the whole frames of a message that is not
        self._payload = 0  # of these, without their headers
        self._is_raw = False  # fed as it comes: what came is no message that could be waited for
        self._is_parked = False
        self._is_again = False  # its accept was answered elsewhere
        self._gate: asyncio.Future[None] | None = None  # what senders wait for while it is halted
        self._keep_alive: dict[str, Any] = {}  # as it was when it was halted
        self._frozen: bytes | Exception = b""
        self._told = b""  # what is said of it at each boundary, made once

    @property
    def _face(self) -> Face:
        face: Face = self.transport  # type: ignore[assignment]  # we gave it
        return face

    # ---- feeding

    def feed(self, buffer: bytearray) -> bool:
        if not self.handshake_initiated or self._is_raw:
            return self._pass(buffer, len(buffer))
        if not self.handshake_complete:
            return False  # frames that come before the answer wait for it
        header = frame_header(buffer, self._whole, may_compress=bool(self.conn.extensions))
        if header is None:
            return False
        if not self._can_wait_for(header):
            self._is_raw = True
            return self._pass(buffer, len(buffer))
        if len(buffer) < self._whole + header.size_bytes:
            self._face.hosted.transport.want(self._whole + header.size_bytes)
            return False
        return self._feed_frame(buffer, header)

    def _feed_frame(self, buffer: bytearray, header: FrameHeader) -> bool:
        """Answer control frames at once, and wait for the last frame of a message; a close comes after all before."""
        if header.is_control and header.opcode != CLOSE:
            return self._pass(buffer, header.size_bytes, start=self._whole)
        end = self._whole + header.size_bytes
        if header.is_final:
            if header.opcode != CLOSE and not self._is_awaited:
                return False
            self._whole = self._payload = 0
            return self._pass(buffer, end)
        self._whole = end
        self._payload += header.payload_bytes
        self._face.hosted.transport.want(end + READ_BYTES)
        return True

    @property
    def _is_awaited(self) -> bool:
        """Whether a message has a taker; one that came into the queue early would leave no boundary before it."""
        return (self._is_parked and self.queue.empty()) or self._is_closing

    @property
    def _is_closing(self) -> bool:
        return self.close_sent or self.disconnected or self.conn.state is not OPEN

    def wrote(self, _data: bytes | bytearray | memoryview) -> None:
        """Once it is closing nothing waits for the application any more; the client's close may be behind it."""
        if self._is_closing:
            self._face.hosted.settle_soon()

    def _can_wait_for(self, header: FrameHeader) -> bool:
        """Whether its end may be waited for; what the protocol would refuse at once, it gets at once."""
        if not header.is_ordinary or self._payload + header.payload_bytes > self.config.ws_max_size:
            return False
        return header.is_control or (header.opcode == CONTINUATION) == (self._whole > 0)

    def _pass(self, buffer: bytearray, count: int, *, start: int = 0) -> bool:
        piece = bytes(buffer[start : start + count])
        del buffer[start : start + count]
        self.data_received(piece)
        return True

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            self._head += data
        super().data_received(data)

    # ---- the application

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self._is_again:
            return  # what was negotiated is in its state
        self.conn.extensions = [
            Deflate.of(one) if isinstance(one, PerMessageDeflate) else one for one in self.conn.extensions
        ]

    async def _enter(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        visit = self._visit
        greet(scope, self._extension)
        know(self._extension)
        self._host.visits.add(visit)
        try:
            await self._app(scope, receive, send)
        finally:
            self._host.leave(visit)

    async def receive(self) -> Any:
        if self.queue.empty():
            self._is_parked = True
            self._face.hosted.settle()
            if self._face.hosted.transport.input:
                self._face.hosted.settle_soon()  # what waited for the application to wait
        try:
            return await super().receive()
        finally:
            self._is_parked = False

    async def send(self, message: Any) -> None:
        if self._gate is not None:
            await self._wait_at_gate()
        if self._is_again and message["type"] == "websocket.accept":
            self._is_again = False
            return
        await super().send(message)
        if message["type"] == "websocket.accept":
            self._face.hosted.settle_soon()  # frames may have come before the answer

    async def _wait_at_gate(self) -> None:
        """Senders wait until it is known who serves; those of the application's own entry for ever, if it moved."""
        while self._gate is not None:
            try:
                await asyncio.shield(self._gate)
            except ClientDisconnected:
                if is_of(self._extension):
                    await asyncio.get_running_loop().create_future()
                self._host.count_late_send()
                raise

    # ---- freezing

    def can_freeze(self) -> str | None:
        if not self.handshake_complete:
            return "its handshake is under way"
        if self._is_closing:
            return "it is closing"
        if not self._visit.is_resumable:
            return _UNSAID
        if self._is_raw:
            return "what its client sends is no message"
        return None if self._is_parked and self.queue.empty() else "its application is at a message"

    @property
    def is_busy(self) -> bool:
        return self.handshake_complete and not self._is_awaited

    @property
    def obstacle(self) -> str | None:
        return _UNSAID if self.handshake_complete and not self._visit.is_resumable else None

    def halted(self) -> None:
        loop = asyncio.get_running_loop()
        self._gate = loop.create_future()
        self._gate.add_done_callback(_retrieve)
        self._keep_alive = self._alive_state(loop.time())
        self.stop_keepalive()
        try:
            self._frozen = self._state(self._keep_alive)
        except Exception as problem:  # noqa: BLE001  # whatever is wrong with it is said when its record is taken
            self._frozen = problem

    def _alive_state(self, now_s: float) -> dict[str, Any]:
        timer = self.pong_timer or self.ping_timer
        return {
            "ping": None if self.pending_ping_payload is None else self.pending_ping_payload.hex(),
            "age_s": now_s - self.ping_sent_at,
            "rtt_s": self.last_ping_rtt,
            "left_s": None if timer is None else max(timer.when() - now_s, 0.0),
        }

    def going_on(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set_result(None)
        self._live_on(self._keep_alive)

    def _live_on(self, said: dict[str, Any]) -> None:
        """Ping, or wait for the pong, as before."""
        if said["left_s"] is None:
            self.start_keepalive()
            return
        loop = asyncio.get_running_loop()
        self.last_ping_rtt = said["rtt_s"]
        self.ping_sent_at = loop.time() - said["age_s"]
        if said["ping"] is not None and self.ping_timeout is not None:
            self.pending_ping_payload = bytes.fromhex(said["ping"])
            self.pong_timer = loop.call_later(said["left_s"], self.keepalive_timeout)
        elif self.ping_interval:
            self.ping_timer = loop.call_later(said["left_s"], self.send_keepalive_ping)

    def abandon(self) -> None:
        """Somebody else serves it: who still sends here sends to nobody."""
        self.stop_keepalive()
        if self._gate is not None and not self._gate.done():
            self._gate.set_exception(ClientDisconnected())

    def freeze(self) -> bytes:
        if isinstance(self._frozen, Exception):
            raise self._frozen
        return self._frozen

    def snapshot(self) -> bytes:
        # What is left of a timer is of no use once the worker is dead: its successor begins anew.
        return self._state(None)

    def _state(self, keep_alive: dict[str, Any] | None) -> bytes:
        visit = self._visit
        deflate = next((one for one in self.conn.extensions if isinstance(one, Deflate)), None)
        told = self._told
        if keep_alive is not None or not told:
            said = {
                "name": visit.name,
                "version": visit.version,
                "deflate": None if deflate is None else deflate.parameters(),
                "keep_alive": keep_alive,
            }
            told = json.dumps(said).encode()
            self._told = b"" if keep_alive is not None else told
        state = visit.state_bytes(self._extension)
        window = b"" if deflate is None else deflate.window
        return b"".join([_STATE.pack(_KIND, len(told), len(state), len(self._head)), told, state, self._head, window])

    def thaw(self, state: bytes) -> None:
        said, app_state, head, window = _parts(state)
        if self.conn.extensions or self.handshake_initiated:
            raise CannotFreeze("it was thawed twice")
        restored = json.loads(app_state)
        self._visit, self._extension = Visit.again(restored, name=said["name"], version=said["version"])
        self._is_again = True
        self.conn.available_extensions = None  # not to negotiate once more: to make a compressor takes ten microseconds
        self.data_received(head)
        self.conn.send_response(self.response)
        self.conn.data_to_send()  # the client has it
        self.conn.extensions = [] if said["deflate"] is None else [Deflate.again(said["deflate"], window)]
        self.handshake_complete = True
        self._live_on(said["keep_alive"] or {"left_s": None})

    @property
    def visit(self) -> Visit | None:
        return self._visit


def check(state: bytes) -> None:
    """
    See that this release can go on from *state*.

    Raises:
        CannotFreeze: it has no such route, or one that reads other versions.

    """
    said, *_ = _parts(state)
    check_readable(said["name"], said["version"])


def _parts(state: bytes) -> tuple[dict[str, Any], bytes, bytes, bytes]:
    _, said, app_state, head = _STATE.unpack_from(state)
    at = _STATE.size
    parts = []
    for length in (said, app_state, head):
        parts.append(state[at : at + length])
        at += length
    return json.loads(parts[0]), parts[1], parts[2], state[at:]


def _retrieve(gate: asyncio.Future[None]) -> None:
    """Nobody may have waited."""
    if not gate.cancelled():
        gate.exception()
