"""When connections that came from elsewhere are entered, and when their input is read."""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import TYPE_CHECKING, Any

import pytest

from copyover.messages import Record
from copyover.worker.entrance import ENTER_S, Entrance
from copyover.worker.served import Course, Limits, Served
from copyover.worker.transport import Phase, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EVERY = 10_000


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time goes on only when told."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    def settle(self) -> None:
        """Let everything run that is due."""
        for _ in range(20):
            self.call_soon(self.stop)
            self.run_forever()

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.settle()


class Guest(Served):
    """A connection that reaches its boundary when a test says so."""

    __slots__ = ("is_at_boundary_now", "read")

    def __init__(self, *arguments: Any, **given: Any) -> None:
        super().__init__(*arguments, **given)
        self.is_at_boundary_now = False
        self.read = b""

    @property
    def is_at_boundary(self) -> bool:
        return self.is_at_boundary_now

    @property
    def reason(self) -> str:
        return "a test"

    def stop(self) -> None: ...

    def deliver(self, act: int, data: bytes | bytearray | memoryview) -> None: ...

    def _changed(self) -> None:
        self.read += bytes(self.transport.input)
        self.transport.input.clear()

    def arrive(self) -> None:
        self.is_at_boundary_now = True
        self._arrive()


class House:
    """An entrance, who was let in, and in which order."""

    def __init__(self, loop: Clock, *, at_once: int = EVERY, rate: float = 0.0) -> None:
        self.loop = loop
        self.entered: list[int] = []
        self.all_in: list[list[int]] = []  # the cuts, with those of each that are still here
        self.arrives_at_once = False
        self.entrance = Entrance(loop, self._enter, at_once=at_once, rate=rate)
        self._sockets: list[socket.socket] = []
        self._cookies = itertools.count(1)

    def _enter(self, guest: Served) -> None:
        self.entered.append(guest.cookie)
        if self.arrives_at_once:
            assert isinstance(guest, Guest)
            guest.arrive()

    def guests(self, count: int) -> list[Guest]:
        """Return connections that each bring input."""
        made = []
        for cookie in itertools.islice(self._cookies, count):
            near, far = socket.socketpair()
            near.setblocking(False)
            self._sockets += [near, far]
            transport = Transport(self.loop, near)
            guest = Guest(self.loop, transport, cookie=cookie, listener="web", limits=Limits())
            guest.restore(Record(unread=b"input"), {})
            made.append(guest)
        return made

    def admit(self, guests: list[Guest], *, is_cut: bool = False) -> None:
        self.entrance.admit(guests, self._all_are_in if is_cut else None)

    def _all_are_in(self, here: Sequence[Served]) -> None:
        assert not any(isinstance(guest, Guest) and guest.read for guest in here), "read before all were in"
        self.all_in.append([guest.cookie for guest in here])

    def close(self) -> None:
        for each in self._sockets:
            each.close()


@pytest.fixture
def loop() -> Iterator[Clock]:
    made = Clock()
    yield made
    made.close()


@pytest.fixture
def house(loop: Clock) -> Iterator[Callable[..., House]]:
    made: list[House] = []

    def build(**given: Any) -> House:
        made.append(House(loop, **given))
        return made[-1]

    yield build
    for each in made:
        each.close()


Build = Any  # of a house


def test_all_are_entered_in_their_order(house: Build, loop: Clock) -> None:
    """With nothing that paces them: at once, and with their input."""
    here = house()
    guests = here.guests(5)
    here.admit(guests)
    assert here.entered == [1, 2, 3, 4, 5]
    loop.settle()
    assert [guest.read for guest in guests] == [b"input"] * 5


def test_so_many_at_once(house: Build, loop: Clock) -> None:
    """The next is entered when one has reached its boundary, whichever."""
    here = house(at_once=2)
    guests = here.guests(5)
    here.admit(guests)
    assert here.entered == [1, 2]
    loop.settle()
    assert here.entered == [1, 2]
    guests[1].arrive()
    assert here.entered == [1, 2]  # never out of the call of another
    loop.settle()
    assert here.entered == [1, 2, 3]
    guests[0].arrive()
    guests[2].arrive()
    loop.settle()
    assert here.entered == [1, 2, 3, 4, 5]


