"""
The holder's loop: turns what happens into events for the machine, and performs the effects.

It holds no knowledge of phases; those are in reload.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import selectors
import signal
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any, assert_never

import attrs

from copyover import config as configs
from copyover import events, messages, process, reload, slots
from copyover.change import Phase
from copyover.errors import ChangeRefused, ChannelClosed, CopyoverError, IllegalEvent, UsageError, WireError
from copyover.holder import control, crew, report
from copyover.holder.recovery import SlotFile
from copyover.release import Release, pin
from copyover.sockets import peer_of_descriptor, reset_and_close

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from copyover.channel import Packet
    from copyover.config import Config
    from copyover.directory import Directory
    from copyover.listeners import Listener

log = logging.getLogger("copyover.holder")

PACKETS_A_TURN = 64
PROGRESS_S = 0.05
LONGEST_SLEEP_S = 3600.0  # epoll takes 24 days at most. epoll_wait(2)
RESERVED_DESCRIPTORS = 1024  # listeners, channels, callers, and lends under way when the holder is full
_BOOT = -1  # who asked for the first generation
_SIGNAL = 0


@attrs.define
class _Generation:
    release: Release
    config: Config
    last_words: list[str] = attrs.field(factory=list)


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
        self._directory = directory
        self._descriptor_limit = descriptor_limit
        self._config = config
        self._listeners = listeners
        # A connection is a descriptor here, and for a moment another one in each worker's channel.
        capacity = descriptor_limit - min(RESERVED_DESCRIPTORS, descriptor_limit // 2)
        log.info("event=limits descriptors=%d connections=%d", descriptor_limit, capacity)
        self._machine = reload.Machine(capacity)
        self._selector = selectors.DefaultSelector()
        self._events: collections.deque[events.Event] = collections.deque()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._hands: dict[int, crew.Hand] = {}
        self._generations: dict[int, _Generation] = {}
        self._newest = 0
        self._environment = crew.environment(uuid.uuid4().hex)
        self._desk = control.Desk(directory, self._watch, self._unwatch, self._answer)
        self._waiting: set[int] = set()
        self._last_progress_s = 0.0
        self._last_reload: dict[str, Any] | None = None
        self._started_s = time.monotonic()
        self._exit_code: int | None = None
        self._failure: str | None = None
        self._is_asked_to_stop = False

    # ---- the loop

    def run(self) -> int:
        """Serve until stopped; return the exit code."""
        self._watch(self._desk, self._desk.accept)
        wakeup = self._catch_signals()
        self._ask_reload(_BOOT)
        try:
            while self._exit_code is None:
                self._turn()
        finally:
            # Python restores the default action while it ends: a second SIGTERM would turn a clean exit into a death.
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            self._desk.close()
            wakeup.close()
        return self._exit_code

    @property
    def failure(self) -> str | None:
        """Why the first generation never served."""
        return self._failure

    def _turn(self) -> None:
        self._settle()
        for key, _ in self._selector.select(self._until_next_timer()):
            if self._is_watched(key.fileobj):  # an earlier event of this turn may have closed it
                key.data()
            self._settle()
        now_s = time.monotonic()
        for name, (deadline_s, fire) in list(self._timers.items()):
            if deadline_s <= now_s and self._timers.get(name, (None,))[0] == deadline_s:
                del self._timers[name]
                fire()
        self._settle()
        if self._machine.phase is Phase.STOPPED:
            self._exit_code = 0 if self._exit_code is None else self._exit_code

    def _until_next_timer(self) -> float | None:
        if not self._timers:
            return None
        until_s = min(deadline_s for deadline_s, _ in self._timers.values()) - time.monotonic()
        return min(max(until_s, 0.0), LONGEST_SLEEP_S)

    def _watch(self, fileobj: Any, callback: Callable[[], None], mask: int = selectors.EVENT_READ) -> None:
        if self._is_watched(fileobj):
            self._selector.modify(fileobj, mask, callback)
        else:
            self._selector.register(fileobj, mask, callback)

    def _is_watched(self, fileobj: Any) -> bool:
        try:
            return fileobj in self._selector.get_map()
        except ValueError:  # it is closed: a closed thing has no number to be looked up by
            return False

    def _unwatch(self, fileobj: Any) -> None:
        if self._is_watched(fileobj):
            self._selector.unregister(fileobj)

    # ---- signals

    def _catch_signals(self) -> socket.socket:
        """Let signals wake the selector as bytes. signal(7)"""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._watch(ours, lambda: self._signalled(ours.recv(4096)))
        self._wakeup = theirs
        return ours

    def _signalled(self, numbers: bytes) -> None:
        for number in dict.fromkeys(numbers):
            if number == signal.SIGHUP:
                crew.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                self._ask_reload(_SIGNAL)
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif number == signal.SIGCHLD:
                process.reap_orphans({hand.pid for hand in self._hands.values()})

    def _stop(self) -> None:
        self._is_asked_to_stop = True
        crew.notify("STOPPING=1")
        self._events.append(events.StopAsked(self._config.stop_timeout_s))

    # ---- events and effects

    def _settle(self) -> None:
        """Handle what was queued, and what that queues."""
        while self._events:
            event = self._events.popleft()
            try:
                self._handle(event)
            except IllegalEvent as problem:
                self._refuse_event(event, problem)
        if self._waiting and time.monotonic() - self._last_progress_s > PROGRESS_S:
            self._last_progress_s = time.monotonic()
            self._waiting = {number for number in self._waiting if self._desk.is_present(number)}
            for number in self._waiting:
                self._desk.reply(number, {"progress": report.progress(self._machine)})

    def _handle(self, event: events.Event) -> None:
        for effect in self._machine.handle(event, time.monotonic()):
            self._perform(effect)

    def _refuse_event(self, event: events.Event, problem: IllegalEvent) -> None:
        """A worker that breaks the protocol is killed: its word cannot be trusted for any connection."""
        log.error("event=refused problem=%r", str(problem))
        if isinstance(event, events.FromWorker):
            for descriptor in event.descriptors:
                os.close(descriptor)
            self._machine.holdings.counters["protocol_errors"] += 1
            if event.worker in self._hands:
                self._hands[event.worker].child.kill()

    def _perform(self, effect: events.Effect) -> None:  # noqa: C901  # one case an effect
        match effect:
            case events.Send(worker, message, descriptors):
                self._send(worker, message, descriptors)
            case events.Spawn(worker, generation, after_s):
                self._set_timer(f"spawn {worker}", after_s, lambda: self._spawn(worker, generation))
            case events.Kill(worker):
                self._kill(worker)
            case events.Close(descriptor):
                os.close(descriptor)
            case events.Reset(descriptor):
                reset_and_close(descriptor)
            case events.SetTimer(name, None):
                self._timers.pop(name, None)
            case events.SetTimer(name, float() | int() as after_s):
                self._set_timer(name, after_s, lambda: self._events.append(events.TimerFired(name)))
            case events.Note(name, fields):
                told = {key: value for key, value in fields.items() if value is not None}
                log.info("event=%s %s", name, " ".join(f"{key}={_value(value)}" for key, value in told.items()))
            case events.Finished(asker, result):
                self._finished(asker, result)
            case events.AskAgain():
                self._ask_reload(_SIGNAL)
            case events.SetTimer():
                raise AssertionError(effect)
            case _:
                assert_never(effect)

    def _send(self, worker: int, message: messages.Message, descriptors: tuple[int, ...]) -> None:
        hand = self._hands.get(worker)
        if hand is not None:
            with contextlib.suppress(ChannelClosed):  # it is dying; its pidfd tells
                hand.channel.send(message, descriptors)

    def _set_timer(self, name: str, after_s: float, fire: Callable[[], None]) -> None:
        self._timers[name] = (time.monotonic() + after_s, fire)

    # ---- workers

    def _spawn(self, worker: int, generation: int) -> None:
        try:
            release = self._generations[generation].release
            file = self._make_slots(worker, generation)
            hand = crew.Hand(worker, generation, release, self._environment, file)
        except (CopyoverError, OSError) as problem:
            log.error("event=not-started worker=%d problem=%r", worker, str(problem))  # noqa: TRY400  # a sentence
            self._events.append(events.Died(worker, str(problem)))
            return
        self._hands[worker] = hand
        self._watch(hand.child, lambda: self._bury(hand))
        self._watch(hand.channel, lambda: self._receive(hand))
        if hand.tail is not None:
            self._watch(hand.tail, lambda: self._read_tail(hand))
        hand.channel.on_backlog = lambda is_full: self._watch_channel(hand, is_full=is_full)
        log.info("event=started worker=%d pid=%d generation=%d", worker, hand.pid, generation)

    def _make_slots(self, worker: int, generation: int) -> SlotFile:
        size = self._generations[generation].config.slot_bytes
        header = slots.shape(size, self._descriptor_limit, worker=worker, generation=generation)
        return SlotFile(self._directory.path, self._environment["COPYOVER_INSTANCE"], header)

    def _watch_channel(self, hand: crew.Hand, *, is_full: bool) -> None:
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if is_full else 0)
        self._watch(hand.channel, lambda: self._receive(hand), mask)

    def _kill(self, worker: int) -> None:
        if worker in self._hands:
            self._hands[worker].child.kill()
        elif self._timers.pop(f"spawn {worker}", None) is not None:
            self._events.append(events.Died(worker, "was not started any more"))

    def _receive(self, hand: crew.Hand) -> None:
        try:
            if hand.channel.has_backlog:
                hand.channel.flush()
            for _ in range(PACKETS_A_TURN):
                self._take_packet(hand, hand.channel.receive())
                self._settle()
        except BlockingIOError:
            return
        except ChannelClosed:
            self._unwatch(hand.channel)  # not its death: that is for the pidfd to say
        except (WireError, ChangeRefused) as problem:
            log.error("event=refused worker=%d problem=%r", hand.worker, str(problem))  # noqa: TRY400  # a sentence
            self._machine.holdings.counters["protocol_errors"] += 1
            self._events.append(events.FromWorker(hand.worker, messages.Failed(reason=str(problem), status=3)))
            self._unwatch(hand.channel)
            hand.child.kill()

    def _take_packet(self, hand: crew.Hand, packet: Packet) -> None:
        with packet:
            message = packet.message
            if hand.hello is None:
                hand.welcome(
                    messages.expect(message, messages.Hello), self._listeners, self._config_of(hand).worker_options
                )
                return
            if isinstance(message, messages.Ready):
                hand.ready = message
            if isinstance(message, messages.Lend):
                crew.check_lend(message, packet.descriptors, listeners=len(self._listeners))
            self._events.append(events.FromWorker(hand.worker, message, packet.take()))

    def _config_of(self, hand: crew.Hand) -> Config:
        return self._generations[hand.generation].config

    def _read_tail(self, hand: crew.Hand) -> None:
        if hand.tail is not None and not hand.tail.read():
            self._unwatch(hand.tail)
            hand.drop_tail()

    def _bury(self, hand: crew.Hand) -> None:
        """Reap, read its channel to the end, and only then say that it is dead."""
        self._unwatch(hand.child)
        how = hand.child.reap()
        self._unwatch(hand.channel)
        for packet in hand.remaining():
            # The hello of a worker that died at once: there is nobody to welcome, or to refuse.
            with contextlib.suppress(WireError, ChangeRefused):
                self._take_packet(hand, packet)
                self._settle()
        self._settle()
        self._drain_tail(hand)
        self._generations[hand.generation].last_words = list(hand.lines)
        words = hand.in_words(how)
        if hand.tail is not None:
            self._unwatch(hand.tail)
        del self._hands[hand.worker]
        hand.close()
        self._events.append(events.Died(hand.worker, words))
        self._settle()
        process.reap_orphans({other.pid for other in self._hands.values()})

    def _drain_tail(self, hand: crew.Hand) -> None:
        """Read what the pipe holds now; a forked child may keep it open."""
        if hand.tail is None:
            return
        waiting = selectors.DefaultSelector()
        waiting.register(hand.tail, selectors.EVENT_READ)
        while waiting.select(0) and hand.tail.read():
            continue
        waiting.close()

    # ---- reloads

    def _ask_reload(self, asker: int, wishes: Mapping[str, Any] | None = None) -> None:
        wishes = wishes or {}
        config, generation = self._config, self._newest + 1
        if self._machine.phase is Phase.SERVING:  # else the machine says that it is busy
            try:
                config = self._read_settings(wishes)
                release = pin(config)
            except CopyoverError as problem:
                self._refuse_reload(asker, problem)
                return
            self._newest = generation
            self._generations[generation] = _Generation(release, config)
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
                is_remembered=asker == _SIGNAL,
            )
        )

    def _read_settings(self, wishes: Mapping[str, Any]) -> Config:
        config = self._settings()
        fixed = configs.unreloadable(self._config, config)
        if fixed:
            raise UsageError(f"{', '.join(fixed)} cannot be changed by a reload: stop the holder and run it anew")
        return attrs.evolve(config, **wishes)

    def _refuse_reload(self, asker: int, problem: CopyoverError) -> None:
        serving = self._machine.holdings.generation
        result = events.Result(
            events.Outcome.REFUSED, serving, serving, serving, error=str(problem), status=problem.exit_code
        )
        self._finished(asker, result)

    def _finished(self, asker: int, result: events.Result) -> None:
        tail: list[str] = []
        if result.outcome is not events.Outcome.DONE and result.outcome is not events.Outcome.BUSY:
            for hand in self._hands.values():
                if hand.generation == result.to_generation and hand.ready is None:
                    self._drain_tail(hand)
                    self._generations[hand.generation].last_words = list(hand.lines)
            if result.to_generation in self._generations and result.to_generation != result.serving_generation:
                tail = self._generations[result.to_generation].last_words
        answer = report.result_object(result, self._hands, tail)
        if result.outcome is not events.Outcome.BUSY:
            self._last_reload = answer
        if result.outcome is events.Outcome.DONE:
            self._config = self._generations[result.to_generation].config
            self._forget_generations()
        if asker == _BOOT:
            self._booted(result, answer)
        elif asker == _SIGNAL:
            crew.notify("READY=1")
            if answer["exit_code"]:
                log.error("event=reload-failed outcome=%s error=%r", answer["outcome"], answer["error"])
        else:
            self._waiting.discard(asker)
            self._desk.reply(asker, {"result": answer}, is_last=True)

    def _forget_generations(self) -> None:
        alive = {hand.generation for hand in self._hands.values()} | {self._newest}
        self._generations = {number: kept for number, kept in self._generations.items() if number in alive}

    def _booted(self, result: events.Result, answer: dict[str, Any]) -> None:
        if result.outcome is events.Outcome.DONE:
            where = ",".join(listener.url for listener in self._listeners)
            with contextlib.suppress(OSError):  # nobody may read it any more
                print(f"ready name={self._config.name} pid={os.getpid()} listen={where}", flush=True)  # noqa: T201
            crew.notify("READY=1")
            return
        if self._is_asked_to_stop:
            return  # nothing failed: the machine stops next
        self._failure = answer["error"]
        self._exit_code = result.status or 3
        for hand in self._hands.values():
            self._unwatch(hand.child)
            hand.child.kill()
            hand.child.reap()
            hand.close()
        self._hands.clear()

    # ---- operators

    def _answer(self, caller: int, request: dict[str, Any]) -> None:
        match request["do"]:
            case "reload":
                self._answer_reload(caller, request)
            case "status":
                self._desk.reply(caller, {"result": self._status()}, is_last=True)
            case "connections":
                self._desk.reply(caller, {"result": self._connections()}, is_last=True)
            case "stop":
                self._desk.reply(caller, {"result": {"schema": report.SCHEMA, "pid": os.getpid()}}, is_last=True)
                self._stop()
            case unknown:
                self._desk.reply(caller, {"error": f"this holder does not know {unknown!r}"}, is_last=True)

    def _answer_reload(self, caller: int, request: dict[str, Any]) -> None:
        try:
            wishes = configs.wishes({key: request.get(key) for key in ("timeout_s", "move")})
        except UsageError as problem:
            self._desk.reply(caller, {"error": str(problem)}, is_last=True)
            return
        if request.get("wait", True) or self._machine.phase is not Phase.SERVING:  # then it is told that it is busy
            self._waiting.add(caller)
            self._ask_reload(caller, wishes)
            return
        self._ask_reload(_SIGNAL, wishes)
        started = {"schema": report.SCHEMA, "outcome": "started", "exit_code": 0}
        self._desk.reply(caller, {"result": started}, is_last=True)

    def _status(self) -> dict[str, Any]:
        now_s = time.monotonic()
        self._machine.holdings.counters["denied"] = self._desk.denied
        deadline_s = self._timers.get("change", self._timers.get("stop", (None,)))[0]
        return {
            "schema": report.SCHEMA,
            "name": self._config.name,
            "pid": os.getpid(),
            "uptime_s": round(now_s - self._started_s, 3),
            "is_serving": report.is_serving(self._machine),
            **report.status(self._machine, self._hands, now_s=now_s, deadline_s=deadline_s),
            "listeners": [{"name": listener.name, "address": listener.url} for listener in self._listeners],
            "last_reload": self._last_reload,
        }

    def _connections(self) -> dict[str, Any]:
        rows = [
            report.connection_object(
                entry, self._machine, self._listeners[entry.listener].name, peer_of_descriptor(entry.descriptor)
            )
            for entry in self._machine.ledger.entries.values()
        ]
        return {"schema": report.SCHEMA, "connections": rows}


def _value(value: object) -> str:
    text = str(value)
    return repr(text) if not text or " " in text or '"' in text or "=" in text else text
