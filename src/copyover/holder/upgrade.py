"""
How a holder becomes another program and stays the same process: checked by a child, then execve.

What travels is decided in succession and by those who own it; nothing is done that the child could not read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import copyover
from copyover import channel, process, succession
from copyover.change import Phase
from copyover.errors import CopyoverError, PythonNotFound
from copyover.holder import capacity, report
from copyover.holder.crew import Generation
from copyover.holder.daemon import Daemon
from copyover.holder.hand import Tail, notify

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.holder.listening import Listening
PATIENCE_S = 30.0  # for the check, and for a moment at which nothing is on its way
LOOK_AGAIN_S = 0.02
LONGEST_ANSWER = 4096
PROGRAM = ("-P", "-m", "copyover.holder")


@attrs.define(eq=False)
class Attempt:
    """One upgrade under way."""

    caller: int
    python: str
    child: process.Child
    answer: int  # the pipe behind the child's stdout
    tail: Tail
    deadline_s: float

    def said(self) -> dict[str, Any] | None:
        """Return what the child, which is dead, says that it is; None if it is nothing of ours."""
        try:
            found = json.loads(os.read(self.answer, LONGEST_ANSWER))
        except (OSError, ValueError):
            return None
        return found if type(found) is dict and set(found) == {"copyover", "python"} else None


class Upgrade:
    """Upgrades of one holder, one at a time."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._attempt: Attempt | None = None

    def ask(self, caller: int, named: str | None) -> None:
        """Begin; *caller* is answered by the successor, or is refused."""
        machine = self._daemon.machine
        if self._attempt is not None:
            self._refuse(caller, "busy", "another upgrade is under way")
            return
        if machine.phase is not Phase.SERVING or machine.holdings.generation == 0:
            self._refuse(caller, "busy", succession.obstacle(machine) or "")
            return
        try:
            attempt = self._attempt = self._begin_check(caller, _interpreter(named))
        except (CopyoverError, OSError) as problem:
            self._refuse(caller, "refused", str(problem))
            return
        self._daemon.chronicle.note("upgrade-checked-by", {"pid": attempt.child.pid, "python": attempt.python})
        loop = self._daemon.loop
        loop.watch(attempt.child, lambda: self._checked(attempt))
        loop.watch(attempt.tail, lambda: self._read_tail(attempt))
        loop.set_timer("upgrade", PATIENCE_S, attempt.child.kill_group)

    # ---- a child of the new program reads a copy

    def _begin_check(self, caller: int, python: str) -> Attempt:
        answer, stdout = _pipe()
        errors, stderr = _pipe()
        memfd = channel.sealed_memfd(succession.encode(self._estate(caller, frozenset())))
        try:
            child = process.spawn(
                [python, *PROGRAM, "--check", str(memfd)],
                cwd=".",
                env=os.environ,
                inherit=(memfd,),
                stderr=stderr,
                stdout=stdout,
            )
        except BaseException:
            os.close(answer)
            os.close(errors)
            raise
        finally:
            os.close(memfd)
            os.close(stdout)
            os.close(stderr)
        return Attempt(caller, python, child, answer, Tail(errors), time.monotonic() + PATIENCE_S)

    def _read_tail(self, attempt: Attempt) -> None:
        if not attempt.tail.read():
            self._daemon.loop.unwatch(attempt.tail)

    def _checked(self, attempt: Attempt) -> None:
        """The child has ended: take its word, and go."""
        loop = self._daemon.loop
        is_late = not loop.cancel_timer("upgrade")
        loop.unwatch(attempt.child)
        how = attempt.child.reap()
        process.reap_orphans()
        loop.unwatch(attempt.tail)
        attempt.tail.drain()
        said = attempt.said()
        attempt.tail.close()
        os.close(attempt.answer)
        if how == process.SUCCEEDED and said is not None:
            self._leave_when_calm(attempt)
            return
        lines = list(attempt.tail.lines)
        why = f"it had not read the state within {PATIENCE_S:g} s" if is_late else how
        if how == process.SUCCEEDED:
            why = "it is no copyover: it exited with 0 and read nothing"
        elif lines and not is_late:
            why = f"{how}: {lines[-1]}"
        self._fail(attempt, "refused", f"{attempt.python} cannot go on as this holder; {why}", lines)

    # ---- the step itself

    def _leave_when_calm(self, attempt: Attempt) -> None:
        """Go when nothing is on its way; the change that came first is not disturbed."""
        daemon = self._daemon
        daemon.settle()
        obstacle = self._obstacle()
        if obstacle is None:
            # A signal that is blocked stays pending over execve; a caught one would find the default action there.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                daemon.loop.deliver_signals()  # one that came before may ask for a change
                daemon.settle()
                obstacle = self._obstacle()
                if obstacle is None:
                    self._become(attempt, before)
            except OSError as problem:
                why = f"{attempt.python} could be run and cannot be any more: {problem.strerror}"
                self._fail(attempt, "refused", why)
                return
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if time.monotonic() >= attempt.deadline_s:
            self._fail(attempt, "busy", f"{obstacle}, still so after {PATIENCE_S:g} s")
        else:
            daemon.loop.set_timer("upgrade", LOOK_AGAIN_S, lambda: self._leave_when_calm(attempt))

    def _obstacle(self) -> str | None:
        full = self._daemon.crew.find_backlog()
        waiting = None if full is None else f"worker {full} has not taken all that it was sent"
        return succession.obstacle(self._daemon.machine) or waiting

    def _become(self, attempt: Attempt, signals_blocked: set[Any]) -> None:
        """
        Become the successor; return never.

        Raises:
            OSError: it cannot be executed; everything is as it was.

        """
        estate = self._estate(attempt.caller, signals_blocked)
        memfd = channel.sealed_memfd(succession.encode(estate))
        kept = [memfd, *estate.descriptors()]
        try:
            for descriptor in kept:
                os.set_inheritable(descriptor, True)
            with contextlib.suppress(OSError):  # nobody may read it any more
                sys.stdout.flush()
            os.execv(attempt.python, [attempt.python, *PROGRAM, "--resume", str(memfd)])  # noqa: S606  # no shell
        finally:
            for descriptor in kept:
                os.set_inheritable(descriptor, False)
            os.close(memfd)

    def _estate(self, caller: int, signals_blocked: set[Any] | frozenset[Any]) -> succession.Estate:
        daemon = self._daemon
        left_s = time.monotonic()
        generations, hands = daemon.crew.left()
        return succession.Estate(
            format=succession.FORMATS[1],
            departure=succession.Departure(
                copyover=copyover.__version__,
                python=platform.python_version(),
                asker=caller,
                left_s=left_s,
                signals_blocked=sorted(map(int, signals_blocked)),
            ),
            told=dict(daemon.told),
            lock=daemon.lock,
            instance=daemon.instance,
            newest=daemon.newest,
            started_s=daemon.started_s,
            last_reload=daemon.last_reload,
            protocol_errors=daemon.crew.protocol_errors,
            timers=daemon.loop.deadlines_s(),
            desk=daemon.desk.left(),
            listening=daemon.listening.left(),
            generations=generations,
            previous=None if daemon.previous is None else daemon.previous.left(),
            hands=hands,
            held=succession.hold(daemon.machine.holdings),
            user=daemon.user,
            noted=list(daemon.chronicle.kept),
            followers=sorted(daemon.followers),
        )

    # ---- refusals

    def _fail(self, attempt: Attempt, outcome: str, why: str, stderr_tail: list[str] | None = None) -> None:
        self._attempt = None
        self._daemon.chronicle.note("upgrade-failed", {"outcome": outcome, "problem": why}, logging.ERROR)
        self._refuse(attempt.caller, outcome, why, stderr_tail)

    def _refuse(self, caller: int, outcome: str, why: str, stderr_tail: list[str] | None = None) -> None:
        serves = f"the holder (pid {os.getpid()}, copyover {copyover.__version__}) serves on as it was"
        code = {"busy": 5, "refused": 3}[outcome]
        answer = {"outcome": outcome, "exit_code": code, "error": f"{why}; {serves}", "stderr_tail": stderr_tail or []}
        self._daemon.desk.reply(caller, {"result": {"schema": report.SCHEMA, **answer}}, is_last=True)


