"""
What operators may ask of the holder, and what they are answered.

It reads the holder and hands on what is to be done; it decides no transition.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import copyover
from copyover import config as configs
from copyover import events
from copyover.change import Phase
from copyover.errors import UsageError
from copyover.holder import report
from copyover.holder.upgrade import Upgrade
from copyover.sockets import peer_of_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.holder.daemon import Daemon


class Requests:
    """Answers the requests that come over the control socket."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._upgrade = Upgrade(daemon)
        self._known: dict[str, Callable[[int, dict[str, Any]], None]] = {
            "reload": self._reload,
            "status": lambda caller, _: self._tell(caller, self._status()),
            "connections": lambda caller, _: self._tell(caller, self._connections()),
            "events": self._events,
            "cancel": self._cancel,
            "rollback": self._roll_back,
            "ledger": self._ledger,
            "stop": self._stop,
            "upgrade": self._ask_upgrade,
        }
        daemon.chronicle.on_event = self._tell_followers

    def answer(self, caller: int, request: dict[str, Any]) -> None:
        """Answer one request, or promise an answer."""
        known = self._known.get(request["do"])
        if known is None:
            self._refuse(caller, f"this holder does not know {request['do']!r}")
        else:
            known(caller, request)

    def _tell(self, caller: int, result: dict[str, Any]) -> None:
        self._daemon.desk.reply(caller, {"result": {"schema": report.SCHEMA} | result}, is_last=True)

    def _refuse(self, caller: int, sentence: str) -> None:
        self._daemon.desk.reply(caller, {"error": sentence}, is_last=True)

    def _reload(self, caller: int, request: dict[str, Any]) -> None:
        daemon = self._daemon
        wishes = self._wishes(caller, request)
        if wishes is None:
            return
        is_one_way = request.get("one_way") is True
        if request.get("wait", True) or daemon.machine.phase is not Phase.SERVING:  # then it is told that it is busy
            daemon.waiting.add(caller)
            daemon.ask_reload(caller, wishes, is_one_way=is_one_way)
            return
        daemon.ask_reload(events.BY_SIGNAL, wishes, is_one_way=is_one_way)
        self._tell(caller, {"outcome": "started", "exit_code": 0})

    def _wishes(self, caller: int, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return what this one reload is to do otherwise; None when the caller was told why it cannot."""
        try:
            return configs.wishes({key: request.get(key) for key in ("timeout_s", "move", "bake_s", "health")})
        except UsageError as problem:
            self._refuse(caller, str(problem))
            return None

    def _cancel(self, caller: int, _: dict[str, Any]) -> None:
        """Undo the change under way; its result is the answer."""
        daemon = self._daemon
        if daemon.machine.change is None:
            serving = f"no change is under way; generation {daemon.machine.holdings.generation} serves"
            self._tell(caller, {"outcome": "nothing", "exit_code": 3, "error": serving})
            return
        daemon.cancelling.add(caller)
        daemon.cancel("cancelled by an operator")

    def _roll_back(self, caller: int, request: dict[str, Any]) -> None:
        """Undo the change under way; else go back to the release before, as a reload."""
        daemon = self._daemon
        if daemon.machine.change is not None:
            self._cancel(caller, request)
            return
        if daemon.previous is None:
            serving = (
                f"this holder knows no release before generation {daemon.machine.holdings.generation}, which serves"
            )
            self._tell(caller, {"outcome": "nothing", "exit_code": 3, "error": serving})
            return
        wishes = self._wishes(caller, request)
        if wishes is not None:
            daemon.waiting.add(caller)
            daemon.ask_reload(caller, wishes, is_one_way=request.get("one_way") is True, pinned=daemon.previous)

    def _ask_upgrade(self, caller: int, request: dict[str, Any]) -> None:
        python = request.get("python")
        if python is not None and (type(python) is not str or not python or "\0" in python):
            self._refuse(caller, "python: should be the path of an interpreter")
        else:
            self._upgrade.ask(caller, python)

    def _ledger(self, caller: int, request: dict[str, Any]) -> None:
        daemon = self._daemon
        self._tell(caller, report.ledger_object(daemon.machine, daemon.listening.all(), request.get("connections")))

    def _stop(self, caller: int, _: dict[str, Any]) -> None:
        self._tell(caller, {"pid": os.getpid()})
        self._daemon.stop()

    def _events(self, caller: int, request: dict[str, Any]) -> None:
        kept = list(self._daemon.chronicle.kept)
        if not request.get("follow", False):
            self._tell(caller, {"events": kept})
            return
        self._daemon.followers.add(caller)
        for noted in kept:
            self._daemon.desk.reply(caller, {"event": noted})

    def _tell_followers(self, noted: dict[str, Any]) -> None:
        daemon = self._daemon
        daemon.followers = {caller for caller in daemon.followers if daemon.desk.is_present(caller)}
        for caller in daemon.followers:
            daemon.desk.reply(caller, {"event": noted})

    def _status(self) -> dict[str, Any]:
        daemon, now_s = self._daemon, time.monotonic()
        counters = daemon.machine.holdings.counters
        counters["denied"] = daemon.desk.denied
        counters["protocol_errors"] = daemon.crew.protocol_errors
        deadline_s = daemon.loop.deadline_s("change") or daemon.loop.deadline_s("stop")
        return {
            "name": daemon.config.name,
            "pid": os.getpid(),
            "copyover": copyover.__version__,
            "uptime_s": round(now_s - daemon.started_s, 3),
            "is_serving": report.is_serving(daemon.machine),
            **report.status(daemon.machine, daemon.crew.hands, now_s=now_s, deadline_s=deadline_s),
            "listeners": [
                {"name": listed.name, "address": listed.address, "state": state}
                for listed, state in daemon.listening.listed()
            ],
            "last_reload": daemon.last_reload,
        }

    def _connections(self) -> dict[str, Any]:
        machine, names = self._daemon.machine, self._daemon.listening.names
        rows = [
            report.connection_object(entry, machine, names[entry.listener], peer_of_descriptor(entry.descriptor))
            for entry in machine.ledger.entries()
        ]
        return {"connections": rows}
