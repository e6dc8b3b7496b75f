"""
Drives the real machine of the holder and the real agents of its workers through interleavings that no test would think
of: messages cross, workers are killed, timers fire early, connections end and come at any moment.

It simulates the kernel, the channels and the runtime; nothing here opens a socket.
"""

from __future__ import annotations

import collections
import enum
import itertools
import random
from typing import TYPE_CHECKING, Any, assert_never

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from copyover import events, messages, reload, wire
from copyover.change import Phase
from copyover.entries import Standing
from copyover.errors import IllegalEvent
from copyover.holdings import ACKED_TOGETHER, Strength
from copyover.worker import agent, effects

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

READY = messages.Ready(application="app:main", loop="asyncio", writes=1, reads=[1], shares=True, interface="handler")
BECOMES = {
    messages.Kind.HANDLER: (),
    messages.Kind.HTTP: (messages.Kind.WEBSOCKET, messages.Kind.STREAM),
    messages.Kind.WEBSOCKET: (),
    messages.Kind.STREAM: (messages.Kind.HTTP,),
}
MOST_CONNECTIONS = 4
MOST_RELOADS = 3
MOST_KILLS = 2
MOST_PUSHES = 12
ALL_ARE_IN = "all are in"  # the moment at which the last of a cut has been entered


class Course(enum.Enum):
    """What the simulated runtime does with a connection; see worker/connection.py."""

    RUNNING = "running"
    ASKED = "asked"
    HALTED = "halted"
    INERT = "inert"  # frozen, or built and paused


@attrs.define
class Local:
    """One connection in one worker: the memory that is lost when it is killed."""

    version: int = -1  # -1: it has no state yet
    kind: messages.Kind = messages.Kind.HANDLER
    course: Course = Course.INERT
    is_at_boundary: bool = True
    output: list[int] = attrs.field(factory=list)  # pushed, unsent: it is halted or paused
    brought: int = 0  # of that, what came with its record
    has_coroutine: bool = False


@attrs.define
class Truth:
    """What the client could tell of its connection."""

    version: int = 0
    kind: messages.Kind = messages.Kind.HANDLER
    listener: int = 0
    has_ended: bool = False
    is_lost: bool = False
    received: list[int] = attrs.field(factory=list)  # what was pushed, as it came
    pushed: list[int] = attrs.field(factory=list)

    @property
    def is_live(self) -> bool:
        return not self.has_ended and not self.is_lost


@attrs.define
class Packet:
    """The bytes of one message on a channel, and the names of its descriptors."""

    head: bytes
    body: bytes
    descriptors: tuple[int, ...]

    def decoded(self) -> messages.Message:
        return wire.decode(wire.decode_header(self.head), self.body)


def packed(message: messages.Message, descriptors: Sequence[int] = ()) -> Packet:
    header, body = wire.encode(message, descriptors=len(descriptors))
    return Packet(header.pack(), body, tuple(descriptors))