def test_those_that_arrive_at_once(house: Build, loop: Clock) -> None:
    """However many: one whose top does nothing costs no turn of its own, and no stack."""
    here = house(at_once=1)
    here.arrives_at_once = True
    here.admit(here.guests(300))
    loop.settle()
    assert here.entered == list(range(1, 301))


def test_so_many_a_second(house: Build, loop: Clock) -> None:
    """Evenly, the first at once; what has waited longer is not made up for by a burst."""
    here = house(rate=10.0)
    here.arrives_at_once = True
    here.admit(here.guests(5))
    assert here.entered == [1]
    for count in range(2, 6):
        loop.pass_s(0.09)
        assert len(here.entered) == count - 1
        loop.pass_s(0.011)
        assert len(here.entered) == count
    loop.pass_s(100)
    here.admit(here.guests(3))
    assert len(here.entered) == 6
    loop.pass_s(0.11)
    assert len(here.entered) == 7


def test_rate_and_number_together(house: Build, loop: Clock) -> None:
    """Neither is exceeded: a second that nobody could be entered in is lost."""
    here = house(rate=10.0, at_once=1)
    guests = here.guests(3)
    here.admit(guests)
    loop.pass_s(0.5)
    assert here.entered == [1]
    guests[0].arrive()
    loop.settle()
    assert here.entered == [1, 2]
    guests[1].arrive()
    loop.settle()
    assert here.entered == [1, 2]
    loop.pass_s(0.11)
    assert here.entered == [1, 2, 3]


def test_another_batch_queues_behind(house: Build, loop: Clock) -> None:
    """The same pace holds for all of them."""
    here = house(rate=10.0)
    here.admit(here.guests(2))
    here.admit(here.guests(2))
    assert here.entered == [1]
    for count in (2, 3, 4):
        loop.pass_s(0.101)
        assert len(here.entered) == count


# ---- patience


def test_patience_ends_once_nobody_arrives(house: Build, loop: Clock) -> None:
    """One that never reaches its boundary holds up nobody for ever; as long as others arrive, it is waited for."""
    here = house(at_once=2)
    guests = here.guests(6)
    here.admit(guests)
    loop.pass_s(ENTER_S * 0.9)
    guests[1].arrive()
    loop.settle()
    loop.pass_s(ENTER_S * 0.9)  # somebody arrived within this second
    assert here.entered == [1, 2, 3]
    loop.pass_s(ENTER_S)
    assert here.entered == [1, 2, 3, 4, 5]


def test_who_arrives_after_patience_ended(house: Build, loop: Clock) -> None:
    """It is counted once."""
    here = house(at_once=1)
    guests = here.guests(3)
    here.admit(guests)
    loop.pass_s(ENTER_S)
    assert here.entered == [1, 2]
    guests[0].arrive()
    loop.settle()
    assert here.entered == [1, 2]


def timers(loop: Clock) -> int:
    return sum(not timer.cancelled() for timer in loop._scheduled)  # type: ignore[attr-defined]  # asyncio's own


def test_nothing_ticks_when_all_are_in(house: Build, loop: Clock) -> None:
    """A worker that serves in peace is not woken."""
    here = house()
    guests = here.guests(3)
    here.admit(guests)
    for guest in guests:
        guest.arrive()
    loop.pass_s(ENTER_S)
    loop.pass_s(ENTER_S)
    assert timers(loop) == 0


def test_one_timer_paces_all(house: Build, loop: Clock) -> None:
    """However many batches wait, and however many arrive meanwhile."""
    here = house(rate=10.0)
    here.arrives_at_once = True
    for _ in range(5):
        here.admit(here.guests(3))
        loop.settle()
    assert timers(loop) == 1


# ---- a consistent cut


