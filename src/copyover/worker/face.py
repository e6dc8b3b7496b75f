"""
What a protocol object sees of its connection: an asyncio transport.

It passes everything on, and decides nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.worker.hosted import Hosted


class Face(asyncio.Transport):
    """What a protocol sees of its connection: an asyncio transport."""

    __slots__ = ("_hosted",)

    def __init__(self, hosted: Hosted) -> None:
        super().__init__()
        self._hosted = hosted

    @property
    def hosted(self) -> Hosted:
        return self._hosted

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        sock = self._hosted.transport.socket
        known: dict[str, Callable[[], Any]] = {
            "socket": lambda: sock,
            "peername": sock.getpeername,
            "sockname": sock.getsockname,
        }
        try:
            return known[name]() if name in known else default
        except OSError:  # the client has gone already
            return default

    def is_closing(self) -> bool:
        return self._hosted.is_closing

    def close(self) -> None:
        self._hosted.close()

    def abort(self) -> None:
        self._hosted.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._hosted.switch(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        found: asyncio.BaseProtocol = self._hosted.protocol
        return found

    def is_reading(self) -> bool:
        return not self._hosted.is_closing

    def pause_reading(self) -> None:
        self._hosted.pause_reading()

    def resume_reading(self) -> None:
        self._hosted.resume_reading()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._hosted.write(data)

    def get_write_buffer_size(self) -> int:
        return len(self._hosted.transport.output)

    def can_write_eof(self) -> bool:
        return False
