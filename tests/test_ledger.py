"""Who owns each connection: the legal uses of each method, and that an illegal one changes nothing."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from copyover.errors import IllegalEvent
from copyover.ledger import Entry, Ledger, Standing
from copyover.messages import Kind, Record

if TYPE_CHECKING:
    from collections.abc import Callable

ONE, TWO, THREE = 1, 2, 3  # workers
C = 10  # a connection
RECORD = Record(state=b"newest")


def picture(ledger: Ledger) -> dict[str, Any]:
    return copy.deepcopy(vars(ledger))


def lent() -> Ledger:
    ledger = Ledger()
    ledger.lend(ONE, C, 1010, 0)
    ledger.begin()
    return ledger


def freezing() -> Ledger:
    ledger = lent()
    ledger.stage(C, TWO)
    assert ledger.freeze(C) == 0
    return ledger


def parked() -> Ledger:
    ledger = freezing()
    ledger.frozen(ONE, C, 0, RECORD)
    return ledger


def thawing() -> Ledger:
    ledger = parked()
    ledger.thaw(C, TWO)
    return ledger


def adopted() -> Ledger:
    ledger = thawing()
    ledger.adopt(TWO, C, 1)
    return ledger


def entry(ledger: Ledger) -> Entry:
    return ledger.entries[C]


# ---- a connection's way


def test_a_lent_connection_is_served_by_the_lender() -> None:
    """It is owned from the moment of the lend, at epoch 0."""
    ledger = lent()
    assert (entry(ledger).owner, entry(ledger).epoch, entry(ledger).standing) == (ONE, 0, Standing.SERVED)
    assert (len(ledger), ledger.owned[ONE], [e.cookie for e in ledger.of(ONE)]) == (1, 1, [C])


def test_the_way_of_a_move() -> None:
    """Frozen by the incumbent, thawed at the next epoch, adopted by the replacement, which owns it then."""
    ledger = freezing()
    assert entry(ledger).standing is Standing.FREEZING
    parked_entry = ledger.frozen(ONE, C, 0, RECORD)
    assert (parked_entry.standing, parked_entry.moving.record, parked_entry.moving.origin) == (
        Standing.PARKED,
        RECORD,
        ONE,
    )
    thawed = ledger.thaw(C, TWO)
    assert (thawed.owner, thawed.epoch, thawed.standing) == (TWO, 1, Standing.THAWING)
    assert (ledger.owned[ONE], ledger.owned[TWO]) == (0, 1)
    assert ledger.has_record(thawed)
    served = ledger.adopt(TWO, C, 1)
    assert served.standing is Standing.SERVED
    assert not ledger.has_record(served)


def test_the_way_back_has_the_newest_record() -> None:
    """What the replacement served comes back with its record; the origin's own coroutine is of the past."""
    ledger = adopted()
    assert ledger.freeze(C) == 1
    ledger.frozen(TWO, C, 1, Record(state=b"newer"))
    back = ledger.thaw(C, ONE)
    assert (back.epoch, back.moving.record) == (2, Record(state=b"newer"))
    assert back.moving.origin == ONE
    assert not ledger.unserved(back, ONE)


def test_what_nobody_served_wakes_at_its_origin_only() -> None:
    """The coroutine that froze it can go on, and only that."""
    ledger = thawing()
    assert ledger.unserved(entry(ledger), ONE)
    assert not ledger.unserved(entry(ledger), TWO)
    assert not adopted().unserved(entry(ledger), THREE)


def test_an_adoption_by_the_origin_leaves_it_unserved_by_others() -> None:
    """Thawed back where it came from and frozen again, it is still that worker's own."""
    ledger = parked()
    ledger.thaw(C, ONE)
    ledger.adopt(ONE, C, 1)
    assert ledger.unserved(entry(ledger), ONE)


def test_an_adoption_that_a_freeze_crossed_waits_for_its_answer() -> None:
    """It is freezing still; but it was served, so the record we have is of the past."""
    ledger = thawing()
    ledger.freeze(C)
    assert ledger.has_record(entry(ledger))
    ledger.adopt(TWO, C, 1)
    assert entry(ledger).standing is Standing.FREEZING
    assert not ledger.has_record(entry(ledger))


# ---- refusals


def test_a_refused_freeze_stays_with_its_owner() -> None:
    """With the reason; all other copies are to be dropped."""
    ledger = freezing()
    kept = ledger.refuse(ONE, C, "busy")
    assert (kept.standing, kept.owner, kept.moving.kept_because) == (Standing.SERVED, ONE, "busy")
    assert ledger.forget_others(C) == [TWO]
    assert ledger.forget_others(C) == []


