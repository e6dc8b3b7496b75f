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

    # What is called for each request goes straight there.
    __slots__ = ("hosted", "is_closing", "write")

    def __init__(self, hosted: Hosted) -> None:
        super().__init__()
        self.hosted = hosted
        self.is_closing = hosted.is_closing  # type: ignore[method-assign]  # a slot, not a method
        self.write = hosted.write  # type: ignore[method-assign]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        sock = self.hosted.transport.socket
        known: dict[str, Callable[[], Any]] = {
            "socket": lambda: sock,
            "peername": sock.getpeername,
            "sockname": sock.getsockname,
        }
        try:
            return known[name]() if name in known else default
        except OSError:  # the client has gone already
            return default

    def close(self) -> None:
        self.hosted.close()

    def abort(self) -> None:
        self.hosted.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.hosted.switch(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        found: asyncio.BaseProtocol = self.hosted.protocol
        return found

    def is_reading(self) -> bool:
        return not self.hosted.is_closing()

    def pause_reading(self) -> None:
        self.hosted.pause_reading()

    def resume_reading(self) -> None:
        self.hosted.resume_reading()

    def get_write_buffer_size(self) -> int:
        return len(self.hosted.transport.output)

    def can_write_eof(self) -> bool:
        return False
