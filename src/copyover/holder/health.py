"""
The health command of a bake: run again and again while the replacement serves.

It says how each run ended; what follows from that is decided in reload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copyover import events, process
from copyover.errors import CopyoverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.holder.loop import Loop

INTERVAL_S = 1.0
_TIMER = "health"


class Health:
    """At most one run at a time; *tell* takes a Checked after each."""

    def __init__(self, loop: Loop, tell: Callable[[events.Event], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._running: process.Child | None = None
        self._command = ""
        self._cwd = ""
        self._environment: dict[str, str] = {}

    def start(self, command: str, *, cwd: str, environment: dict[str, str]) -> None:
        """Run *command* with the shell now, and a second after each success."""
        self.stop()
        self._command, self._cwd, self._environment = command, cwd, environment
        self._run()

    def stop(self) -> None:
        self._loop.cancel_timer(_TIMER)
        if self._running is not None:
            self._loop.unwatch(self._running)
            self._running.kill_group()
            self._running.reap()
            self._running = None

    def _run(self) -> None:
        argv = ("/bin/sh", "-c", self._command)
        try:
            child = process.spawn(argv, cwd=self._cwd, env=self._environment, inherit=(), stderr=2)
        except (CopyoverError, OSError) as problem:
            self._tell(events.Checked(f"could not be run: {problem}"))
            return
        self._running = child
        self._loop.watch(child, self._ended)

    def _ended(self) -> None:
        child, self._running = self._running, None
        if child is None:
            return
        self._loop.unwatch(child)
        child.kill_group()  # what it left in the background
        how = child.reap()
        if how == process.SUCCEEDED:
            self._loop.set_timer(_TIMER, INTERVAL_S, self._run)
        self._tell(events.Checked(None if how == process.SUCCEEDED else how))