def test_a_refused_thaw_gives_the_record_back() -> None:
    """It is parked, and the refuser holds no copy any more."""
    ledger = thawing()
    back = ledger.refuse(TWO, C, "cannot read it")
    assert (back.standing, back.moving.record) == (Standing.PARKED, RECORD)
    assert back.moving.staged_in == 0
    assert TWO in back.moving.unfit


def test_a_refused_thaw_that_a_freeze_crossed_gives_the_record_back() -> None:
    """The refuser never served it: it must not count as its owner."""
    ledger = thawing()
    ledger.freeze(C)
    assert ledger.refuse(TWO, C, "cannot read it").standing is Standing.PARKED


def test_a_refused_freeze_after_adoption_stays() -> None:
    """The other case of the same message: it was adopted, and cannot stop."""
    ledger = adopted()
    ledger.freeze(C)
    assert ledger.refuse(TWO, C, "busy").standing is Standing.SERVED


def test_a_refusing_origin_is_forgotten() -> None:
    """What an incumbent gives back is no longer in it: its copy cannot be thawed again."""
    ledger = adopted()
    ledger.freeze(C)
    ledger.frozen(TWO, C, 1, RECORD)
    ledger.thaw(C, ONE)
    back = ledger.refuse(ONE, C, "schema 2")
    assert (back.moving.origin, back.moving.staged_in) == (0, TWO)


# ---- endings and deaths


@pytest.mark.parametrize("made", [lent, freezing, thawing, adopted])
def test_an_ending_leaves_a_tombstone_during_a_move(made: Callable[[], Ledger]) -> None:
    """So that what other workers still say of it is void, and nothing revives it."""
    ledger = made()
    owner = entry(ledger).owner
    ending = ledger.release(owner, C)
    assert (ending.cookie, ending.descriptor) == (C, 1010)
    assert owner not in ending.copies_in
    assert ledger.is_late(C)
    assert (len(ledger), ledger.owned[owner]) == (0, 0)
    ledger.check(THREE, [C], [9], (Standing.SERVED,))


def test_an_ending_in_peace_leaves_nothing() -> None:
    """Without a move there is no copy that could wake up."""
    ledger = Ledger()
    ledger.lend(ONE, C, 1010, 0)
    ending = ledger.release(ONE, C)
    assert ending.copies_in == ()
    assert not ledger.is_late(C)


def test_an_ending_names_all_copies() -> None:
    """The replacement's staged one, and the origin's frozen one, never that of who serves it."""
    assert freezing().release(ONE, C).copies_in == (TWO,)
    assert adopted().release(TWO, C).copies_in == (ONE,)
    assert set(parked().lose(C).copies_in) == {ONE, TWO}


def test_what_a_dead_worker_was_given_is_parked() -> None:
    """It had not served it: the record that we have is the newest."""
    ledger = thawing()
    ledger.park(C)
    assert entry(ledger).standing is Standing.PARKED
    assert ledger.thaw(C, ONE).epoch == 2


def test_a_dead_worker_has_no_copies() -> None:
    """Nothing is staged in it, no coroutine of it waits."""
    ledger = thawing()
    ledger.forget_copies(ONE)
    assert entry(ledger).moving.origin == 0
    ledger.forget_copies(TWO)
    assert entry(ledger).moving.staged_in == 0
    ledger.frozen(TWO, C, ledger.freeze(C), RECORD)
    assert (entry(ledger).moving.origin, entry(ledger).moving.staged_in) == (0, TWO), "it never had a coroutine of it"


def test_settle_forgets_the_move() -> None:
    """Records, origins and tombstones are of the move only."""
    ledger = adopted()
    ledger.lend(ONE, 11, 1011, 0)
    ledger.release(ONE, 11)
    ledger.settle()
    assert entry(ledger).passage is None
    assert not ledger.is_late(11)
    assert not ledger.is_moving
    assert ledger.release(TWO, C).copies_in == ()


# ---- what it is served as


def test_a_connection_is_of_the_kind_that_its_worker_says() -> None:
    """Lent as one, it may become another while it is served or asked to stop, and its record has the last word."""
    ledger = Ledger()
    ledger.lend(ONE, C, 1010, 0, Kind.HTTP)
    assert entry(ledger).kind is Kind.HTTP
    ledger.became(ONE, C, Kind.STREAM)
    assert entry(ledger).kind is Kind.STREAM
    ledger.freeze(C)
    ledger.became(ONE, C, Kind.HTTP)
    assert entry(ledger).kind is Kind.HTTP
    ledger.frozen(ONE, C, 0, attrs.evolve(RECORD, kind=Kind.WEBSOCKET))
    assert entry(ledger).kind is Kind.WEBSOCKET


