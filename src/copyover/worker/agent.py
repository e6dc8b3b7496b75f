"""
The worker's half of the protocol: what each message of the holder means for each of its connections.

It does no I/O and knows neither asyncio nor sockets, so that a threaded server can drive it too: messages and local
events go in, effects come out.
"""

from __future__ import annotations

import collections
import enum
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from copyover import messages
from copyover.errors import IllegalEvent
from copyover.worker.effects import (
    Accept,
    Build,
    Catch,
    Deliver,
    Discard,
    Effect,
    Export,
    Halt,
    ImportShared,
    LetGoOn,
    MoveBegins,
    MoveEnds,
    Report,
    Restore,
    Retire,
    Send,
    Serve,
    SetTimer,
    StopServing,
    Withdraw,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence


_AGAIN_S = 0.05


class Standing(enum.Enum):
    """What this worker does with a connection. All transitions are methods of the Agent."""

    SERVING = "serving"
    FREEZING = "freezing"  # asked to stop, not at a boundary yet
    HALTED = "halted"  # stopped at a boundary, waiting for the cut
    FROZEN = "frozen"  # its record is sent; record, descriptor and coroutine are kept until commit
    STAGED = "staged"  # built, paused, no record yet
    THAWED = "thawed"  # it has its record and is not adopted yet


_RUNNING = (Standing.SERVING, Standing.FREEZING, Standing.HALTED)  # the holder has no record of these
_COPIES = (Standing.STAGED, Standing.FROZEN)  # another worker serves these, or will
_KINDS = tuple(messages.Kind)  # by their numbers: to call an enum costs ten times as much
_NO_RECORD = messages.Record()
_WAITING = {Standing.FROZEN: messages.Doing.FROZE, Standing.THAWED: messages.Doing.WAITS}


@attrs.define
class Seat:
    """One connection as this worker sees it."""

    standing: Standing
    kind: messages.Kind = messages.Kind.HANDLER
    epoch: int = 0
    batch: int = 0
    is_cut: bool = False
    halted_ns: int = 0
    given: messages.Record = _NO_RECORD  # of a cut, until it is adopted
    is_entering: bool = False  # thawed, and let in; not all of its cut are in yet
    was_ceded: bool = False  # if it came back nobody else can serve it: it stays


class Agent:
    """
    All connections of one worker and what the holder was told of them.

    Every method returns effects, to be performed in order.
    """

    def __init__(self) -> None:
        self.seats: dict[int, Seat] = {}
        self.unacked: collections.deque[int] = collections.deque()  # lent, to be lent again to a new holder
        self._acked = 0
        self._staged = 0
        self._gathering: set[int] | None = None  # of a cut: those that have not stopped yet
        self._gather_timer = ""
        self._waiting: dict[int, list[int]] = {}  # by batch: those that were asked to stop
        self._thawed: dict[int, Seat] = {}
        self._is_moving = False
        self._tombstones: set[int] = set()  # what has ended here since the move began
        self.is_committed = False  # told to serve, by other than a move that is still under way
        self.is_leaving = False
        self._is_retiring = False  # by a commit
        self._is_stopping = False
        self._has_holder = True

    def handle(self, message: messages.Message, now_ns: int = 0) -> list[Effect]:
        """
        Take one message of the holder at CLOCK_MONOTONIC *now_ns*.

        Raises:
            IllegalEvent: it means nothing here.

        """
        transition = self._TRANSITIONS.get(type(message))
        if transition is None:
            raise IllegalEvent(f"a worker takes no {type(message).__name__}")
        return transition(self, message, now_ns)

    # ---- accepting

    def accepted(self, cookies: Sequence[int], listener: int, kind: messages.Kind) -> list[Effect]:
        """Take fresh connections in; the lend comes before their first read."""
        for cookie in cookies:
            self.seats[cookie] = Seat(Standing.SERVING, kind)
        self.unacked.extend(cookies)
        effects: list[Effect] = []
        for chunk in _chunks(cookies, messages.MAX_DESCRIPTORS):
            rows = len(chunk)
            lend = messages.Lend(cookie=tuple(chunk), listener=(listener,) * rows, kind=(kind,) * rows)
            effects.append(Send(lend, tuple(chunk)))
        return effects

    def became(self, kinds: Mapping[int, messages.Kind]) -> list[Effect]:
        """Tell the holder what these are served as from now on; of what is not served here its record tells."""
        rows = []
        for cookie, kind in kinds.items():
            seat = self.seats.get(cookie)
            if seat is not None and seat.standing in _RUNNING and seat.kind is not kind:
                seat.kind = kind
                rows.append((cookie, seat.epoch, kind))
        effects: list[Effect] = []
        for chunk in _chunks(rows, messages.MAX_ROWS):
            cookies, epochs, told = zip(*chunk, strict=True)
            effects.append(Send(messages.Became(cookie=cookies, epoch=epochs, kind=told)))
        return effects

    def ended(self, hows: Mapping[int, messages.How]) -> list[Effect]:
        """Tell the holder which connections ended; to a freeze under way this is the answer."""
        ended = [(cookie, self.seats.pop(cookie), how) for cookie, how in hows.items() if cookie in self.seats]
        for cookie, _, _ in ended:
            self._thawed.pop(cookie, None)
        if self._is_moving:
            self._tombstones.update(cookie for cookie, _, _ in ended)
        effects: list[Effect] = [
            Send(
                messages.Release(
                    cookie=tuple([cookie for cookie, _, _ in chunk]),
                    epoch=tuple([seat.epoch for _, seat, _ in chunk]),
                    how=tuple([how for _, _, how in chunk]),
                )
            )
            for chunk in _chunks(ended, messages.MAX_ROWS)
        ]
        if self._gathering is not None:
            self._gathering.difference_update(hows)
            effects += self._close_cut_if_all_stopped()
        return effects

    def _lend_ack(self, message: messages.LendAck, _: int) -> list[Effect]:
        if not 0 <= message.total - self._acked <= len(self.unacked):
            raise IllegalEvent(f"{message.total} lends acknowledged, {self._acked} were before")
        for _ in range(message.total - self._acked):
            self.unacked.popleft()
        self._acked = message.total
        return []

    def _accept_on(self, message: messages.AcceptOn, _: int) -> list[Effect]:
        self.is_committed |= not message.moving
        self._is_moving |= message.moving
        return [Accept(is_on=True)]

    def _accept_off(self, message: messages.AcceptOff, _: int) -> list[Effect]:
        begins: list[Effect] = [MoveBegins()] if message.moving else []
        self._is_moving |= message.moving
        return [*begins, Accept(is_on=False), Send(messages.AcceptOffAck(number=message.number))]

    # ---- staging

    def _stage(self, message: messages.Stage, _: int) -> list[Effect]:
        for cookie in message.cookie:
            if cookie in self.seats:
                raise IllegalEvent(f"connection {cookie} is staged where it is {self.seats[cookie].standing.value}")
            self.seats[cookie] = Seat(Standing.STAGED)
        begins: list[Effect] = [] if self._is_moving else [MoveBegins()]
        self._is_moving = True
        self._staged += message.rows
        return [*begins, Build(message.cookie, message.listener), Send(messages.Staged(total=self._staged))]

    def _drop(self, message: messages.Drop, _: int) -> list[Effect]:
        gone = []
        for cookie in message.cookie:
            seat = self.seats.get(cookie)
            if seat is None:
                continue
            if seat.standing not in _COPIES:
                raise IllegalEvent(f"connection {cookie} is to be dropped where it is {seat.standing.value}")
            del self.seats[cookie]
            gone.append(cookie)
        return [Discard(tuple(gone))] if gone else []

    # ---- what others push

    def forward(self, rows: Sequence[tuple[int, int, bytes]]) -> list[Effect]:
        """Somebody here pushed to connections that have moved, or ended them: rows of cookie, act and bytes."""
        effects: list[Effect] = []
        for chunk in _chunks(rows, messages.MAX_ROWS):
            cookies, acts, pushed = zip(*chunk, strict=True)
            effects.append(Send(messages.Forward(cookie=cookies, act=acts, pushed=pushed)))
        return effects

    def _push(self, message: messages.Push, _: int) -> list[Effect]:
        ours: list[tuple[int, int, bytes]] = []
        moved: list[tuple[int, int, bytes]] = []
        for row in zip(message.cookie, message.act, message.pushed, strict=True):
            seat = self.seats.get(row[0])
            if seat is not None:
                (moved if seat.standing is Standing.FROZEN else ours).append(row)
        effects: list[Effect] = []
        if ours:
            cookies, acts, pushed = zip(*ours, strict=True)
            effects.append(Deliver(cookies, acts, pushed))
        return effects + self.forward(moved)

    # ---- freezing

    def _freeze(self, message: messages.Freeze, _: int) -> list[Effect]:
        entering = tuple([cookie for cookie in message.cookie if self._is_entering(cookie)])
        return [Catch(message, entering)] if entering else self._freeze_all(message)

    def caught(self, message: messages.Freeze, at_boundary: Collection[int], now_ns: int) -> list[Effect]:
        """
        Freeze as *message* says: of those that are being entered these stand at a boundary.

        They are adopted and stop there, with what others pushed to them. Who is at its top goes back as it was given:
        nothing of it was read or sent, and it may hang there.
        """
        others = [cookie for cookie in message.cookie if self._is_entering(cookie) and cookie not in at_boundary]
        records = {}
        for cookie in others:
            seat = self._thawed.pop(cookie)
            seat.standing = Standing.FROZEN
            records[cookie], seat.given = seat.given, _NO_RECORD
        return self.entered(at_boundary, now_ns) + self._hand_over(records) + self._freeze_all(message, records)

    def _hand_over(self, records: Mapping[int, messages.Record], batch: int = 0) -> list[Effect]:
        """Send the records of what is frozen here; the first answers *batch*, if it is not 0."""
        rows = [(cookie, record, self.seats[cookie]) for cookie, record in records.items()]
        return [
            Send(
                messages.Frozen(
                    batch=batch if first else 0,
                    cookie=tuple([cookie for cookie, _, _ in chunk]),
                    epoch=tuple([seat.epoch for _, _, seat in chunk]),
                    **messages.record_columns([record for _, record, _ in chunk]),
                )
            )
            for first, chunk in _marked(
                rows[cut] for cut in messages.record_chunks(list(records.values()), messages.MAX_DESCRIPTORS)
            )
        ]

    def _freeze_all(self, message: messages.Freeze, answered: Container[int] = ()) -> list[Effect]:
        is_cut = message.gather_ms > 0
        running, thawed = [], []
        for cookie, epoch in zip(message.cookie, message.epoch, strict=True):
            seat = self.seats.get(cookie)
            if seat is None or seat.epoch > epoch or cookie in answered:
                continue  # its release has crossed this, or it speaks of the past
            if seat.standing is Standing.SERVING:
                seat.standing, seat.batch, seat.is_cut = Standing.FREEZING, message.batch, is_cut
                running.append(cookie)
            elif seat.standing is Standing.THAWED:
                thawed.append(cookie)
            else:
                raise IllegalEvent(f"connection {cookie} is to be frozen where it is {seat.standing.value}")
        effects: list[Effect] = []
        if running:
            self._waiting[message.batch] = running
            effects.append(SetTimer(f"wait {message.batch}", message.wait_ms / 1000))
        if thawed:
            for cookie in thawed:
                del self._thawed[cookie]
            effects.append(Export(0, tuple(thawed), is_cut=False))
        if is_cut:
            return effects + self._gather(message, running)
        return [*effects, Halt(message.batch, tuple(running))]

    def _gather(self, message: messages.Freeze, running: list[int]) -> list[Effect]:
        effects: list[Effect] = []
        if self._gathering is None:
            self._gathering = set()
            self._gather_timer = f"gather {message.batch}"
            effects.append(SetTimer(self._gather_timer, message.gather_ms / 1000))
        self._gathering.update(running)
        if message.more:
            # Held open by this mark until the last packet of the cut has come.
            self._gathering.add(-1)
        else:
            self._gathering.discard(-1)
        effects.append(Halt(message.batch, tuple(running)))
        return effects

    def halted(self, batch: int, cookies: Sequence[int]) -> list[Effect]:
        """
        These stand at a boundary and stay there.

        *batch* is that of the Halt whose first answer this is, 0 for what stops later.
        """
        alone = []
        for cookie in cookies:
            seat = self.seats[cookie]
            seat.standing = Standing.HALTED
            if self._gathering is None or not seat.is_cut:
                alone.append(cookie)
        if self._gathering is not None:
            self._gathering.difference_update(cookies)
        effects: list[Effect] = []
        if alone or (batch and self._gathering is None):
            effects.append(Export(batch, tuple(alone), is_cut=False))
        elif batch:
            effects.append(Send(messages.Frozen(batch=batch)))
        return effects + self._close_cut_if_all_stopped()

    def _close_cut_if_all_stopped(self) -> list[Effect]:
        return self._close_cut() if self._gathering is not None and not self._gathering else []

    def _close_cut(self) -> list[Effect]:
        self._gathering = None
        halted = [cookie for cookie, seat in self.seats.items() if seat.standing is Standing.HALTED and seat.is_cut]
        # Piece by piece, so that others go on with the first while the next is taken.
        *first, last = _chunks(halted, messages.MAX_DESCRIPTORS) if halted else [()]
        return [*(Export(0, tuple(chunk), is_cut=False) for chunk in first), Export(0, tuple(last), is_cut=True)]

    def exported(
        self,
        asked: Export,
        records: Mapping[int, messages.Record],
        refusals: Mapping[int, str],
        shared: bytes | None = None,
    ) -> list[Effect]:
        """The records that were asked for; those that cannot be taken go on here."""
        for cookie, record in records.items():
            seat = self.seats[cookie]
            seat.standing, seat.kind = Standing.FROZEN, _KINDS[record.kind]
        effects = self._hand_over(records, asked.batch)
        if asked.batch and not effects:
            effects.append(Send(messages.Frozen(batch=asked.batch)))
        effects += self._refuse_or_give_back(refusals)
        if asked.is_cut:
            effects.append(Send(messages.Gathered(shared=() if shared is None else (shared,))))
        return effects

    def _refuse_or_give_back(self, reasons: Mapping[int, str]) -> list[Effect]:
        """What was never entered here is given back whole: the holder has its record."""
        unentered = tuple(cookie for cookie in reasons if self.seats[cookie].standing is Standing.THAWED)
        effects = self._refuse(reasons)
        for cookie in unentered:
            del self.seats[cookie]
        return [*effects, Discard(unentered)] if unentered else effects

    def withdrawn(self, reasons: Mapping[int, str]) -> list[Effect]:
        """These never reached a boundary, and go on here."""
        effects = self._refuse(reasons)
        if self._gathering is not None:
            self._gathering.difference_update(reasons)
        return effects + self._close_cut_if_all_stopped()

    def _refuse(self, reasons: Mapping[int, str]) -> list[Effect]:
        rows = [(cookie, self.seats[cookie], reason) for cookie, reason in reasons.items() if cookie in self.seats]
        for _, seat, _ in rows:
            seat.standing = Standing.SERVING
        return [
            Send(
                messages.Refused(
                    cookie=tuple([cookie for cookie, _, _ in chunk]),
                    epoch=tuple([seat.epoch for _, seat, _ in chunk]),
                    reason=tuple([reason.encode(errors="replace") for _, _, reason in chunk]),
                )
            )
            for chunk in _chunks(rows, messages.MAX_ROWS)
        ]

    def timer(self, name: str) -> list[Effect]:
        """Take a timer that was set; one whose reason is gone does nothing."""
        if name.startswith("gather "):
            if self._gathering is None or name != self._gather_timer:
                return []
            # -1: the rest of the cut is still on its way.
            return [SetTimer(name, _AGAIN_S)] if -1 in self._gathering else self._close_cut()
        batch = int(name.removeprefix("wait "))
        late = []
        for cookie in self._waiting.pop(batch, ()):
            seat = self.seats.get(cookie)
            if seat is not None and seat.standing is Standing.FREEZING and seat.batch == batch:
                late.append(cookie)
        return [Withdraw(tuple(late))] if late else []

    # ---- ceding

    @property
    def may_cede(self) -> bool:
        """Whether another generation serves, and somebody would pass on to it what is given up here."""
        return self._is_retiring and self._has_holder and not self._is_stopping

    def is_cedable(self, cookie: int) -> bool:
        """Whether this connection may be given up once it is at a boundary; never twice."""
        seat = self.seats.get(cookie)
        return self.may_cede and seat is not None and seat.standing is Standing.SERVING and not seat.was_ceded

    def ceded(self, records: Mapping[int, messages.Record]) -> list[Effect]:
        """
        Give these up, which were kept and have stopped at a boundary: who serves takes them.

        Until ``Discard`` they wait here; if nobody else can serve one it comes back, by ``Restore`` with UNSERVED.

        Raises:
            IllegalEvent: one is not cedable.

        """
        for cookie in records:
            if not self.is_cedable(cookie):
                raise IllegalEvent(f"connection {cookie} cannot be ceded: {self.seats.get(cookie)}")
        rows = [(cookie, record, self.seats[cookie]) for cookie, record in records.items()]
        for _, record, seat in rows:
            seat.standing, seat.kind, seat.was_ceded = Standing.FROZEN, messages.Kind(record.kind), True
        return [
            Send(
                messages.Cede(
                    cookie=tuple([cookie for cookie, _, _ in rows[cut]]),
                    epoch=tuple([seat.epoch for _, _, seat in rows[cut]]),
                    **messages.record_columns([record for _, record, _ in rows[cut]]),
                )
            )
            for cut in messages.record_chunks(list(records.values()), messages.MAX_DESCRIPTORS)
        ]

    # ---- thawing

    def _thaw(self, message: messages.Thaw, _: int) -> list[Effect]:
        records = tuple(message.records())
        if not set(message.kind) <= set(messages.Kind):
            raise IllegalEvent(f"a connection is to be thawed as {max(message.kind)}, which is no kind")
        seats = []
        for cookie, epoch in zip(message.cookie, message.epoch, strict=True):
            seat = self.seats.get(cookie)
            if seat is None or seat.standing not in _COPIES or epoch <= seat.epoch:
                raise IllegalEvent(f"connection {cookie} cannot be thawed at epoch {epoch}: {seat}")
            seats.append(seat)
        for seat, epoch, record in zip(seats, message.epoch, records, strict=True):
            seat.standing, seat.epoch, seat.halted_ns = Standing.THAWED, epoch, record.halted_ns
            seat.is_cut, seat.is_entering = bool(record.flags & messages.RecordFlag.CUT), False
            if seat.is_cut:
                seat.given = record
            if not record.flags & messages.RecordFlag.UNSERVED:
                seat.kind = _KINDS[record.kind]
        self._thawed.update(zip(message.cookie, seats, strict=True))
        return [Restore(message.cookie, records)]

    def restored(self, failures: Mapping[int, str]) -> list[Effect]:
        """Give back what could not be built from its record."""
        if not failures:
            return []
        effects = self._refuse(failures)
        for cookie in failures:
            del self.seats[cookie], self._thawed[cookie]
        return [*effects, Discard(tuple(failures))]

    def _enter(self, message: messages.Enter, now_ns: int) -> list[Effect]:
        seats = {
            cookie: seat for cookie, seat in self._thawed.items() if seat.is_cut == message.cut and not seat.is_entering
        }
        cookies = tuple(seats)
        effects: list[Effect] = [ImportShared(message.shared)] if message.shared else []
        if message.cut:
            for seat in seats.values():
                seat.is_entering = True
        else:
            effects += self.entered(cookies, now_ns)
        return [*effects, Serve(cookies, message.cut)]

    def _is_entering(self, cookie: int) -> bool:
        seat = self._thawed.get(cookie)
        return seat is not None and seat.is_entering

    def entered(self, cookies: Iterable[int], now_ns: int) -> list[Effect]:
        """Say of these that they are served; before the first byte of any is read or written."""
        rows = [(cookie, seat) for cookie in cookies if (seat := self._thawed.pop(cookie, None)) is not None]
        for _, seat in rows:
            seat.standing, seat.given = Standing.SERVING, _NO_RECORD
        return [
            Send(
                messages.Adopted(
                    cookie=tuple([cookie for cookie, _ in chunk]),
                    epoch=tuple([seat.epoch for _, seat in chunk]),
                    pause_us=tuple([min(max(now_ns - seat.halted_ns, 0) // 1000, 0xFFFFFFFF) for _, seat in chunk]),
                )
            )
            for chunk in _chunks(rows, messages.MAX_ROWS)
        ]

    # ---- without a holder, and with a new one

    def orphaned(self) -> list[Effect]:
        """
        The holder is dead: what has not left goes on here, and what has not come is not waited for.

        Frozen and thawed connections wait: which of two workers serves them only a holder can say. A replacement that
        was given nothing yet is of no use to anybody.
        """
        self._has_holder = False
        entering = self.entered([cookie for cookie in self._thawed if self._is_entering(cookie)], now_ns=0)
        self._gathering = None
        self._waiting.clear()
        asked = (Standing.FREEZING, Standing.HALTED)
        staying = tuple([cookie for cookie, seat in self.seats.items() if seat.standing in asked])
        staged = tuple([cookie for cookie, seat in self.seats.items() if seat.standing is Standing.STAGED])
        for cookie in staying:
            self.seats[cookie].standing = Standing.SERVING
        for cookie in staged:
            del self.seats[cookie]
        effects: list[Effect] = [*entering, LetGoOn(staying), Discard(staged), MoveEnds()]
        if not (self.is_committed or self.seats or self._tombstones):
            return [*effects, Retire(0.0)]
        return [*effects, Accept(is_on=True)] if self.is_committed and not self.is_leaving else effects

    def _recall(self, _message: messages.Recall, _: int) -> list[Effect]:
        return [Report()]

    def waiting(self) -> list[int]:
        """Return the connections whose records a new holder needs: those that nobody serves here."""
        return [cookie for cookie, seat in self.seats.items() if seat.standing in _WAITING]

    def recalled(self, records: Mapping[int, messages.Record], listeners: Mapping[int, int]) -> list[Effect]:
        """A new holder asks for everything: *listeners* tells where each connection came from."""
        self._has_holder = True
        self._acked = self._staged = 0
        self.unacked.clear()
        rows = [
            (cookie, seat, records.get(cookie) or messages.Record(kind=seat.kind))
            for cookie, seat in self.seats.items()
        ]
        effects: list[Effect] = []
        for cut in messages.record_chunks([record for _, _, record in rows], messages.MAX_DESCRIPTORS):
            cookies = tuple([cookie for cookie, _, _ in rows[cut]])
            view = messages.View(
                cookie=cookies,
                epoch=tuple([seat.epoch for _, seat, _ in rows[cut]]),
                listener=tuple([listeners[cookie] for cookie in cookies]),
                standing=tuple([_WAITING.get(seat.standing, messages.Doing.SERVES) for _, seat, _ in rows[cut]]),
                **messages.record_columns([record for _, _, record in rows[cut]]),
            )
            effects.append(Send(view, cookies))
        return [*effects, Send(messages.Viewed(cookie=tuple(self._tombstones)))]

    # ---- the end of a move, the end of the worker

    def _commit(self, message: messages.Commit, _: int) -> list[Effect]:
        # The second one is the drain limit's: what was ceded since the first waits on, for a drop or a thaw.
        forgotten = [] if self._is_retiring else self._forget_copies()
        self.is_leaving = self._is_retiring = True
        return [*forgotten, MoveEnds(), Retire(message.drain_ms / 1000)]

    def _move_over(self, _message: messages.MoveOver, _: int) -> list[Effect]:
        self.is_committed = True
        return [*self._forget_copies(), MoveEnds()]

    def _forget_copies(self) -> list[Effect]:
        gone = tuple([cookie for cookie, seat in self.seats.items() if seat.standing in _COPIES])
        self._is_moving = False
        self._tombstones.clear()
        for cookie in gone:
            del self.seats[cookie]
        return [Discard(gone)] if gone else []

    def _stop(self, message: messages.Stop, _: int) -> list[Effect]:
        self.is_leaving = self._is_stopping = True
        return [Accept(is_on=False), StopServing(message.drain_ms / 1000)]

    # ---- the table

    _TRANSITIONS: ClassVar[dict[type[messages.Message], Callable[[Agent, Any, int], list[Effect]]]] = {
        messages.LendAck: _lend_ack,
        messages.AcceptOn: _accept_on,
        messages.AcceptOff: _accept_off,
        messages.Stage: _stage,
        messages.Drop: _drop,
        messages.Freeze: _freeze,
        messages.Thaw: _thaw,
        messages.Enter: _enter,
        messages.Commit: _commit,
        messages.MoveOver: _move_over,
        messages.Stop: _stop,
        messages.Push: _push,
        messages.Recall: _recall,
    }


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _marked(chunks: Iterable[Sequence[Any]]) -> Iterable[tuple[bool, Sequence[Any]]]:
    return ((place == 0, chunk) for place, chunk in enumerate(chunks))