def _interpreter(named: str | None) -> str:
    """
    Return the path of the successor's interpreter; its own link is how Python finds its venv, so it stays one.

    Raises:
        PythonNotFound: there is none.

    """
    found = sys.executable if named is None else shutil.which(named)
    if found is None or not Path(found).is_absolute():
        raise PythonNotFound(f"there is no interpreter {named}; say --python with the path of one that has copyover")
    return found


def _pipe() -> tuple[int, int]:
    """Return the read end, which does not block, and the write end, which does."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(write_end, True)
    return read_end, write_end


# ---- the successor


def check(memfd: int) -> int:
    """Read the state that is in *memfd*, say who we are, and return the exit code; its descriptors are not ours."""
    try:
        succession.check(succession.decode(channel.read_memfd(memfd)))
    except CopyoverError as problem:
        print(f"copyover {copyover.__version__}: {problem}", file=sys.stderr)  # noqa: T201
        return problem.exit_code
    print(json.dumps({"copyover": copyover.__version__, "python": platform.python_version()}))  # noqa: T201
    return 0


def resume(memfd: int, listening: Listening) -> tuple[Daemon, Callable[[], None]]:
    """
    Go on from the state that is in *memfd*: return the holder, and what is to be done when it runs.

    Raises:
        CopyoverError: the state cannot be read; a child has read such a one a moment ago.

    """
    data = channel.read_memfd(memfd)
    os.close(memfd)
    estate = succession.decode(data)
    for descriptor in estate.descriptors():
        os.set_inheritable(descriptor, False)
    listening.inherit(estate.listening)
    machine = succession.revive(estate.held, capacity.take())
    daemon = Daemon(
        estate.told,
        dict(estate.generations)[machine.holdings.generation].config,
        machine,
        lock=estate.lock,
        control_socket=socket.socket(fileno=estate.desk.control),
        control_group=estate.desk.group,
        listening=listening,
        instance=estate.instance,
        user=estate.user,
    )
    daemon.chronicle.inherit(estate.noted)
    daemon.followers = set(estate.followers)
    daemon.newest, daemon.started_s, daemon.last_reload = estate.newest, estate.started_s, estate.last_reload
    daemon.previous = None if estate.previous is None else Generation.inherit(estate.previous)
    daemon.crew.inherit(estate)
    daemon.desk.inherit(estate.desk)
    for name, deadline_s in estate.timers.items():
        _set_timer(daemon, name, deadline_s - time.monotonic())
    return daemon, lambda: _begin(daemon, estate.departure)


def _set_timer(daemon: Daemon, name: str, after_s: float) -> None:
    what, _, worker = name.partition(" ")
    if what == "spawn":
        daemon.crew.spawn(int(worker), daemon.machine.holdings.workers[int(worker)].generation, after_s)
    else:
        daemon.set_timer(name, after_s)


def _begin(daemon: Daemon, departure: succession.Departure) -> None:
    """Take signals again, also those that came meanwhile, and answer who asked."""
    signal.pthread_sigmask(signal.SIG_SETMASK, departure.signals_blocked)
    process.reap_orphans()
    daemon.end_served_listeners()
    away_ms = round((time.monotonic() - departure.left_s) * 1000, 3)
    versions = {"from": departure.copyover, "to": copyover.__version__}
    daemon.chronicle.note("upgraded", {**versions, "connections": len(daemon.machine.ledger), "away_ms": away_ms})
    notify("READY=1")
    result = {
        "outcome": "done",
        "exit_code": 0,
        "pid": os.getpid(),
        "from": {"copyover": departure.copyover, "python": departure.python},
        "to": {"copyover": copyover.__version__, "python": platform.python_version()},
        "connections": len(daemon.machine.ledger),
        "workers": len(daemon.crew.hands),
        "away_ms": away_ms,
        "error": None,
        "stderr_tail": [],
    }
    daemon.desk.reply(departure.asker, {"result": {"schema": report.SCHEMA, **result}}, is_last=True)