def test_a_slot_does_not_tell_the_kind_the_ledger_does() -> None:
    """What a killed WebSocket worker left goes on as a WebSocket."""
    ledger = Ledger()
    ledger.lend(ONE, C, 1010, 0, Kind.WEBSOCKET)
    recovered = ledger.recover(C, RECORD).moving.record
    assert recovered == attrs.evolve(RECORD, kind=Kind.WEBSOCKET)


# ---- what is illegal


ILLEGAL: list[tuple[str, Callable[[], Ledger], Callable[[Ledger], object]]] = [
    ("lent twice", lent, lambda it: it.lend(TWO, C, 1, 0)),
    ("released by another", lent, lambda it: it.release(TWO, C)),
    ("released while parked", parked, lambda it: it.release(ONE, C)),
    ("an unknown one released", lent, lambda it: it.release(ONE, 99)),
    ("frozen while freezing", freezing, lambda it: it.freeze(C)),
    ("frozen while parked", parked, lambda it: it.freeze(C)),
    ("a record that nobody asked for", lent, lambda it: it.frozen(ONE, C, 0, RECORD)),
    ("a record of another", freezing, lambda it: it.frozen(TWO, C, 0, RECORD)),
    ("a record of another epoch", freezing, lambda it: it.frozen(ONE, C, 1, RECORD)),
    ("a record twice", parked, lambda it: it.frozen(ONE, C, 0, RECORD)),
    ("a refusal that nobody asked for", lent, lambda it: it.refuse(ONE, C, "busy")),
    ("a refusal of another", freezing, lambda it: it.refuse(TWO, C, "busy")),
    ("thawed while served", lent, lambda it: it.thaw(C, TWO)),
    ("thawed while freezing", freezing, lambda it: it.thaw(C, TWO)),
    ("thawed twice", thawing, lambda it: it.thaw(C, ONE)),
    ("adopted while served", lent, lambda it: it.adopt(ONE, C, 0)),
    ("adopted by another", thawing, lambda it: it.adopt(ONE, C, 1)),
    ("adopted at another epoch", thawing, lambda it: it.adopt(TWO, C, 0)),
    ("adopted twice", adopted, lambda it: it.adopt(TWO, C, 1)),
    ("parked while served", adopted, lambda it: it.park(C)),
    ("parked while the incumbent serves", freezing, lambda it: it.park(C)),
    ("checked for another", lent, lambda it: it.check(TWO, [C], [0], (Standing.SERVED,))),
    ("checked at another epoch", lent, lambda it: it.check(ONE, [C], [1], (Standing.SERVED,))),
    ("checked in another standing", lent, lambda it: it.check(ONE, [C], [0], (Standing.FREEZING,))),
    ("checked twice in one message", lent, lambda it: it.check(ONE, [C, C], [0, 0], (Standing.SERVED,))),
    ("another kind by another", lent, lambda it: it.became(TWO, C, Kind.HTTP)),
    ("another kind of what is parked", parked, lambda it: it.became(ONE, C, Kind.HTTP)),
    ("another kind of what was given", thawing, lambda it: it.became(TWO, C, Kind.HTTP)),
    ("ceded by another", lent, lambda it: it.cede(TWO, C, RECORD)),
    ("ceded while freezing", freezing, lambda it: it.cede(ONE, C, RECORD)),
    ("a record where there is none", lent, lambda it: it.record_for(it.entries[C], ONE)),
    ("an unknown kind", lent, lambda it: it.check_kinds(ONE, [0, 4])),
    ("an unknown one checked", lent, lambda it: it.check(ONE, [99], [0], (Standing.SERVED,))),
]


@pytest.mark.parametrize(("made", "use"), [pytest.param(made, use, id=name) for name, made, use in ILLEGAL])
def test_an_illegal_use_changes_nothing(made: Callable[[], Ledger], use: Callable[[Ledger], object]) -> None:
    """Each method checks first: what is refused leaves the ledger as it was."""
    ledger = made()
    before = picture(ledger)
    with pytest.raises(IllegalEvent):
        use(ledger)
    assert picture(ledger) == before


def test_check_believes_only_whole_messages() -> None:
    """The owner's own, in the standing and at the epoch that the ledger has: that passes."""
    ledger = thawing()
    ledger.lend(TWO, 11, 1011, 0)
    ledger.check(TWO, [C, 11], [1, 0], (Standing.THAWING, Standing.SERVED))
