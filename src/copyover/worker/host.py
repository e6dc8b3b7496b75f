"""
Who serves the connections of a worker: handlers of our own, or the protocol objects of a server.

It says what the runtime asks of either. It knows no message of the holder.
"""

from __future__ import annotations

import abc
import sys
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from copyover.messages import Act, Kind, Record
    from copyover.worker.served import Served
    from copyover.worker.transport import Transport


class Host(abc.ABC):
    """
    The application, and what serves it.

    The runtime sets the four callables before anything is built: *forward* does something to a connection that has
    moved, *left* is told that nothing is under way any more, *became* that a connection is served as something else,
    *cede* that one may be given up which stayed behind.
    """

    interface: str
    kind: ClassVar[Kind]  # of a fresh connection
    is_json: bool  # its states are JSON, unless the application has its own way
    schema: int
    readable: list[int]
    shares: bool
    enters_at_once: int = sys.maxsize  # how many may be at their top at a time
    slot_bytes: int | None = None  # what a slot takes, unless an operator says; None is what the holder made

    forward: Callable[[int, Act, bytes], bool]
    left: Callable[[], None]
    became: Callable[[Served], None]
    cede: Callable[[Served], None]

    @property
    def is_busy(self) -> bool:
        """Whether something is under way that no connection shows."""
        return False

    @abc.abstractmethod
    async def start(self) -> None:
        """
        Do what has to be done before the first connection.

        Raises:
            StartupFailed: the application says that it cannot.

        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Do what has to be done after the last connection; what the application raises passes."""

    @abc.abstractmethod
    def build(self, transport: Transport, *, cookie: int, listener: str) -> Served:
        """Return the connection of *transport*, paused."""

    @abc.abstractmethod
    def enter(self, served: Served) -> None:
        """Begin to serve what is fresh or restored."""

    @abc.abstractmethod
    def encode_state(self, state: Any) -> bytes:
        """
        Return the state of a connection as bytes.

        Raises:
            CannotFreeze: it would not come out as it went in.

        """

    @abc.abstractmethod
    def decode_state(self, record: Record) -> Any:
        """Return the state that *record* brings; whatever the application's code raises passes."""

    @abc.abstractmethod
    def put_to_sleep(self, served: Served) -> None:
        """Somebody else serves it, or nobody: its coroutines stay suspended, and nothing of it may run again."""

    @abc.abstractmethod
    def forget(self, served: Served) -> None:
        """It has ended."""

    @abc.abstractmethod
    def encode_shared(self) -> bytes | None:
        """Return what the application shares as bytes, None if it has none; what its code raises passes."""

    @abc.abstractmethod
    def decode_shared(self, parts: Iterable[bytes]) -> None:
        """Give the application what its incumbents shared; what its code raises passes."""
