"""
The holder's heart: what happens becomes events for the machine, its effects are performed.

It holds no knowledge of phases; those are in reload.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import time
import uuid
from typing import TYPE_CHECKING, Any, assert_never

import attrs

from copyover import config as configs
from copyover import events, reload, users
from copyover.change import Phase
from copyover.errors import CopyoverError, IllegalEvent, UsageError
from copyover.holder import control, dump, report
from copyover.holder.chronicle import Chronicle
from copyover.holder.crew import Crew, Generation
from copyover.holder.hand import environment, notify
from copyover.holder.loop import Loop
from copyover.release import pin
from copyover.sockets import reset_and_close

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from copyover.config import Config
    from copyover.directory import Directory
    from copyover.listeners import Listener

PROGRESS_S = 0.05
# Their default action is to end the process. signal(7)
ENDING_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RESERVED_DESCRIPTORS = 1024  # listeners, channels, callers, and lends under way when the holder is full


class Daemon:
    """One holder at work."""

    def __init__(
        self,
        settings: Callable[[], Config],
        config: Config,
        directory: Directory,
        listeners: Sequence[Listener],
        descriptor_limit: int,
    ) -> None:
        self._settings = settings
        self.config = config
        self.listeners = listeners
        self._directory = directory
        # A connection is a descriptor here, and for a moment another one in each worker's channel.
        capacity = descriptor_limit - min(RESERVED_DESCRIPTORS, descriptor_limit // 2)
        self.chronicle = Chronicle()
        self.chronicle.note("limits", {"descriptors": descriptor_limit, "connections": capacity})
        self.machine = reload.Machine(capacity)
        self.loop = Loop(self._settle)
        self._events: collections.deque[events.Event] = collections.deque()
        self.crew = Crew(
            self.loop,
            listeners,
            environment(uuid.uuid4().hex),
            users.find(config.user, config.group),
            tell=self._events.append,
            settle=self._settle,
            note=self.chronicle.note,
        )
        self._newest = 0
        group = None if config.control_group is None else users.group_id(config.control_group, key="control_group")
        self.desk = control.Desk(directory, self.loop.watch, self.loop.unwatch, group)
        self.waiting: set[int] = set()  # the callers that follow a change
        self._last_progress_s = 0.0
        self.last_reload: dict[str, Any] | None = None
        self.started_s = time.monotonic()
        self._exit_code: int | None = None
        self._failure: str | None = None
        self._is_asked_to_stop = False

    # ---- the loop

    def run(self, answer: Callable[[int, dict[str, Any]], None]) -> int:
        """Serve until stopped, *answer* the operators' requests; return the exit code."""
        self.desk.open(answer)
        self.loop.catch_signals((*ENDING_SIGNALS, signal.SIGCHLD), self._signalled)
        self.ask_reload(events.BY_BOOT)
        try:
            while self._exit_code is None:
                self.loop.turn()
                if self.machine.phase is Phase.STOPPED and self._exit_code is None:
                    self._exit_code = 0
        finally:
            # Python restores the default action while it ends: a second SIGTERM would turn a clean exit into a death.
            for number in ENDING_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self.desk.close()
            self.loop.close()
        return self._exit_code

    @property
    def failure(self) -> str | None:
        """Why the first generation never served."""
        return self._failure

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self.ask_reload(events.BY_SIGNAL)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self.stop()
        elif number == signal.SIGUSR1:
            self._dump()
        elif number == signal.SIGCHLD:
            self.crew.reap_orphans()

    def _dump(self) -> None:
        found = dump.content(self.machine, self.crew.hands, self.loop.timers_left_s())
        try:
            path = dump.write(
                self._directory.path,
                {"name": self.config.name, "pid": os.getpid(), **found} | {"events": list(self.chronicle.kept)},
            )
        except OSError as problem:
            self.chronicle.note("not-dumped", {"problem": str(problem)}, logging.ERROR)
        else:
            self.chronicle.note("dumped", {"path": str(path), "connections": len(self.machine.ledger)})

    def stop(self) -> None:
        self._is_asked_to_stop = True
        notify("STOPPING=1")
        self._events.append(events.StopAsked(self.config.stop_timeout_s))

    # ---- events and effects

    def _settle(self) -> None:
        """Handle what was queued, and what that queues."""
        while self._events:
            event = self._events.popleft()
            try:
                for effect in self.machine.handle(event, time.monotonic()):
                    self._perform(effect)
            except IllegalEvent as problem:
                self._refuse_event(event, problem)
        if self.waiting and time.monotonic() - self._last_progress_s > PROGRESS_S:
            self._last_progress_s = time.monotonic()
            self.waiting = {number for number in self.waiting if self.desk.is_present(number)}
            for number in self.waiting:
                self.desk.reply(number, {"progress": report.progress(self.machine)})

    def _refuse_event(self, event: events.Event, problem: IllegalEvent) -> None:
        """A worker that breaks the protocol is killed: its word cannot be trusted for any connection."""
        self.chronicle.note("refused", {"problem": str(problem)}, logging.ERROR)
        if isinstance(event, events.FromWorker):
            for descriptor in event.descriptors:
                os.close(descriptor)
            self.crew.break_with(event.worker)

    def _perform(self, effect: events.Effect) -> None:  # noqa: C901  # one case an effect
        match effect:
            case events.Send(worker, message, descriptors):
                self.crew.send(worker, message, descriptors)
            case events.Spawn(worker, generation, after_s):
                self.crew.spawn(worker, generation, after_s)
            case events.Kill(worker):
                self.crew.kill(worker)
            case events.Close(descriptor):
                os.close(descriptor)
            case events.Reset(descriptor):
                reset_and_close(descriptor)
            case events.SetTimer(name, None):
                self.loop.cancel_timer(name)
            case events.SetTimer(name, float() | int() as after_s):
                self.loop.set_timer(name, after_s, lambda: self._events.append(events.TimerFired(name)))
            case events.Note(name, fields):
                self.chronicle.note(name, fields)
            case events.Finished(asker, result):
                self._finished(asker, result)
            case events.AskAgain():
                self.ask_reload(events.BY_SIGNAL)
            case events.SetTimer():
                raise AssertionError(effect)
            case _:
                assert_never(effect)

    # ---- reloads

    def ask_reload(self, asker: int, wishes: Mapping[str, Any] | None = None) -> None:
        """Pin the release as it is now, and ask the machine."""
        config, generation = self.config, self._newest + 1
        if self.machine.phase is Phase.SERVING:  # else the machine says that it is busy
            try:
                config = self._read_settings(wishes or {})
                release = pin(config)
            except CopyoverError as problem:
                self._refuse_reload(asker, problem)
                return
            self._newest = generation
            self.crew.generations[generation] = Generation(release, config)
        self._events.append(
            events.Reload(
                asker=asker,
                generation=generation,
                workers=config.workers,
                move=config.move,
                timeout_s=config.timeout_s,
                gather_s=config.gather_s,
                boundary_s=config.boundary_s,
                drain_s=config.drain_timeout_s,
                max_retiring=config.max_retiring,
                quotas=events.Quotas(config.worker_connections, config.worker_record_bytes),
                is_remembered=asker == events.BY_SIGNAL,
            )
        )

    def _read_settings(self, wishes: Mapping[str, Any]) -> Config:
        config = self._settings()
        fixed = configs.unreloadable(self.config, config)
        if fixed:
            raise UsageError(f"{', '.join(fixed)} cannot be changed by a reload: stop the holder and run it anew")
        return attrs.evolve(config, **wishes)

    def _refuse_reload(self, asker: int, problem: CopyoverError) -> None:
        serving = self.machine.holdings.generation
        result = events.Result(
            events.Outcome.REFUSED, serving, serving, serving, error=str(problem), status=problem.exit_code
        )
        self._finished(asker, result)

    def _finished(self, asker: int, result: events.Result) -> None:
        tail: list[str] = []
        has_failed = result.outcome in (events.Outcome.REFUSED, events.Outcome.ROLLED_BACK)
        if has_failed and result.to_generation != result.serving_generation:
            tail = self.crew.last_words(result.to_generation)
        answer = report.result_object(result, self.crew.hands, tail)
        if result.outcome is not events.Outcome.BUSY:
            self.last_reload = answer
        if result.outcome is events.Outcome.DONE:
            self.config = self.crew.generations[result.to_generation].config
            self.crew.forget_generations(self._newest)
            self.crew.favour(result.to_generation)
        if asker == events.BY_BOOT:
            self._booted(result, answer)
        elif asker == events.BY_SIGNAL:
            notify("READY=1")
            if answer["exit_code"]:
                failed = {"outcome": answer["outcome"], "error": answer["error"]}
                self.chronicle.note("reload-failed", failed, logging.ERROR)
        else:
            self.waiting.discard(asker)
            self.desk.reply(asker, {"result": answer}, is_last=True)

    def _booted(self, result: events.Result, answer: dict[str, Any]) -> None:
        if result.outcome is events.Outcome.DONE:
            where = ",".join(listener.url for listener in self.listeners)
            with contextlib.suppress(OSError):  # nobody may read it any more
                print(f"ready name={self.config.name} pid={os.getpid()} listen={where}", flush=True)  # noqa: T201
            notify("READY=1")
            return
        if self._is_asked_to_stop:
            return  # nothing failed: the machine stops next
        self._failure = answer["error"]
        self._exit_code = result.status or 3
        self.crew.end_all()
