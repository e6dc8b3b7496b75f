"""
One entry of an ASGI application: for one request, or for one WebSocket.

It holds what the application says of itself; nobody but the application decides that it can be entered again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from copyover import asgi
from copyover.worker.application import json_bytes
from copyover.worker.served import CannotFreeze
from copyover.worker.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import MutableMapping


class Visit:
    """
    What an application says of one entry.

    There is one for each request: it has nothing of its own until something is said, and it does not know the extension
    that this is said in, for what refers to itself waits for the garbage collector.
    """

    is_resumable = False
    has_said = False  # so of this very entry
    name = ""
    version = 0
    _snapshot: Snapshot | None = None

    @classmethod
    def again(cls, state: dict[str, Any], *, name: str, version: int) -> tuple[Visit, dict[str, Any]]:
        """Return the entry of one who was here before, and its extension."""
        visit = cls()
        visit.say(name, version)
        return visit, visit.extension() | {"state": state, "resumed": True, "version": version}

    def extension(self) -> dict[str, Any]:
        """Return what the application finds in its scope."""
        return {"state": {}, "resumed": False, "resumable": self.say}

    def say(self, name: str = "", version: int = 0) -> None:
        self.is_resumable = self.has_said = True
        self.name, self.version = name, version

    def state_bytes(self, extension: dict[str, Any]) -> bytes:
        """
        Return its state as JSON.

        Raises:
            CannotFreeze: something in it would not come out as it went in.

        """
        state = extension["state"]
        if type(state) is not dict:
            raise CannotFreeze(f"its state is of type {type(state).__name__} instead of dict")
        if not state:
            return b"{}"
        if self._snapshot is None:
            self._snapshot = Snapshot(_encode, is_json=True)
        return self._snapshot.take(state)


def greet(scope: MutableMapping[str, Any], extension: dict[str, Any]) -> None:
    """Tell the application."""
    scope.setdefault("extensions", {})[asgi.EXTENSION] = extension


def know(extension: dict[str, Any]) -> None:
    """Have the running task, and those that it will start, be of the entry with this extension."""
    asgi.entered.set(extension)


def is_of(extension: dict[str, Any]) -> bool:
    """Whether the running task is one of those."""
    return asgi.entered.get() is extension


def _encode(state: object) -> bytes:
    return json_bytes(state, "state")


def check_readable(name: str, version: int) -> None:
    """
    See that this release can be entered again where the incumbent was.

    Raises:
        CannotFreeze: it has no such route, or one that reads other versions.

    """
    if not name:  # said of the connection alone, or of the whole application
        return
    route = asgi.routes.get(name)
    if route is None:
        raise CannotFreeze(f"this release has no resumable route {name}")
    if version not in route.reads:
        reads = ", ".join(map(str, sorted(route.reads)))
        raise CannotFreeze(f"the state of {name} is of version {version}, this release reads {reads}")