def test_input_of_a_cut_is_read_when_all_are_in(house: Build, loop: Clock) -> None:
    """Not before: a broadcast of the first finds everybody."""
    here = house(at_once=2)
    guests = here.guests(4)
    here.admit(guests, is_cut=True)
    for place, guest in enumerate(guests):
        loop.settle()
        assert [each.read for each in guests] == [b""] * 4
        assert place < len(here.entered)
        guest.arrive()
    loop.settle()
    assert [each.read for each in guests] == [b"input"] * 4


def test_cuts_do_not_wait_for_each_other(house: Build, loop: Clock) -> None:
    """Nor do those that belong to none."""
    here = house()
    first, second, free = here.guests(2), here.guests(2), here.guests(1)
    here.admit(first, is_cut=True)
    here.admit(second, is_cut=True)
    here.admit(free)
    loop.settle()
    assert free[0].read == b"input"
    for guest in second:
        guest.arrive()
    loop.settle()
    assert [each.read for each in first + second] == [b"", b"", b"input", b"input"]


def test_a_cut_whose_straggler_never_arrives(house: Build, loop: Clock) -> None:
    """Its input is read once patience has ended, the straggler's too: it may be that which it waits for."""
    here = house()
    guests = here.guests(3)
    here.admit(guests, is_cut=True)
    guests[0].arrive()
    guests[1].arrive()
    loop.pass_s(ENTER_S)
    assert [each.read for each in guests] == [b""] * 3  # two arrived within this second
    loop.pass_s(ENTER_S)
    loop.settle()
    assert [each.read for each in guests] == [b"input"] * 3


def test_who_closed_before_it_was_entered(house: Build, loop: Clock) -> None:
    """It is not entered, and not waited for."""
    here = house(at_once=1)
    guests = here.guests(3)
    here.admit(guests, is_cut=True)
    guests[1].transport.close()
    guests[0].arrive()
    loop.settle()
    guests[2].arrive()
    loop.settle()
    assert here.entered == [1, 3]
    assert [each.read for each in guests] == [b"input", b"", b"input"]


def test_who_was_frozen_before_it_was_entered(house: Build, loop: Clock) -> None:
    """A roll-back has taken it: it is somebody else's, and its socket is not touched."""
    here = house(at_once=1)
    guests = here.guests(2)
    here.admit(guests, is_cut=True)
    guests[1].is_at_boundary_now = True
    assert guests[1].ask_to_halt(lambda: None)
    guests[0].arrive()
    loop.settle()
    assert here.entered == [1]
    assert [each.read for each in guests] == [b"input", b""]
    assert guests[1].course is Course.HALTED
    assert here.all_in == [[1]]


def test_who_was_frozen_after_it_arrived(house: Build, loop: Clock) -> None:
    """Others arrive later: its input must not be read here any more."""
    here = house()
    guests = here.guests(2)
    here.admit(guests, is_cut=True)
    guests[0].arrive()
    guests[0].ask_to_halt(lambda: None)
    record = guests[0].export(schema=1, state=b"")
    assert record.unread == b"input"
    guests[1].arrive()
    loop.settle()
    assert [each.read for each in guests] == [b"", b"input"]


def test_who_closes_while_it_is_entered(house: Build, loop: Clock) -> None:
    """It is not waited for: to leave is to arrive."""
    here = house(at_once=1)
    guests = here.guests(2)
    here.admit(guests, is_cut=True)
    guests[0].leave()
    loop.settle()
    assert here.entered == [1, 2]
    guests[1].arrive()
    loop.settle()
    assert guests[1].read == b"input"
    assert guests[0].transport.phase is not Phase.OPEN
    assert here.all_in == [[1, 2]]


def test_who_is_in_is_not_entered_again(house: Build, loop: Clock) -> None:
    """A new holder may say it a second time: its handler runs already."""
    here = house(at_once=1)
    guests = here.guests(2)
    here.admit(guests, is_cut=True)
    here.admit(guests, is_cut=True)
    for guest in guests:
        guest.arrive()
        loop.settle()
    assert here.entered == [1, 2]
    assert [guest.read for guest in guests] == [b"input", b"input"]
