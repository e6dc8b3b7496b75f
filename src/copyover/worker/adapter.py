"""
What a server's protocol object must be able to do, to be served across reloads.

It says what is asked; how a protocol does it is told in its own room.
"""

from __future__ import annotations

import abc
import asyncio
from typing import Any

from copyover.messages import Kind
from copyover.worker.served import CannotFreeze


class Adapter(abc.ABC):
    """What a protocol object must be able to do, to be served across reloads."""

    kind: Kind

    @abc.abstractmethod
    def feed(self, buffer: bytearray) -> bool:
        """
        Take whole pieces off the front of *buffer*; False if it has to wait, for more bytes or for its application.

        What is left in the buffer travels as it is: a head, a frame or a message that is not complete is left there.
        """

    @abc.abstractmethod
    def can_freeze(self) -> str | None:
        """Return why it cannot be frozen now, None if it can."""

    @abc.abstractmethod
    def freeze(self) -> bytes:
        """
        Return what its successor needs beside the unread bytes.

        Raises:
            CannotFreeze: it would not come out as it went in.

        """

    @abc.abstractmethod
    def thaw(self, state: bytes) -> None:
        """Become what *state* says; called once, right after ``connection_made``."""

    @property
    def obstacle(self) -> str | None:
        """Why it will not be able to freeze soon; None if it may."""
        return None

    @property
    def is_busy(self) -> bool:
        """Whether input may be waiting for its application, and not for more bytes: then it is at no boundary."""
        return False

    def snapshot(self) -> bytes:
        """Return what ``freeze`` would, for the slot: at each boundary, so it had better be cheap."""
        return self.freeze()

    def halted(self) -> None:
        """Let no timer fire from here on."""

    def going_on(self) -> None:
        """Go on after ``halted``, where it was."""

    def asked(self) -> None:
        """Say ``settle`` to the connection once it can freeze: a halt was asked for, and it could not."""

    def abandon(self) -> None:
        """Be no more, quietly: somebody else serves it by now."""

    def wrote(self, data: bytes | bytearray | memoryview) -> None:
        """Note what was just written."""

    @property
    def visit(self) -> Any:
        """The entry of the application that will not end here if the connection moves; None if there is none."""
        return None


class Staying(Adapter, asyncio.Protocol):
    """A protocol object that nobody taught to freeze, and that ends where it began."""

    kind = Kind.HTTP

    def __init__(self, protocol: Any, reason: str) -> None:
        self._protocol = protocol
        self._reason = reason

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def feed(self, buffer: bytearray) -> bool:
        piece = bytes(buffer)
        buffer.clear()
        self._protocol.data_received(piece)
        return True

    def can_freeze(self) -> str | None:
        return self._reason

    @property
    def obstacle(self) -> str | None:
        return self._reason

    def freeze(self) -> bytes:
        raise CannotFreeze(self._reason)

    def thaw(self, _state: bytes) -> None:
        raise CannotFreeze(self._reason)

    def shutdown(self) -> None:
        self._protocol.shutdown()