class Process:
    """One worker: a real agent in a simulated runtime."""

    def __init__(self, world: World, number: int, generation: int) -> None:
        self.world = world
        self.number = number
        self.generation = generation
        self.agent = agent.Agent()
        self.locals: dict[int, Local] = {}
        self.inbox: collections.deque[Packet] = collections.deque()
        self.outbox: collections.deque[Packet] = collections.deque()
        self.timers: list[str] = []
        self.cut: tuple[int, ...] = ()  # what is being entered
        self.adopted: set[tuple[int, int]] = set()
        self.departed: set[int] = set()  # frozen here: who pushes to them here pushes to somebody else's
        self.is_started = False
        self.is_alive = True
        self.is_buried = False
        self.is_accepting = False
        self.is_leaving = False
        self.is_stopping = False
        self.has_shared = False
        self.must_share = world.is_cut_asked  # nothing may be entered before the shared state is imported

    # ---- what the runtime does

    def start(self) -> None:
        self.is_started = True
        self.send(READY)

    def send(self, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
        if not self.world.is_orphaned:
            self.outbox.append(packed(message, descriptors))

    def take(self) -> None:
        packet = self.inbox.popleft()
        self.perform(self.agent.handle(packet.decoded(), now_ns=1_000))

    def perform(self, wanted: Iterable[effects.Effect]) -> None:
        for effect in wanted:
            self.perform_one(effect)
        if self.is_leaving and not self.locals:
            self.is_alive = False

    def perform_one(self, effect: effects.Effect) -> None:  # noqa: C901, PLR0912  # one arm an effect
        match effect:
            case effects.Send(message, cookies):
                if isinstance(message, messages.Adopted):
                    self.adopted.update(zip(message.cookie, message.epoch, strict=True))
                self.send(message, cookies)
            case effects.Build(cookies, listeners):
                assert self.world.known[self.generation].issuperset(listeners), "of a listener without a name"
                for cookie in cookies:
                    assert cookie not in self.locals, "built twice"
                    self.locals[cookie] = Local()
            case effects.Catch(freeze, cookies):
                self.catch(freeze, cookies)
            case effects.Halt(batch, cookies):
                self.perform(self.agent.halted(batch, [cookie for cookie in cookies if self.ask_to_halt(cookie)]))
            case effects.Withdraw(cookies):
                for cookie in cookies:
                    self.go_on(cookie)
                self.perform(self.agent.withdrawn(dict.fromkeys(cookies, "busy")))
            case effects.Export():
                self.export(effect)
            case effects.Restore(cookies, records):
                self.restore(cookies, records)
            case effects.ImportShared():
                self.has_shared = True
            case effects.Serve(cookies, is_cut):
                if is_cut:
                    self.cut += cookies
                    for cookie in cookies[::3]:  # these take their time at their tops
                        self.locals[cookie].is_at_boundary = False
                    self.timers.append(ALL_ARE_IN)
                else:
                    self.enter_all(cookies)
            case effects.Deliver(cookies, acts, pushed):
                for cookie, act, data in zip(cookies, acts, pushed, strict=True):
                    if act == messages.Act.CLOSE:
                        self.end(cookie)
                    else:
                        self.deliver(cookie, data[0])
            case effects.Discard(cookies):
                for cookie in cookies:
                    assert self.locals.pop(cookie).course is Course.INERT, "discarded while it is served"
            case effects.Accept(is_on):
                self.is_accepting = is_on and not self.is_leaving
            case effects.Retire() | effects.StopServing():
                self.is_leaving, self.is_accepting = True, False
                self.is_stopping |= isinstance(effect, effects.StopServing) or effect.drain_s == 0
            case effects.SetTimer(name):
                self.timers.append(name)
            case effects.MoveBegins() | effects.MoveEnds() | effects.Report():
                pass
            case effects.LetGoOn(cookies):
                for cookie in cookies:
                    self.go_on(cookie)
            case _:
                assert_never(effect)

    def catch(self, freeze: messages.Freeze, cookies: Sequence[int]) -> None:
        """Some have reached a boundary, the others are at their tops: nobody has seen anything of them."""
        there = {cookie for cookie in cookies if self.locals[cookie].is_at_boundary}
        pushed = [
            (cookie, messages.Act.SEND, bytes([data]))
            for cookie in cookies
            if cookie not in there
            for data in self.locals[cookie].output[self.locals[cookie].brought :]
        ]
        self.cut = tuple([one for one in self.cut if one in there or one not in cookies])
        self.departed.update(set(cookies) - there)
        self.perform(self.agent.caught(freeze, there, 1_000))
        self.perform(self.agent.forward(pushed))

    def ask_to_halt(self, cookie: int) -> bool:
        local = self.locals[cookie]
        local.course = Course.HALTED if local.is_at_boundary else Course.ASKED
        if not local.is_at_boundary:  # it was being entered, perhaps: what was pushed to it leaves when all are in
            self.world.truths[cookie].received += local.output
            local.output.clear()
        return local.is_at_boundary

    def export(self, asked: effects.Export) -> None:
        records, refusals = {}, {}
        for cookie in asked.cookies:
            if (self.number, cookie) in self.world.cannot_export:
                refusals[cookie] = "too large"
                continue
            flags = messages.RecordFlag.CUT if asked.is_cut else 0
            records[cookie] = self.part_with(cookie, flags)
        self.perform(self.agent.exported(asked, records, refusals, b"shared" if asked.is_cut else None))
        for cookie in refusals:
            if cookie in self.locals:
                self.go_on(cookie)

    def part_with(self, cookie: int, flags: int) -> messages.Record:
        local = self.locals[cookie]
        local.course = Course.INERT
        self.departed.add(cookie)
        self.cut = tuple([one for one in self.cut if one != cookie])
        return attrs.evolve(self.record_of(local), flags=flags, halted_ns=500)

    def record_of(self, local: Local) -> messages.Record:
        state = local.version.to_bytes(4, "little", signed=True)
        return messages.Record(local.kind, schema=1, unsent=bytes(local.output), state=state)

    def restore(self, cookies: Sequence[int], records: tuple[messages.Record, ...]) -> None:
        failures = {}
        for cookie, record in zip(cookies, records, strict=True):
            if record.flags & messages.RecordFlag.UNSERVED:
                local = self.locals[cookie]  # without a coroutine it is entered, with the record that it had
                assert local.has_coroutine or local.version >= 0, "told to go on with what it never had"
            elif (self.number, cookie) in self.world.cannot_restore:
                failures[cookie] = "cannot read it"
            else:
                version = int.from_bytes(record.state, "little", signed=True)
                self.locals[cookie] = Local(
                    version, messages.Kind(record.kind), output=list(record.unsent), brought=len(record.unsent)
                )
        self.perform(self.agent.restored(failures))

    def enter_cut(self) -> None:
        """The last of them has reached its top's boundary; those that are not here any more are somebody else's."""
        here = [cookie for cookie in self.cut if cookie in self.locals and self.locals[cookie].course is Course.INERT]
        self.cut = ()
        for cookie in here:
            self.locals[cookie].is_at_boundary = True
        self.perform(self.agent.entered(here, 1_000))
        self.enter_all(here)

    def enter_all(self, cookies: Iterable[int]) -> None:
        for cookie in cookies:
            self.enter(cookie)

    def enter(self, cookie: int) -> None:
        assert (cookie, self.agent.seats[cookie].epoch) in self.adopted, "served before adopted was queued"
        self.departed.discard(cookie)
        self.go_on(cookie)
        change = self.world.machine.change
        move = None if change is None else change.move
        # A replacement to which no incumbent's cut goes has no shared state, and HTTP as any other.
        if self.must_share and move is not None and not move.is_backwards and self.number in move._routes.values():
            has_died = not all(self.world.processes[number].is_alive for number in move.incumbents)
            is_excused = has_died or self.world.kills or self.world.has_killed
            assert self.has_shared or is_excused, "entered before the shared state was imported"

    def go_on(self, cookie: int) -> None:
        local = self.locals[cookie]
        local.course, local.has_coroutine = Course.RUNNING, True
        self.world.truths[cookie].received += local.output
        local.output.clear()

    def deliver(self, cookie: int, data: int) -> None:
        local = self.locals[cookie]
        is_sent = local.course in (Course.RUNNING, Course.ASKED)
        (self.world.truths[cookie].received if is_sent else local.output).append(data)

    # ---- what happens to it

    def accept(self, cookie: int) -> None:
        truth = self.world.truths[cookie]
        self.locals[cookie] = Local(0, truth.kind, Course.RUNNING, has_coroutine=True)
        self.perform(self.agent.accepted([cookie], truth.listener, truth.kind))

    def serve(self, cookie: int) -> None:
        """A message comes and is answered."""
        truth, local = self.world.truths[cookie], self.locals[cookie]
        assert self.agent.seats[cookie].standing in (agent.Standing.SERVING, agent.Standing.FREEZING)
        assert local.version == truth.version, f"connection {cookie} is served from a stale record"
        local.version = truth.version = truth.version + 1

    def become(self, cookie: int, kind: messages.Kind) -> None:
        """A message comes that makes it another kind: an upgrade, a stream that begins or ends."""
        self.serve(cookie)
        self.locals[cookie].kind = self.world.truths[cookie].kind = kind
        self.perform(self.agent.became({cookie: kind}))

    def cede(self, cookie: int) -> None:
        """It was kept, and is at a boundary."""
        self.perform(self.agent.ceded({cookie: self.part_with(cookie, 0)}))

    def may_cede(self, cookie: int) -> bool:
        local = self.locals[cookie]
        return self.agent.is_cedable(cookie) and local.is_at_boundary and local.course is Course.RUNNING

    def waits_for(self, cookie: int) -> bool:
        """Whether it ceded this and could go on with it, exactly."""
        seat = self.agent.seats.get(cookie)
        if seat is None or not seat.was_ceded or seat.standing is not agent.Standing.FROZEN:
            return False
        told = [message for packet in self.inbox if isinstance(message := packet.decoded(), messages.Drop)]
        is_newest = self.locals[cookie].version == self.world.truths[cookie].version
        return is_newest and not any(cookie in drop.cookie for drop in told)

    def push(self, cookie: int, data: int) -> None:
        """Another connection's handler, or a clock, sends to this one."""
        if cookie in self.departed:
            self.perform(self.agent.forward([(cookie, messages.Act.SEND, bytes([data]))]))
        else:
            self.deliver(cookie, data)

    def end(self, cookie: int) -> None:
        del self.locals[cookie]
        self.world.truths[cookie].has_ended = True
        self.perform(self.agent.ended({cookie: messages.How.CLOSED}))

    def turn(self, cookie: int) -> None:
        """It leaves its boundary, or comes to one."""
        local = self.locals[cookie]
        local.is_at_boundary = not local.is_at_boundary
        if local.is_at_boundary and local.course is Course.ASKED:
            local.course = Course.HALTED
            self.perform(self.agent.halted(0, [cookie]))

    def fire(self, name: str) -> None:
        self.timers.remove(name)
        if name == ALL_ARE_IN:
            self.enter_cut()
        else:
            self.perform(self.agent.timer(name))

    def report(self) -> list[Packet]:
        """Tell a new holder everything."""
        records = {}
        for cookie in self.agent.waiting():
            records[cookie] = attrs.evolve(self.record_of(self.locals[cookie]), halted_ns=500)
        told = self.agent.recalled(records, dict.fromkeys(self.locals, 0))
        return [packed(effect.message, effect.cookies) for effect in told if isinstance(effect, effects.Send)]

    def has_slot(self, cookie: int, epoch: int) -> bool:
        """Whether this dead worker has written its slot at that epoch: before it served, or never."""
        seat, local = self.agent.seats.get(cookie), self.locals.get(cookie)
        return seat is not None and local is not None and local.version >= 0 and seat.epoch == epoch

    def slot_of(self, cookie: int) -> messages.Record | None:
        """Return what its last boundary was, if the kernel proves that it stood there when it was killed."""
        local = self.locals[cookie]
        if not local.is_at_boundary:
            return None
        return attrs.evolve(self.record_of(local), kind=0)  # a slot does not tell it

    def serving(self) -> list[int]:
        return [cookie for cookie, local in self.locals.items() if local.course in (Course.RUNNING, Course.ASKED)]


Choice = tuple[Any, ...]


class World:
    """A holder, its workers, their channels and clients; ``choices`` is all that can happen next."""

    def __init__(self, *, workers: int = 1, capacity: int = 1 << 30) -> None:
        self.capacity = capacity
        self.machine = reload.Machine(capacity)
        self.is_orphaned = False  # the holder is dead
        self.holder_kills = 0
        self.processes: dict[int, Process] = {}
        self.truths: dict[int, Truth] = {}
        self.known: dict[int, set[int]] = {}  # the listeners that each generation knows
        self.descriptors: dict[int, int] = {}  # the holder's open ones, and the connection of each
        self.timers: set[str] = set()
        self.results: list[events.Result] = []
        self.noted: collections.Counter[str] = collections.Counter()
        self.cannot_export: set[tuple[int, int]] = set()
        self.cannot_restore: set[tuple[int, int]] = set()
        self.may_be_lost: set[int] = set()
        self.trace: list[Choice] = []
        self.kills = 0
        self.has_killed = False
        self.reloads = 0
        self.now_s = 0.0
        self.is_cut_asked = False
        self._numbers = itertools.count(100)
        self.reload("together", workers)
        self.settle()
        assert self.machine.holdings.generation == 1

    # ---- what the holder does

    def handle(self, event: events.Event) -> None:
        self.now_s += 0.001
        for effect in self.machine.handle(event, self.now_s):
            self.perform(effect)

    def perform(self, effect: events.Effect) -> None:  # noqa: C901, PLR0912  # one arm an effect
        match effect:
            case events.Send(worker, message, descriptors):
                self.check_descriptors(message, descriptors)
                if self.processes[worker].is_alive:
                    self.processes[worker].inbox.append(packed(message, descriptors))
            case events.Spawn(worker, generation):
                self.processes[worker] = Process(self, worker, generation)
            case events.Kill(worker):
                self.kill(worker)
            case events.Close(descriptors):
                for descriptor in descriptors:
                    self.close(self.descriptors.pop(descriptor))
            case events.Reset(descriptors):
                for descriptor in descriptors:
                    self.lose(self.descriptors.pop(descriptor))
            case events.SetTimer(name, after_s):
                (self.timers.discard if after_s is None else self.timers.add)(name)
            case events.Finished(_, result):
                self.results.append(result)
                for process in self.processes.values():
                    process.must_share = False
            case events.Note(event):
                self.noted[event] += 1
            case events.AskAgain() | events.CheckHealth():
                pass
            case _:
                assert_never(effect)

    def check_descriptors(self, message: messages.Message, descriptors: Sequence[int]) -> None:
        if isinstance(message, messages.Stage):
            assert [self.descriptors[descriptor] for descriptor in descriptors] == list(message.cookie)

    def close(self, cookie: int) -> None:
        if self.truths[cookie].is_live and cookie not in self.descriptors.values():
            known = self.known[self.machine.holdings.generation]
            assert self.truths[cookie].listener not in known, "closed while it lives"
            self.truths[cookie].has_ended = True

    def lose(self, cookie: int) -> None:
        self.truths[cookie].is_lost = True
        if self.truths[cookie].has_ended:
            return  # whoever ended it died with the holder, before it could say so
        assert not any(cookie in process.serving() for process in self.living()), "reset while it is served"
        refusing = {worker for worker, spoilt in self.cannot_restore | self.cannot_export if spoilt == cookie}
        if cookie not in self.may_be_lost:
            assert not any(process.waits_for(cookie) for process in self.living()), "reset, and its ceder waits"
        is_stopping = self.machine.phase in (Phase.STOPPING, Phase.STOPPED)
        if cookie not in self.may_be_lost and len(refusing) < 2 and not is_stopping:
            ready = {
                worker.id for worker in self.machine.holdings.workers.values() if worker.strength is Strength.READY
            }
            assert self.has_killed or ready <= refusing, "a connection was lost although nobody was killed"
            assert refusing, f"connection {cookie} was lost although it stood at a boundary"

    def receive(self, process: Process) -> None:
        packet = process.outbox.popleft()
        message = packet.decoded()
        descriptors = [next(self._numbers) for _ in packet.descriptors]
        self.descriptors.update(zip(descriptors, packet.descriptors, strict=True))
        self.handle(events.FromWorker(process.number, message, descriptors))

    def bury(self, process: Process) -> None:
        process.is_buried = True
        owned = [
            entry
            for entry in self.machine.ledger.entries()
            if entry.owner == process.number and process.has_slot(entry.cookie, entry.epoch)
        ]
        recovered = {entry.cookie: process.slot_of(entry.cookie) for entry in owned}
        self.handle(events.Reaped(process.number))
        self.handle(events.Died(process.number, "was killed by SIGKILL", recovered))

    def kill(self, worker: int) -> None:
        process = self.processes[worker]
        process.is_alive = False
        process.inbox.clear()
        self.has_killed |= bool(process.locals)
        self.may_be_lost.update(cookie for cookie, local in process.locals.items() if not local.is_at_boundary)

    def kill_holder(self) -> None:
        """Each worker reads its channel to the end; what it had sent and what was asked of it are gone."""
        self.is_orphaned, self.has_killed = True, True
        self.holder_kills += 1
        self.descriptors.clear()
        self.timers.clear()
        for process in self.processes.values():
            process.outbox.clear()
            process.is_buried |= not process.is_alive
            if process.is_alive and not process.is_started:
                process.is_alive, process.is_buried = False, True
            while process.is_alive and process.inbox:
                process.take()
            if process.is_alive:
                process.perform(process.agent.orphaned())
                process.is_buried |= not process.is_alive
        held = {cookie for process in self.living() for cookie in process.locals}
        versions = {(cookie, local.version) for process in self.living() for cookie, local in process.locals.items()}
        # Whoever had the newest died too: nobody may go on from an older record.
        self.may_be_lost.update(c for c, truth in self.truths.items() if (c, truth.version) not in versions)
        for cookie, truth in self.truths.items():
            truth.is_lost |= not truth.has_ended and cookie not in held  # both that had it are dead

    def take_over(self) -> None:
        """A new holder comes, and asks every worker for what it has."""
        self.is_orphaned = False
        self.machine = reload.Machine(self.capacity)
        asked = events.Reload(0, 0, 1, "rolling", 60.0)
        living = self.living()
        for process in self.processes.values():
            process.is_buried |= not process.is_alive
        if living:
            self.handle(events.Reunited(asked, [self.reported(process) for process in living]))
        else:
            self.reload("together", 1)

    def reported(self, process: Process) -> events.Report:
        rows: list[events.Row] = []
        tombstones: Sequence[int] = ()
        for packet in process.report():
            message = packet.decoded()
            if isinstance(message, messages.Viewed):
                tombstones = message.cookie
                continue
            view = messages.expect(message, messages.View)
            for cookie, epoch, doing, record in zip(
                view.cookie, view.epoch, view.standing, view.records(), strict=True
            ):
                descriptor = next(self._numbers)
                self.descriptors[descriptor] = cookie
                is_current = process.locals[cookie].version == self.truths[cookie].version
                is_current &= not self.truths[cookie].has_ended  # whoever ended it has sent FIN
                listener = self.truths[cookie].listener
                rows.append(events.Row(cookie, epoch, listener, messages.Doing(doing), record, is_current, descriptor))
        agent_ = process.agent
        standing = (agent_.is_committed, agent_.is_leaving)
        known = frozenset(self.known[process.generation])
        return events.Report(process.number, process.generation, READY, *standing, rows, tombstones, known)

    def reload(self, move: str, workers: int, bake_s: float = 0.0) -> None:
        self.reloads += 1
        self.is_cut_asked = move != "rolling" and bool(self.machine.holdings.serving())
        number = self.machine.holdings.generation + self.reloads
        serving = self.machine.holdings.generation
        self.known[number] = {*self.known.get(serving, {0}), number}  # each adds a listener of its own
        added = frozenset({number})
        self.handle(events.Reload(7, number, workers, move, 60.0, bake_s=bake_s, added=added))
        self.is_cut_asked = False

    def keep_some(self) -> None:
        """Have a generation retire that keeps three connections, none of them at a boundary; another one serves."""
        for cookie in (1, 2, 3):
            self.do(("accept", 1))
            self.do(("turn", 1, cookie))
        self.reload("auto", 1)
        self.settle()
        assert set(self.machine.holdings.kept) == {1, 2, 3}

    def living(self) -> list[Process]:
        return [process for process in self.processes.values() if process.is_alive]

    # ---- what can happen

    def choices(self) -> list[Choice]:
        if self.is_orphaned:
            return [("take over",), *self.timers_due(), *self.of_clients()]
        return [*self.deliveries(), *self.timers_due(), *self.of_clients(), *self.mishaps()]

    def deliveries(self) -> list[Choice]:
        found: list[Choice] = []
        for process in self.processes.values():
            if process.is_buried:
                continue
            if process.is_alive and not process.is_started:
                found.append(("start", process.number))
            if process.inbox and process.is_alive:
                found.append(("to worker", process.number))
            if process.outbox:
                found.append(("to holder", process.number))
            elif not process.is_alive:
                found.append(("bury", process.number))
        return found

    def timers_due(self) -> list[Choice]:
        return [("timer", process.number, name) for process in self.living() for name in dict.fromkeys(process.timers)]

    def of_clients(self) -> list[Choice]:
        found: list[Choice] = []
        for process in self.living():
            number = process.number
            if process.is_accepting and len(self.truths) < MOST_CONNECTIONS:
                found.append(("accept", number))
            for cookie, local in process.locals.items():
                if local.course in (Course.RUNNING, Course.ASKED):
                    found += [("serve", number, cookie), ("turn", number, cookie)]
                    found += [("become", number, cookie, kind) for kind in BECOMES[local.kind]]
                if process.may_cede(cookie):
                    found.append(("cede", number, cookie))
                if local.course is not Course.INERT or cookie in process.cut:
                    found += [("end", number, cookie), ("push", number, cookie)]
            if not self.is_orphaned:  # else it raises Moved
                found += [("push", number, cookie) for cookie in process.departed if self.truths[cookie].is_live]
        if sum(len(truth.pushed) for truth in self.truths.values()) >= MOST_PUSHES:
            return [choice for choice in found if choice[0] != "push"]
        return found

    def mishaps(self) -> list[Choice]:  # noqa: C901  # each on its condition
        found: list[Choice] = []
        if self.holder_kills < MOST_KILLS and self.machine.phase not in (Phase.STOPPING, Phase.STOPPED):
            found.append(("kill holder",))
        if self.kills < MOST_KILLS:
            found += [("kill", process.number) for process in self.living() if process.is_started]
        found += [("deadline", name) for name in sorted(self.timers) if name == "change"]
        if self.reloads <= MOST_RELOADS and self.machine.phase is Phase.SERVING:
            ways = itertools.product(("auto", "together", "rolling"), (1, 2), (0.0, 5.0))
            found += [("reload", move, workers, bake_s) for move, workers, bake_s in ways]
        if self.machine.change is not None:
            found.append(("cancel",))
        if self.machine.phase is Phase.BAKING:
            found.append(("unhealthy",))
        if self.machine.phase not in (Phase.STOPPING, Phase.STOPPED) and not self.machine._stop_wanted:
            found.append(("stop",))
        for process in self.living():
            for cookie in process.locals:
                for kind in ("cannot restore", "cannot export"):
                    if len(self.cannot_restore | self.cannot_export) < 2:
                        found.append((kind, process.number, cookie))
        return found

    def do(self, choice: Choice) -> None:  # noqa: C901, PLR0912, PLR0915  # one arm a choice
        self.trace.append(choice)
        match choice:
            case ("start", int(number)):
                self.processes[number].start()
            case ("to worker", int(number)):
                self.processes[number].take()
            case ("to holder", int(number)):
                self.receive(self.processes[number])
            case ("bury", int(number)):
                self.bury(self.processes[number])
            case ("timer", int(number), str(name)):
                self.processes[number].fire(name)
            case ("accept", int(number)):
                cookie = len(self.truths) + 1
                known = self.known[self.processes[number].generation]
                kind = messages.Kind.HTTP if cookie % 4 else messages.Kind.HANDLER
                self.truths[cookie] = Truth(kind=kind, listener=max(known) if cookie % 2 else 0)
                self.processes[number].accept(cookie)
            case ("serve", int(number), int(cookie)):
                self.processes[number].serve(cookie)
            case ("turn", int(number), int(cookie)):
                self.processes[number].turn(cookie)
            case ("become", int(number), int(cookie), messages.Kind() as kind):
                self.processes[number].become(cookie, kind)
            case ("cede", int(number), int(cookie)):
                self.processes[number].cede(cookie)
            case ("push", int(number), int(cookie)):
                data = sum(len(truth.pushed) for truth in self.truths.values())
                self.truths[cookie].pushed.append(data)
                self.processes[number].push(cookie, data)
            case ("end", int(number), int(cookie)):
                self.processes[number].end(cookie)
            case ("kill", int(number)):
                self.kills += 1
                self.kill(number)
            case ("deadline", str(name)):
                self.timers.discard(name)
                self.handle(events.TimerFired(name))
            case ("reload", str(move), int(workers), float(bake_s)):
                self.reload(move, workers, bake_s)
            case ("kill holder",):
                self.kill_holder()
            case ("take over",):
                self.take_over()
            case ("cancel",):
                self.handle(events.CancelAsked("cancelled"))
            case ("unhealthy",):
                self.handle(events.Checked("exited with 1"))
            case ("stop",):
                self.handle(events.StopAsked(10.0))
            case ("cannot restore", int(number), int(cookie)):
                self.cannot_restore.add((number, cookie))
            case ("cannot export", int(number), int(cookie)):
                self.cannot_export.add((number, cookie))
            case _:
                raise AssertionError(choice)
        self.check()

    # ---- promises

    def check(self) -> None:
        """What holds at every moment."""
        serving = collections.Counter(cookie for process in self.living() for cookie in process.serving())
        assert all(count == 1 for count in serving.values()), f"served by two workers: {serving}"
        for truth in self.truths.values():
            assert len(set(truth.received)) == len(truth.received), "a push was sent twice"
        if self.is_orphaned:
            return
        owned = collections.Counter(entry.owner for entry in self.machine.ledger.entries())
        assert +self.machine.ledger.owned == owned
        if self.machine.phase is Phase.SERVING:
            assert self.machine.change is None

    def settle(self) -> None:
        """Let everything arrive and every timer of a worker fire, until nothing is left to happen."""
        while True:
            if self.is_orphaned:
                self.do(("take over",))
            elif waiting := self.deliveries():
                self.do(waiting[0])
            elif due := self.timers_due():
                self.do(due[0])
            elif leaving := self.closing():
                self.do(leaving[0])
            elif self.machine.phase is Phase.BAKING:
                self.do(("deadline", "change"))
            else:
                return

    def closing(self) -> list[Choice]:
        """Told to stop, a worker ends its connections at their boundaries."""
        stopping = [process for process in self.living() if process.is_stopping]
        return [("end", process.number, cookie) for process in stopping for cookie in process.serving()]

    def check_settled(self) -> None:
        """What holds once nothing is under way any more."""
        machine = self.machine
        if machine.phase is Phase.STOPPED:
            assert not self.living()
            assert not self.descriptors
            assert not len(machine.ledger)
            return
        assert machine.phase is Phase.SERVING, f"stuck while {machine.phase.value}: {machine.change}"
        for cookie, truth in self.truths.items():
            owners = [process for process in self.living() if cookie in process.serving()]
            if not truth.is_live:
                assert cookie not in machine.ledger
                assert not owners
                continue
            assert len(owners) == 1, f"connection {cookie} is served by {[owner.number for owner in owners]}"
            self.check_owned(cookie, owners[0])
        assert sorted(self.descriptors) == sorted(entry.descriptor for entry in machine.ledger.entries())
        assert not machine.ledger.tombstones
        for process in self.living():
            self.check_worker(process)
        for cookie in machine.holdings.kept:
            owner = machine.holdings.workers[machine.ledger.entry(cookie).owner]
            assert owner.strength is Strength.RETIRING, f"connection {cookie} is called kept where generation serves"

    def check_owned(self, cookie: int, owner: Process) -> None:
        entry = self.machine.ledger.entry(cookie)
        assert (entry.owner, entry.standing, entry.has_passage) == (owner.number, Standing.SERVED, False)
        assert self.descriptors[entry.descriptor] == cookie
        assert self.truths[cookie].listener in self.known[owner.generation]
        assert owner.locals[cookie].version == self.truths[cookie].version
        kinds = {self.truths[cookie].kind, owner.locals[cookie].kind, owner.agent.seats[cookie].kind, entry.kind}
        assert len(kinds) == 1, f"connection {cookie} is of the kinds {kinds}"
        if not self.has_killed:
            assert sorted(self.truths[cookie].received) == self.truths[cookie].pushed, "a push was lost"
        if self.machine.holdings.workers[owner.number].strength is Strength.RETIRING:
            assert cookie in self.machine.holdings.kept, (
                f"connection {cookie} stays in a retiring generation, uncounted"
            )

    def check_worker(self, process: Process) -> None:
        standings = {seat.standing for seat in process.agent.seats.values()}
        assert standings <= {agent.Standing.SERVING}, f"worker {process.number} is left with {standings}"
        assert process.agent.seats.keys() == process.locals.keys()
        assert len(process.agent.unacked) < ACKED_TOGETHER
        worker = self.machine.holdings.workers[process.number]
        if worker.strength is Strength.READY:
            assert worker.generation == self.machine.holdings.generation
            assert process.is_accepting is not self.machine.holdings.is_full, f"worker {process.number} accepts wrongly"
        else:
            assert worker.strength is Strength.RETIRING
            assert not process.is_accepting


# ---- the searches

WEIGHTS = {
    "start": 8,
    "to worker": 10,
    "to holder": 10,
    "bury": 6,
    "timer": 1.5,
    "accept": 3,
    "serve": 2,
    "turn": 2,
    "end": 1,
    "push": 1.5,
    "become": 1,
    "cede": 3,
    "kill": 0.25,
    "deadline": 0.5,
    "reload": 4,
    "stop": 0.04,
    "cancel": 0.2,
    "kill holder": 0.15,
    "take over": 2,
    "unhealthy": 0.3,
    "cannot restore": 0.15,
    "cannot export": 0.1,
}


def walk(seed: int, *, workers: int, capacity: int, without: frozenset[str], begins_kept: bool = False) -> World:
    """Take one random way through; what clients wait for is likelier than what breaks."""
    chance = random.Random(seed)
    world = World(workers=workers, capacity=capacity)
    if begins_kept:
        world.keep_some()
    for _ in range(120):
        choices = [choice for choice in world.choices() if choice[0] not in without]
        if not choices:
            break
        alike = collections.Counter(choice[0] for choice in choices)
        weights = [WEIGHTS[choice[0]] / alike[choice[0]] ** 0.5 for choice in choices]
        world.do(chance.choices(choices, weights)[0])
    world.settle()
    world.check_settled()
    return world


def results_of_walks(
    seeds: range, *, workers: int = 1, capacity: int = 1 << 30, without: Iterable[str] = ()
) -> list[events.Result]:
    results = []
    for seed in seeds:
        try:
            results += walk(seed, workers=workers, capacity=capacity, without=frozenset(without)).results
        except (AssertionError, IllegalEvent, KeyError) as problem:
            raise AssertionError(f"seed {seed}, {workers} workers, capacity {capacity}: {problem!r}") from problem
    return results


@pytest.mark.parametrize("workers", [1, 2])
def test_without_mishaps_every_reload_ends_done_and_nothing_is_lost(workers: int) -> None:
    """Whatever crosses, a reload between healthy workers ends done and loses none."""
    mishaps = ["kill", "deadline", "cannot restore", "cannot export", "stop", "cancel", "unhealthy", "kill holder"]
    results = results_of_walks(range(400), workers=workers, without=mishaps)
    assert {result.outcome for result in results} == {events.Outcome.DONE}
    assert sum(result.lost for result in results) == 0
    assert sum(result.moved for result in results) > 100


@pytest.mark.parametrize("workers", [1, 2])
def test_without_deaths_nothing_is_lost(workers: int) -> None:
    """A deadline, a roll-back, a record that cannot be written or read: none is lost unless every worker refuses it."""
    results = results_of_walks(range(1000, 1400), workers=workers, without=["kill", "kill holder"])
    outcomes = {result.outcome for result in results}
    assert outcomes >= {events.Outcome.DONE, events.Outcome.ROLLED_BACK, events.Outcome.REFUSED}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_only_what_it_served(workers: int) -> None:
    """SIGKILL of any worker at any moment, twice: only what it was serving is lost, all else has one owner."""
    results = results_of_walks(range(2000, 2600), workers=workers)
    assert sum(result.lost for result in results) > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_holder_costs_nothing(workers: int) -> None:
    """SIGKILL of the holder at any moment: its successor finds one owner for each, with the newest state."""
    mishaps = frozenset({"kill", "deadline", "cannot restore", "cannot export", "stop"})
    for seed in range(5000, 5600):
        try:
            world = walk(seed, workers=workers, capacity=1 << 30, without=mishaps)
            assert not any(truth.is_lost for truth in world.truths.values()), "a connection was lost"
        except (AssertionError, IllegalEvent, KeyError) as problem:
            raise AssertionError(f"seed {seed}, {workers} workers: {problem!r}") from problem


@pytest.mark.parametrize(
    ("without", "seeds"),
    [
        (("kill", "kill holder", "deadline"), range(6000, 6300)),
        (("kill holder",), range(6300, 6700)),
        (("stop",), range(7100, 7500)),
    ],
    ids=["no deaths", "killed workers", "killed holders"],
)
def test_what_a_retiring_worker_cedes_goes_on(without: tuple[str, ...], seeds: range) -> None:
    """
    What was kept and comes to a boundary is served by the generation that serves, in whatever phase it comes.

    Without deaths none of it is ever lost: what nobody can read goes back, and its very coroutine goes on.
    """
    noted: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        try:
            world = walk(seed, workers=1, capacity=1 << 30, without=frozenset(without), begins_kept=True)
            if "kill" in without:
                assert not any(world.truths[cookie].is_lost for cookie in (1, 2, 3)), "what was ceded is lost"
        except (AssertionError, IllegalEvent, KeyError) as problem:
            raise AssertionError(f"seed {seed}: {problem!r}") from problem
        noted += world.noted
    assert noted["ceded"] > len(seeds) // 2
    assert noted["given-back"]


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_a_full_holder_accepts_again_once_there_is_room(capacity: int) -> None:
    """Full before, during or after a move: workers accept exactly while the holder can keep what comes."""
    results_of_walks(range(3000, 3300), workers=2, capacity=capacity)


class MoveMachine(RuleBasedStateMachine):
    """The same promises of the same world; hypothesis searches it, and shrinks what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def do_one(self, kinds: Iterable[str], pick: int) -> None:
        choices = [choice for choice in self.world.choices() if choice[0] in kinds]
        if choices:
            self.world.do(choices[pick % len(choices)])

    @initialize(workers=st.integers(1, 2), capacity=st.sampled_from([2, 3, 1 << 30]), connections=st.integers(0, 3))
    def begin(self, workers: int, capacity: int, connections: int) -> None:
        self.world = World(workers=workers, capacity=capacity)
        for number in range(connections):
            self.do_one(["accept"], number)
            self.world.settle()

    @rule(pick=st.integers(0, 7), count=st.integers(1, 4))
    def deliver(self, pick: int, count: int) -> None:
        for _ in range(count):
            self.do_one(["start", "to worker", "to holder", "bury"], pick)

    @rule(pick=st.integers(0, 3))
    def timer_of_worker_fires(self, pick: int) -> None:
        self.do_one(["timer"], pick)

    @rule(kind=st.sampled_from(["accept", "serve", "turn", "push", "become", "cede", "end"]), pick=st.integers(0, 7))
    def client_does(self, kind: str, pick: int) -> None:
        self.do_one([kind], pick)

    @rule(pick=st.integers(0, 3))
    def reload(self, pick: int) -> None:
        self.do_one(["reload"], pick)

    @precondition(lambda self: self.world.machine.change is not None)
    @rule()
    def deadline_comes(self) -> None:
        self.do_one(["deadline"], 0)

    @precondition(lambda self: self.world.kills < MOST_KILLS)
    @rule(pick=st.integers(0, 3))
    def worker_is_killed(self, pick: int) -> None:
        self.do_one(["kill"], pick)

    @precondition(lambda self: self.world.machine.change is not None)
    @rule(kind=st.sampled_from(["cancel", "unhealthy"]))
    def operator_turns_back(self, kind: str) -> None:
        self.do_one([kind], 0)

    @rule()
    def holder_is_killed(self) -> None:
        self.do_one(["kill holder"], 0)

    @precondition(lambda self: self.world.is_orphaned)
    @rule()
    def another_holder_comes(self) -> None:
        self.do_one(["take over"], 0)

    @rule(pick=st.integers(0, 7))
    def record_is_spoiled(self, pick: int) -> None:
        self.do_one(["cannot restore", "cannot export"], pick)

    @invariant()
    def promises_hold(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check_settled()


TestMove = MoveMachine.TestCase
TestMove.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
