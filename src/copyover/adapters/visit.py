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
    """*extension* is what the application finds in its scope."""

    __slots__ = ("_snapshot", "extension", "has_said", "is_resumable", "name", "version")

    def __init__(self, *, is_resumable: bool) -> None:
        self.is_resumable = is_resumable
        self.has_said = False  # so of this very entry
        self.name = ""
        self.version = 0
        self.extension: dict[str, Any] = {"state": {}, "resumed": False, "resumable": self._say}
        self._snapshot: Snapshot | None = None

    @classmethod
    def again(cls, state: dict[str, Any], *, name: str, version: int) -> Visit:
        """Return the entry of one who was here before."""
        visit = cls(is_resumable=True)
        visit.name, visit.version, visit.has_said = name, version, True
        visit.extension.update(state=state, resumed=True, version=version)
        return visit

    def _say(self, name: str = "", version: int = 0) -> None:
        self.is_resumable = self.has_said = True
        self.name, self.version = name, version

    def greet(self, scope: MutableMapping[str, Any]) -> None:
        """Tell the application, and the tasks that it will start."""
        scope.setdefault("extensions", {})[asgi.EXTENSION] = self.extension
        asgi.entered.set(self.extension)

    @property
    def is_mine(self) -> bool:
        """Whether the running task is one that this entry has started."""
        return asgi.entered.get() is self.extension

    def state_bytes(self) -> bytes:
        """
        Return its state as JSON.

        Raises:
            CannotFreeze: something in it would not come out as it went in.

        """
        state = self.extension["state"]
        if type(state) is not dict:
            raise CannotFreeze(f"its state is of type {type(state).__name__} instead of dict")
        if not state:
            return b"{}"
        if self._snapshot is None:
            self._snapshot = Snapshot(_encode, is_json=True)
        return self._snapshot.take(state)


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
