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
from typing import TYPE_CHECKING, Any, assert_never

import attrs

from copyover import config as configs
from copyover import directory as directories
from copyover import events, process
from copyover.change import Phase
from copyover.channel import close_all
from copyover.errors import CopyoverError, IllegalEvent, UsageError
from copyover.holder import capacity, control, dump, report
from copyover.holder.chronicle import Chronicle
from copyover.holder.crew import Crew, Generation
from copyover.holder.hand import environment, notify
from copyover.holder.health import Health
from copyover.holder.listening import Changes
from copyover.holder.loop import Loop
from copyover.release import pin
from copyover.sockets import reset_and_close

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from copyover.config import Config
    from copyover.holder.hand import Hand
    from copyover.holder.listening import Listening
    from copyover.release import Release
    from copyover.reload import Machine
    from copyover.users import User

log = logging.getLogger("copyover.holder")

PROGRESS_S = 0.05
LISTENERS_S = 0.25  # how often the backlog of a removed listener is looked at
# Their default action is to end the process. signal(7)
ENDING_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Daemon:
    """
    One holder at work.

    *told* is what it was started with: the ``file`` and the ``flags`` that make its configuration. *instance* is
    drawn once by each holder; workers know it by that.
    """

    def __init__(
        self,
        told: Mapping[str, Any],
        config: Config,
        machine: Machine,
        *,
        lock: int,
        control_socket: socket.socket,
        control_group: int | None,
        listening: Listening,
        instance: str,
        user: User | None,
    ) -> None:
        self.told = told
        self.config = config
        self.machine = machine
        self.lock = lock
        self.listening = listening
        self.instance = instance
        self.user = user
        self.chronicle = Chronicle()
        self.loop = Loop(self.settle)
        self._events: collections.deque[events.Event] = collections.deque()
        self._directory = directories.of(config.name)
        self._environment = environment(self._directory, instance)
        self.crew = Crew(
            self.loop,
            machine,
            listening,
            self._directory.path,
            environment=self._environment,
            user=user,
            tell=self._events.append,
            settle=self.settle,
            note=self.chronicle.note,
        )
        self._health = Health(self.loop, self._events.append)
        self.newest = 0  # of the generations that were ever begun
        self.previous: Generation | None = None  # what served before, for a roll-back by hand
        self.desk = control.Desk(self._directory, control_socket, self.loop.watch, self.loop.unwatch, control_group)
        self.waiting: set[int] = set()  # the callers that follow a change
        self.followers: set[int] = set()  # those that follow the chronicle
        self.cancelling: set[int] = set()  # those that want it undone
        self._last_progress_s = 0.0
        self.last_reload: dict[str, Any] | None = None
        self.started_s = time.monotonic()
        self._exit_code: int | None = None
        self._failure: str | None = None
        self._is_asked_to_stop = False

    # ---- the loop

    def run(self, answer: Callable[[int, dict[str, Any]], None], begin: Callable[[], None]) -> int:
        """Call *begin*, then serve until stopped, *answer* the operators' requests; return the exit code."""
        self.desk.open(lambda caller, asked: self._answer(answer, caller, asked))
        self.loop.catch_signals((*ENDING_SIGNALS, signal.SIGCHLD), self._signalled)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        begin()
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

    def _answer(self, answer: Callable[[int, dict[str, Any]], None], caller: int, asked: dict[str, Any]) -> None:
        self.crew.hear_all()
        answer(caller, asked)

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
            process.reap_orphans()

    def _dump(self) -> None:
        self.crew.hear_all()
        timers = {name: deadline_s - time.monotonic() for name, deadline_s in self.loop.deadlines_s().items()}
        found = dump.content(self.machine, self.crew.hands, timers)
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

    def settle(self) -> None:
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
            close_all(event.descriptors)
            self.crew.break_with(event.worker)

    def _perform(self, effect: events.Effect) -> None:  # noqa: C901, PLR0912  # one case an effect
        match effect:
            case events.Send(worker, message, descriptors):
                self.crew.send(worker, message, descriptors)
            case events.Spawn(worker, generation, after_s):
                self.crew.spawn(worker, generation, after_s)
            case events.Kill(worker):
                self.crew.kill(worker)
            case events.Close(descriptors):
                close_all(descriptors)
            case events.Reset(descriptors):
                for descriptor in descriptors:
                    reset_and_close(descriptor)
            case events.SetTimer(name, None):
                self.loop.cancel_timer(name)
            case events.SetTimer(name, float() | int() as after_s):
                self.set_timer(name, after_s)
            case events.Note(name, fields):
                self.chronicle.note(name, fields)
            case events.Finished(asker, result):
                self._finished(asker, result)
            case events.CheckHealth(is_on):
                self._check_health(is_on=is_on)
            case events.AskAgain():
                self.ask_reload(events.BY_SIGNAL)
            case events.SetTimer():
                raise AssertionError(effect)
            case _:
                assert_never(effect)

    def set_timer(self, name: str, after_s: float) -> None:
        """Tell the machine after a while."""
        self.loop.set_timer(name, after_s, lambda: self._events.append(events.TimerFired(name)))

    # ---- reloads

    def ask_reload(
        self,
        asker: int,
        wishes: Mapping[str, Any] | None = None,
        *,
        is_one_way: bool = False,
        pinned: Generation | None = None,
    ) -> None:
        """Pin the release as it is now, unless one is *pinned*, and ask the machine."""
        config, generation = self.config, self.newest + 1
        if self.machine.phase is Phase.SERVING:  # else the machine says that it is busy
            try:
                config = attrs.evolve(pinned.config if pinned else self._read_settings(), **(wishes or {}))
                release = pinned.release if pinned else pin(config)
                capacity.check(config, self._directory)
                referenced = set(self.machine.ledger.column("listener", self.machine.ledger))
                self.listening.propose(generation, config.addresses, referenced)
            except CopyoverError as problem:
                self._refuse_reload(asker, problem)
                return
            self.newest = generation
            self.crew.generations[generation] = Generation(release, config)
        self._events.append(self._reload_event(asker, generation, config, is_one_way=is_one_way))

    def _reload_event(self, asker: int, generation: int, config: Config, *, is_one_way: bool = False) -> events.Reload:
        return events.Reload(
            asker=asker,
            generation=generation,
            workers=config.workers,
            move=config.move,
            timeout_s=config.timeout_s,
            gather_s=config.gather_s,
            boundary_s=config.boundary_s,
            drain_s=config.drain_timeout_s,
            max_retiring=config.max_retiring,
            bake_s=config.bake_s,
            needs_health=config.health is not None,
            is_one_way=is_one_way,
            added=self.listening.added(generation),
            quotas=events.Quotas(config.worker_connections, config.worker_record_bytes),
            is_remembered=asker == events.BY_SIGNAL,
        )

    def take_over(
        self, hands: Sequence[Hand], releases: Mapping[int, Release], reports: Sequence[events.Report]
    ) -> None:
        """Go on with the workers of a holder that died."""
        for number, release in releases.items():
            self.crew.generations[number] = Generation(release, attrs.evolve(self.config, app=release.application))
        self.newest = max(releases)
        for hand in hands:
            self.crew.attend(hand)
        asked = self._reload_event(events.BY_SIGNAL, self.newest, self.config)
        self._events.append(events.Reunited(asked, reports))
        self.end_served_listeners()
        self._say_ready()

    def cancel(self, reason: str) -> None:
        """Undo the change under way."""
        self._events.append(events.CancelAsked(reason))

    def _check_health(self, *, is_on: bool) -> None:
        self._health.stop()
        if is_on and self.machine.change is not None:
            number = self.machine.change.asked.generation
            generation = self.crew.generations[number]
            told = {"COPYOVER_NAME": self.config.name, "COPYOVER_GENERATION": str(number)}
            # The secret of the name is for workers alone.
            own = {name: value for name, value in self._environment.items() if name != "COPYOVER_KEY"}
            if generation.config.health is not None:
                self._health.start(generation.config.health, cwd=generation.release.directory, environment=own | told)

    def _read_settings(self) -> Config:
        config = configs.load(self.told["file"], self.told["flags"])
        fixed = configs.unreloadable(self.config, config)
        if fixed:
            raise UsageError(f"{', '.join(fixed)} cannot be changed by a reload: stop the holder and run it anew")
        return config

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
        changes = self._settle_listeners(result)
        answer = report.result_object(result, self.crew.hands, tail, changes)
        if result.outcome is not events.Outcome.BUSY:
            self.last_reload = answer
        if result.outcome is events.Outcome.DONE:
            self.previous = self.crew.generations.get(result.from_generation)
            self.config = self.crew.generations[result.to_generation].config
            self.crew.forget_generations(self.newest)
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
        if result.outcome is not events.Outcome.BUSY:
            for caller in self.cancelling:
                self.desk.reply(caller, {"result": answer | {"exit_code": report.cancel_code(result)}}, is_last=True)
            self.cancelling.clear()

    def _settle_listeners(self, result: events.Result) -> Changes:
        """Let the listeners follow the change, as it ended."""
        if result.outcome is events.Outcome.DONE:
            changes = self.listening.commit(result.to_generation, time.monotonic())
            self.end_served_listeners()
            return changes
        if result.to_generation != result.serving_generation:
            self.listening.withdraw(result.to_generation)
        return Changes()

    def end_served_listeners(self) -> None:
        """Close the removed listeners that are served, and look again later if any is left."""
        self.listening.end_served(time.monotonic())
        if self.listening.ending:
            self.loop.set_timer("listeners", LISTENERS_S, self.end_served_listeners)

    def _booted(self, result: events.Result, answer: dict[str, Any]) -> None:
        if result.outcome is events.Outcome.DONE:
            self._say_ready()
            return
        if self._is_asked_to_stop:
            return  # nothing failed: the machine stops next
        self._failure = answer["error"]
        self._exit_code = result.status or 3
        self.crew.end_all()

    def _say_ready(self) -> None:
        where = ",".join(listener.url for listener in self.listening.live.values())
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"ready name={self.config.name} pid={os.getpid()} listen={where}", flush=True)  # noqa: T201
        notify("READY=1")
