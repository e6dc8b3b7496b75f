"""
How the worker performs what its agent decides, on the event loop of the application.

It decides nothing of the protocol: messages go to the agent, effects are carried out here in their order.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, assert_never

import attrs

from copyover import messages
from copyover.channel import RETRY_S, Backlog
from copyover.errors import ChannelClosed, CopyoverError, IllegalEvent, WireError
from copyover.sockets import cookie_of
from copyover.worker import effects
from copyover.worker.accepting import Acceptor
from copyover.worker.agent import Agent
from copyover.worker.entrance import TURN_S, Entrance
from copyover.worker.poller import watcher_of
from copyover.worker.seeking import Identity, Seeker
from copyover.worker.served import Course, Served
from copyover.worker.transport import Phase, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from copyover.channel import Channel, Packet
    from copyover.worker.host import Host
    from copyover.worker.slot import Slot, Slots

log = logging.getLogger("copyover.worker")

RELEASE_S = 0.002  # how long an ended connection may wait for others, so that their releases are one message
EXIT_S = 5.0
LAST_S = 1.0
_FRESH = messages.Record(flags=messages.RecordFlag.FRESH)


@attrs.frozen
class Equipment:
    """What a worker has beside its host. Without *slots* its connections do not outlive its SIGKILL."""

    identity: Identity
    slots: Slots | None
    enters_at_once: int = sys.maxsize
    enters_a_second: float = 0.0


class Runtime:
    """One worker at work."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: Channel,
        host: Host,
        listeners: dict[int, socket.socket],
        equipment: Equipment,
    ) -> None:
        self._loop = loop
        self._slots = equipment.slots
        self._identity = equipment.identity
        self._seeker = Seeker(loop, equipment.identity, self._attach)
        self._channel: Channel | None = channel
        self._host = host
        host.forward, host.left, host.became, host.cede = self._forward, self._leave_if_done, self._became, self._cede
        # Of the listeners; of some there are connections only.
        self._names = {int(number): name for number, name in self._identity.attach.names.items()}
        self._kinds: dict[int, tuple[int, int, int]] = {}  # family, type and protocol, by listener
        self._numbers: dict[int, int] = {}  # of the listener that each connection came by
        self._acceptor = Acceptor(loop, listeners, self._accepted)
        self._entrance = Entrance(loop, host.enter, at_once=equipment.enters_at_once, rate=equipment.enters_a_second)
        self._agent = Agent()
        self._connections: dict[int, Served] = {}
        self._incoming: list[int] = []
        self._pushed: list[tuple[int, int, bytes]] = []  # to connections that have moved
        self._ended: dict[int, messages.How] = {}
        self._is_flush_due = False
        self._how: messages.How | None = None  # what ends connections from outside, once this worker is leaving
        self._is_leaving = False
        self._is_overdue = False  # it leaves whatever is still under way
        self._exit: asyncio.Future[None] = loop.create_future()
        channel.on_backlog = self._on_backlog
        watcher_of(loop)  # what it needs it has from the start

    async def run(self) -> None:
        """Serve until the holder lets this worker go."""
        if self._channel is not None:  # else the holder died while this worker became ready
            self._loop.add_reader(self._channel.fileno(), self._channel_readable)
        await self._exit
        self._acceptor.switch(is_on=False)
        try:
            await asyncio.wait_for(self._host.stop(), EXIT_S)
        except Exception:
            log.exception("the application's shutdown failed")

    # ---- the channel

    def _channel_readable(self) -> None:
        end_s = time.monotonic() + TURN_S
        while self._channel is not None:
            try:
                packet = self._channel.receive()
            except BlockingIOError:
                return
            except ChannelClosed:
                self._detach()
                return
            except WireError as problem:
                self._object(problem)
                return
            with packet:
                self._take(packet)
            if time.monotonic() > end_s:
                return

    def _take(self, packet: Packet) -> None:
        self._flush_ended()
        self._flush_pushed()
        self._incoming = packet.take() if isinstance(packet.message, messages.Stage) else []
        try:
            self._perform(self._agent.handle(packet.message, time.monotonic_ns()))
        except (IllegalEvent, WireError) as problem:
            self._object(problem)

    def _object(self, problem: CopyoverError) -> None:
        """The holder sent what means nothing here: a move under way must not go on, those that are served must."""
        log.error("event=refused problem=%r", str(problem))
        self.send(messages.Failed(reason=f"a worker could not follow the holder: {problem}", status=3))

    def _detach(self) -> None:
        """The holder is gone: serve on, and accept; a new holder takes over what cannot be lent meanwhile."""
        if self._channel is None:
            return
        advice = f"run it again and it takes over, or end this worker with SIGTERM to pid {os.getpid()}"
        log.warning("the holder of this worker is gone, it serves on without; %s", advice)
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        channel, self._channel = self._channel, None
        channel.close()
        self._acceptor.hold("backlog", is_held=False)
        self._flush_ended()
        self._perform(self._agent.orphaned())
        self._seeker.seek()

    def _attach(self, channel: Channel, recall: messages.Recall) -> None:
        """Another holder has come: tell it everything, and work with it as with the first."""
        log.info("event=attached connections=%d", len(self._connections))
        self._flush_ended()  # to nobody: the report tells of these, and comes first on the channel
        self._channel = channel
        channel.on_backlog = self._on_backlog
        self._loop.add_reader(channel.fileno(), self._channel_readable)
        self._perform(self._agent.handle(recall))

    def _report(self) -> None:
        attach = attrs.evolve(
            self._identity.attach,
            is_committed=self._agent.is_committed,
            is_leaving=self._agent.is_leaving,
            listener=tuple(self._acceptor.listeners),
        )
        self.send(attach, [listener.fileno() for listener in self._acceptor.listeners.values()])
        records = {}
        for cookie in self._agent.waiting():
            records[cookie] = self._record_of(self._connections[cookie])
        self._perform(self._agent.recalled(records, self._numbers))

    def _on_backlog(self, backlog: Backlog) -> None:
        if self._channel is None:
            return
        if backlog is Backlog.FULL:
            self._loop.add_writer(self._channel.fileno(), self._flush_channel)
        else:
            self._loop.remove_writer(self._channel.fileno())
        if backlog is Backlog.SCARCE:
            self._loop.call_later(RETRY_S, self._flush_channel)
        self._acceptor.hold("backlog", is_held=backlog is not Backlog.NONE)
        self._leave_if_done()

    def _flush_channel(self) -> None:
        if self._channel is None:
            return  # the holder went while this waited for its time
        try:
            self._channel.flush()
        except ChannelClosed:
            self._detach()

    def send(
        self, message: messages.Message, descriptors: Sequence[int] = (), on_sent: Callable[[], None] | None = None
    ) -> None:
        """Send to the holder; without one, it is as if it had been told."""
        if self._channel is not None:
            try:
                self._channel.send(message, descriptors, on_sent)
            except ChannelClosed:
                self._detach()  # closing the channel calls on_sent
        elif on_sent is not None:
            on_sent()

    # ---- effects

    def _perform(self, wanted: list[effects.Effect]) -> None:  # noqa: C901, PLR0912  # one case an effect
        for effect in wanted:
            match effect:
                case effects.Send(message, cookies):
                    self._send_effect(message, cookies)
                case effects.Build(cookies, listeners):
                    self._build_staged(cookies, listeners)
                case effects.Catch(freeze, cookies):
                    self._catch(freeze, cookies)
                case effects.Halt(batch, cookies):
                    self._halt(batch, cookies)
                case effects.LetGoOn(cookies):
                    for cookie in cookies:
                        self._connections[cookie].go_on()
                case effects.Withdraw(cookies):
                    self._perform(self._agent.withdrawn({cookie: self._let_go_on(cookie) for cookie in cookies}))
                case effects.Export():
                    self._export(effect)
                case effects.Restore(cookies, records):
                    self._restore(cookies, records)
                case effects.ImportShared(shared):
                    self._import_shared(shared)
                case effects.Serve(cookies, is_cut):
                    self._serve(cookies, is_cut=is_cut)
                case effects.Deliver(cookies, acts, pushed):
                    for cookie, act, data in zip(cookies, acts, pushed, strict=True):
                        if cookie in self._connections:
                            self._connections[cookie].deliver(act, data)
                case effects.Discard(cookies):
                    self._discard(cookies)
                case effects.Accept(is_on):
                    self._acceptor.switch(is_on=is_on)
                case effects.MoveBegins():
                    # A generation-2 collection alone is a pause of 69 ms at 15 000 connections.
                    gc.disable()
                case effects.MoveEnds():
                    # What has moved is left out for good: to look at all of it once would be that very pause.
                    gc.freeze()
                    gc.enable()
                case effects.Report():
                    self._report()
                case effects.Retire(drain_s):
                    self._retire(drain_s)
                case effects.StopServing(drain_s):
                    self._stop_serving(drain_s)
                case effects.SetTimer(name, after_s):
                    self._loop.call_later(after_s, self._timer_fired, name)
                case _:
                    assert_never(effect)

    def _timer_fired(self, name: str) -> None:
        self._flush_ended()
        self._perform(self._agent.timer(name))

    def _send_effect(self, message: messages.Message, cookies: tuple[int, ...]) -> None:
        if isinstance(message, messages.Lend):
            descriptors = [self._connections[cookie].transport.socket.fileno() for cookie in cookies]
            self.send(message, descriptors, on_sent=lambda: self._start_fresh(cookies))
        else:  # a view has descriptors, too
            self.send(message, [self._connections[cookie].transport.socket.fileno() for cookie in cookies])

    # ---- fresh connections

    def _accepted(self, listener: int, socks: list[socket.socket]) -> None:
        """Lend them, before the first read of any."""
        self._flush_ended()
        fresh = [self._build(sock, cookie_of(sock), listener) for sock in socks]
        for connection in fresh:
            self._take_slot(connection, 0, _FRESH)
        cookies = [connection.cookie for connection in fresh]
        self._perform(self._agent.accepted(cookies, listener, self._host.kind))

    def _build(self, sock: socket.socket, cookie: int, number: int) -> Served:
        self._numbers[cookie] = number
        transport = Transport(self._loop, sock)
        connection = self._host.build(transport, cookie=cookie, listener=self._names[number])
        transport.on_closed = lambda: self._closed(connection)
        self._connections[cookie] = connection
        return connection

    def _take_slot(self, connection: Served, epoch: int, record: messages.Record) -> None:
        slot = connection.slot = connection.slot or self._reserve_slot()
        if slot is None:
            return
        slot.open(connection.cookie, epoch, record)
        family, _, _ = self._kind_of(self._numbers[connection.cookie], connection.transport.socket)
        if family == socket.AF_UNIX:
            connection.transport.mark = slot.touch

    def _reserve_slot(self) -> Slot | None:
        return None if self._slots is None else self._slots.reserve()

    def _start_fresh(self, cookies: Sequence[int]) -> None:
        for cookie in cookies:
            connection = self._connections[cookie]
            connection.transport.start()
            connection.is_entered = True
            self._host.enter(connection)

    def _became(self, connection: Served) -> None:
        """It is served as something else than before."""
        self._flush_ended()
        self._perform(self._agent.became({connection.cookie: connection.kind}))

    def _cede(self, connection: Served) -> None:
        """It stayed behind, and stands at a boundary now: who serves may have it."""
        if not self._is_leaving:
            return
        self._flush_ended()
        if not self._agent.is_cedable(connection.cookie) or not connection.is_at_boundary:
            return
        connection.ask_to_halt(_nothing)
        try:
            record = self._record_of(connection)
        except Exception as problem:  # noqa: BLE001  # whatever encode raises keeps the connection here
            log.warning("connection=%d stays: %s", connection.cookie, _sentence(problem))
            connection.go_on()
        else:
            self._perform(self._agent.ceded({connection.cookie: record}))

    def _forward(self, cookie: int, act: messages.Act, data: bytes) -> bool:
        """Pass on what was done to a connection that has moved; False if there is nobody to pass it to."""
        if self._channel is None:
            return False
        if not self._pushed:
            self._loop.call_soon(self._flush_pushed)
        self._pushed.append((cookie, act, data))
        return True

    def _flush_pushed(self) -> None:
        if self._pushed:
            pushed, self._pushed = self._pushed, []
            self._perform(self._agent.forward(pushed))
            self._leave_if_done()

    # ---- endings

    def _closed(self, connection: Served) -> None:
        transport = connection.transport
        how = messages.How.CLOSED
        if self._how is not None:
            how = self._how
        elif transport.was_aborted:
            how = messages.How.ABORTED
        elif transport.error is not None:
            how = messages.How.RESET
        connection.leave_slot()
        if connection.on_boundary is not None:
            connection.on_boundary(connection)
        self._connections.pop(connection.cookie, None)
        self._numbers.pop(connection.cookie, None)
        self._host.forget(connection)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_later(RELEASE_S, self._flush_late)
        self._ended[connection.cookie] = how

    def _flush_late(self) -> None:
        self._is_flush_due = False
        self._flush_ended()

    def _flush_ended(self) -> None:
        """Releases go out in batches: before whatever else is sent, or after a while."""
        if self._ended:
            ended, self._ended = self._ended, {}
            self._perform(self._agent.ended(ended))
        self._leave_if_done()

    def _retire(self, drain_s: float) -> None:
        if not self._is_leaving:
            log.info("event=retiring connections=%d", len(self._connections))
        self._is_leaving = True
        self._acceptor.close()
        self._loop.call_later(drain_s, self._end_all, messages.How.EXPIRED)
        for connection in list(self._connections.values()):
            connection.settle()
        self._leave_if_done()

    def _stop_serving(self, drain_s: float) -> None:
        self._is_leaving = True
        self._how = messages.How.STOPPED
        for connection in self._ours():
            connection.stop()
        self._loop.call_later(drain_s, self._end_all, messages.How.STOPPED)
        self._leave_if_done()

    def _end_all(self, how: messages.How) -> None:
        """The limit is reached: send what is unsent, for a second, then break off."""
        self._how = how
        for connection in self._ours():
            connection.stop()
            connection.transport.finish()
        self._loop.call_later(LAST_S, self._break_off)

    def _ours(self) -> list[Served]:
        """Return those that nobody else may be serving: not what was ceded, or was frozen."""
        return [connection for connection in self._connections.values() if connection.course is not Course.FROZEN]

    def _break_off(self) -> None:
        for connection in self._ours():
            if connection.transport.phase is Phase.LINGERING:
                connection.transport.close()
            else:
                connection.transport.abort()
        self._is_overdue = True
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if not self._is_leaving:
            return
        is_told = not self._pushed and (self._channel is None or not self._channel.has_backlog)
        is_busy = self._connections or self._ended or (self._host.is_busy and not self._is_overdue)
        if is_told and not (is_busy or self._exit.done()):
            self._exit.set_result(None)

    def terminate(self) -> None:
        """SIGTERM is the holder's business; without a holder it ends this worker."""
        if self._channel is not None:
            log.warning("a worker leaves when its holder says so; send SIGTERM to the holder")
        else:
            self._acceptor.switch(is_on=False)
            self._stop_serving(EXIT_S)

    # ---- the move

    def _build_staged(self, cookies: Sequence[int], listeners: Sequence[int]) -> None:
        for cookie, listener, descriptor in zip(cookies, listeners, self._incoming, strict=True):
            if listener not in self._names:
                raise WireError(f"connection {cookie} was staged as one of listener {listener}, which has no name here")
            sock = self._socket_of(descriptor, listener)
            if cookie_of(sock) != cookie:
                raise WireError(f"what was staged as connection {cookie} is connection {cookie_of(sock)}")
            self._build(sock, cookie, listener).slot = self._reserve_slot()
        self._incoming = []

    def _socket_of(self, descriptor: int, listener: int) -> socket.socket:
        """Return a socket of *descriptor*; what kind it is takes three system calls to find out, once a listener."""
        kind = self._kinds.get(listener)
        if kind is not None:
            return socket.socket(*kind, descriptor)
        first = socket.socket(fileno=descriptor)
        self._kind_of(listener, first)
        return first

    def _kind_of(self, listener: int, sock: socket.socket) -> tuple[int, int, int]:
        kind = self._kinds.get(listener)
        if kind is None:
            kind = self._kinds[listener] = sock.family, sock.type, sock.proto
        return kind

    def _catch(self, freeze: messages.Freeze, cookies: tuple[int, ...]) -> None:
        """Whose handler has returned at its top is as one that hangs there: the client has seen nothing of it."""
        served = [self._connections[cookie] for cookie in cookies]
        at_boundary = {one.cookie for one in served if one.is_at_boundary and not one.is_left}
        others = [one for one in served if one.cookie not in at_boundary]
        for connection in others:
            connection.abandon()
        self._perform(self._agent.caught(freeze, at_boundary, time.monotonic_ns()))
        self._perform(self._agent.forward([(one.cookie, *act) for one in others for act in one.acts_of_others]))

    def _halt(self, batch: int, cookies: tuple[int, ...]) -> None:
        """Those that stand at a boundary halt; the others report when they do; some never will."""
        halted, obstacles = [], {}
        for cookie in cookies:
            connection = self._connections[cookie]
            obstacle = connection.obstacle
            if obstacle is not None:
                obstacles[cookie] = obstacle
            elif connection.ask_to_halt(functools.partial(self._halted_late, cookie)):
                halted.append(cookie)
        self._perform(self._agent.halted(batch, halted))
        if obstacles:
            self._perform(self._agent.withdrawn(obstacles))

    def _halted_late(self, cookie: int) -> None:
        self._flush_ended()
        self._perform(self._agent.halted(0, [cookie]))

    def _let_go_on(self, cookie: int) -> str:
        connection = self._connections[cookie]
        reason = connection.reason
        connection.go_on()
        return reason

    def _export(self, asked: effects.Export) -> None:
        records: dict[int, messages.Record] = {}
        refusals: dict[int, str] = {}
        for cookie in asked.cookies:
            connection = self._connections[cookie]
            try:
                records[cookie] = self._record_of(connection)
            except Exception as problem:  # noqa: BLE001  # whatever encode raises keeps the connection here
                refusals[cookie] = _sentence(problem)
                log.warning("connection=%d stays: %s", cookie, refusals[cookie])
        shared = self._export_shared() if asked.is_cut else None
        self._perform(self._agent.exported(asked, records, refusals, shared))
        for cookie in refusals:
            if cookie in self._connections:
                self._connections[cookie].go_on()

    def _record_of(self, connection: Served) -> messages.Record:
        """Take its record; what encode raises passes."""
        state = None if connection.slot is None else connection.slot.encoded(connection.state)
        if state is None:
            state = self._host.encode_state(connection.state)
        return connection.export(schema=self._host.schema, state=state)

    def _export_shared(self) -> bytes | None:
        try:
            return self._host.encode_shared()
        except Exception as problem:  # noqa: BLE001  # whatever the application raises refuses the move
            _explain("export_shared", problem)
            self.send(messages.Failed(reason=f"the incumbent's export_shared: {_sentence(problem)}", status=3))
            return None

    def _import_shared(self, shared: Sequence[bytes]) -> None:
        try:
            self._host.decode_shared(shared)
        except Exception as problem:  # noqa: BLE001  # whatever the application raises refuses the move
            _explain("import_shared", problem)
            self.send(messages.Failed(reason=f"the replacement's import_shared: {_sentence(problem)}", status=3))
            leave(3)

    def _restore(self, cookies: Sequence[int], records: tuple[messages.Record, ...]) -> None:
        failures = {}
        seats = self._agent.seats
        for cookie, record in zip(cookies, records, strict=True):
            connection = self._connections[cookie]
            epoch = seats[cookie].epoch
            if record.flags & messages.RecordFlag.UNSERVED:
                connection.move_slot(epoch)
                continue  # nobody served it since: the very coroutine goes on
            if connection.course is not Course.RUNNING:
                connection = self._rebuild(connection)
            try:
                state = self._host.decode_state(record)
            except Exception as problem:  # noqa: BLE001  # whatever decode raises gives the connection back
                failures[cookie] = f"its state cannot be read by the replacement: {_sentence(problem)}"
                log.warning("connection=%d %s", cookie, failures[cookie])
            else:
                connection.restore(record, state)
                self._take_slot(connection, epoch, record)
                if connection.slot is not None:
                    connection.slot.begin(connection.state, record)
        self._perform(self._agent.restored(failures))

    def _rebuild(self, stale: Served) -> Served:
        """Somebody else has served it meanwhile: the coroutine that waits here is of the past."""
        self._host.put_to_sleep(stale)
        stale.leave_slot()
        return self._build(stale.transport.socket, stale.cookie, self._numbers[stale.cookie])

    def _serve(self, cookies: tuple[int, ...], *, is_cut: bool) -> None:
        entering: list[Served] = []
        others: list[Served] = []
        for cookie in cookies:
            connection = self._connections[cookie]
            is_to_enter = not connection.is_entered and connection.transport.phase is Phase.OPEN
            (entering if is_to_enter else others).append(connection)
        if is_cut:
            self._entered(others)
            if self._entrance.is_paced:  # nobody waits for the last of them
                self._entered(entering)
        for connection in others:
            if connection.course is Course.RUNNING:
                connection.transport.start()
                continue
            connection.go_on()
            if self._how is not None:
                connection.stop()  # the others were told so while it was away
        for connection in entering:
            connection.revive()
        if entering:
            self._entrance.admit(entering, self._entered if is_cut else None)

    def _entered(self, connections: Sequence[Served]) -> None:
        self._flush_ended()
        cookies = [connection.cookie for connection in connections]
        self._perform(self._agent.entered(cookies, time.monotonic_ns()))

    def _discard(self, cookies: tuple[int, ...]) -> None:
        for cookie in cookies:
            connection = self._connections.pop(cookie)
            connection.leave_slot()
            del self._numbers[cookie]
            connection.transport.on_closed = _nothing
            connection.transport.close()
            self._host.put_to_sleep(connection)
        self._leave_if_done()


def leave(status: int) -> None:
    """
    End this process now.

    Not sys.exit: the coroutines of connections that moved would be closed, and their finally blocks would run.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _explain(what: str, problem: Exception) -> None:
    """Log it; what the application raised has a traceback that its author needs."""
    log.error(
        "%s failed: %s", what, _sentence(problem), exc_info=None if isinstance(problem, CopyoverError) else problem
    )


def _sentence(problem: Exception) -> str:
    return str(problem) if isinstance(problem, CopyoverError) else f"{type(problem).__name__}: {problem}"


def _nothing() -> None:
    pass
