"""Who owns each connection: the legal uses of each method, and that an illegal one changes nothing."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from copyover import messages
from copyover.entries import Entry, Standing
from copyover.errors import IllegalEvent
from copyover.ledger import Endings, Ledger
from copyover.messages import Kind, Record, RecordFlag

if TYPE_CHECKING:
    from collections.abc import Callable

ONE, TWO, THREE = 1, 2, 3  # workers
C = 10  # a connection
RECORD = Record(state=b"newest")


def picture(ledger: Ledger) -> dict[str, Any]:
    return copy.deepcopy(vars(ledger))


def lend(ledger: Ledger, worker: int, cookie: int, kind: int = Kind.HANDLER) -> None:
    ledger.lend(worker, [cookie], [1000 + cookie], [0], [kind])


def frozen(ledger: Ledger, worker: int, epoch: int, record: Record = RECORD) -> None:
    columns = messages.record_columns([record])
    ledger.frozen(worker, messages.Frozen(batch=1, cookie=(C,), epoch=(epoch,), **columns))


def adopt(ledger: Ledger, worker: int, epoch: int) -> None:
    ledger.adopt(worker, messages.Adopted(cookie=(C,), epoch=(epoch,), pause_us=(5,)))


def refuse(ledger: Ledger, worker: int, epoch: int, reason: bytes = b"busy") -> tuple[list[int], list[int]]:
    message = messages.Refused(cookie=(C,), epoch=(epoch,), reason=(reason,))
    return ledger.refuse(worker, message, Standing.FREEZING, Standing.THAWING)


def release(ledger: Ledger, worker: int, *cookies: int, epoch: int = 0) -> Endings:
    columns = {"epoch": (epoch,) * len(cookies), "how": (0,) * len(cookies)}
    return ledger.release(worker, messages.Release(cookie=cookies, **columns))[1]


def became(ledger: Ledger, worker: int, kind: int) -> None:
    ledger.became(worker, messages.Became(cookie=(C,), epoch=(entry(ledger).epoch,), kind=(kind,)))


def cede(ledger: Ledger, worker: int) -> None:
    ledger.cede(worker, messages.Cede(cookie=(C,), epoch=(0,), **messages.record_columns([RECORD])))


def lent() -> Ledger:
    ledger = Ledger()
    lend(ledger, ONE, C)
    ledger.begin()
    return ledger


def freezing() -> Ledger:
    ledger = lent()
    ledger.stage([C], TWO)
    assert ledger.freeze([C]) == [0]
    return ledger


def parked() -> Ledger:
    ledger = freezing()
    frozen(ledger, ONE, 0)
    return ledger


def thawing() -> Ledger:
    ledger = parked()
    assert ledger.thaw([C], TWO) == [1]
    return ledger


def adopted() -> Ledger:
    ledger = thawing()
    adopt(ledger, TWO, 1)
    return ledger


def entry(ledger: Ledger) -> Entry:
    return ledger.entry(C)


# ---- a connection's way


def test_a_lent_connection_is_served_by_the_lender() -> None:
    """It is owned from the moment of the lend, at epoch 0."""
    ledger = lent()
    assert (entry(ledger).owner, entry(ledger).epoch, entry(ledger).standing) == (ONE, 0, Standing.SERVED)
    assert (len(ledger), ledger.owned[ONE], ledger.find(owners=[ONE])) == (1, 1, [C])


def test_the_way_of_a_move() -> None:
    """Frozen by the incumbent, thawed at the next epoch, adopted by the replacement, which owns it then."""
    ledger = freezing()
    assert entry(ledger).standing is Standing.FREEZING
    frozen(ledger, ONE, 0)
    assert (entry(ledger).standing, entry(ledger).record, entry(ledger).origin) == (Standing.PARKED, RECORD, ONE)
    ledger.thaw([C], TWO)
    assert (entry(ledger).owner, entry(ledger).epoch, entry(ledger).standing) == (TWO, 1, Standing.THAWING)
    assert (ledger.owned[ONE], ledger.owned[TWO]) == (0, 1)
    assert entry(ledger).is_given
    adopt(ledger, TWO, 1)
    assert entry(ledger).standing is Standing.SERVED
    assert not entry(ledger).is_given


def test_the_way_back_has_the_newest_record() -> None:
    """What the replacement served comes back with its record; the origin's own coroutine is of the past."""
    ledger = adopted()
    assert ledger.freeze([C]) == [1]
    frozen(ledger, TWO, 1, Record(state=b"newer"))
    assert ledger.thaw([C], ONE) == [2]
    assert (entry(ledger).record, entry(ledger).origin) == (Record(state=b"newer"), ONE)
    assert not ledger.is_unserved(C, ONE)


def test_what_nobody_served_wakes_at_its_origin_only() -> None:
    """The coroutine that froze it can go on, and only that."""
    ledger = thawing()
    assert ledger.is_unserved(C, ONE)
    assert not ledger.is_unserved(C, TWO)
    assert not adopted().is_unserved(C, ONE)


def test_what_its_own_coroutine_goes_on_with_is_no_record() -> None:
    """It is told so, and how long it has waited; another is given what was frozen."""
    ledger = freezing()
    frozen(ledger, ONE, 0, Record(kind=Kind.HTTP, halted_ns=7, state=b"newest"))
    (own,) = ledger.records_for([C], ONE)
    assert own.record_of(C) == Record(flags=RecordFlag.UNSERVED, halted_ns=7)
    (other,) = ledger.records_for([C], TWO)
    assert other.record_of(C) == entry(ledger).record


def test_an_adoption_by_the_origin_leaves_it_unserved_by_others() -> None:
    """Thawed back where it came from and frozen again, it is still that worker's own."""
    ledger = parked()
    ledger.thaw([C], ONE)
    adopt(ledger, ONE, 1)
    assert ledger.is_unserved(C, ONE)


def test_an_adoption_that_a_freeze_crossed_waits_for_its_answer() -> None:
    """It is freezing still; but it was served, so the record we have is of the past."""
    ledger = thawing()
    ledger.freeze([C])
    assert entry(ledger).is_given
    adopt(ledger, TWO, 1)
    assert entry(ledger).standing is Standing.FREEZING
    assert not entry(ledger).is_given


# ---- refusals


def test_a_refused_freeze_stays_with_its_owner() -> None:
    """With the reason; all other copies are to be dropped."""
    ledger = freezing()
    assert refuse(ledger, ONE, 0) == ([C], [])
    kept = entry(ledger)
    assert (kept.standing, kept.owner, kept.kept_because) == (Standing.SERVED, ONE, "busy")
    assert ledger.forget_others([C]) == [(TWO, C)]
    assert ledger.forget_others([C]) == []


def test_a_refused_thaw_gives_the_record_back() -> None:
    """It is parked, and the refuser holds no copy any more."""
    ledger = thawing()
    assert refuse(ledger, TWO, 1) == ([], [C])
    back = entry(ledger)
    assert (back.standing, back.record) == (Standing.PARKED, RECORD)
    assert (back.staged_in, back.unfit) == (0, frozenset({TWO}))


def test_a_refused_thaw_that_a_freeze_crossed_gives_the_record_back() -> None:
    """The refuser never served it: it must not count as its owner."""
    ledger = thawing()
    ledger.freeze([C])
    assert refuse(ledger, TWO, 1) == ([], [C])
    assert entry(ledger).standing is Standing.PARKED


def test_a_refused_freeze_after_adoption_stays() -> None:
    """The other case of the same message: it was adopted, and cannot stop."""
    ledger = adopted()
    ledger.freeze([C])
    assert refuse(ledger, TWO, 1) == ([C], [])
    assert entry(ledger).standing is Standing.SERVED


def test_a_refusing_origin_is_forgotten() -> None:
    """What an incumbent gives back is no longer in it: its copy cannot be thawed again."""
    ledger = adopted()
    ledger.freeze([C])
    frozen(ledger, TWO, 1)
    ledger.thaw([C], ONE)
    refuse(ledger, ONE, 2, b"schema 2")
    assert (entry(ledger).origin, entry(ledger).staged_in) == (0, TWO)


# ---- endings and deaths


@pytest.mark.parametrize("made", [lent, freezing, thawing, adopted])
def test_an_ending_leaves_a_tombstone_during_a_move(made: Callable[[], Ledger]) -> None:
    """So that what other workers still say of it is void, and nothing revives it."""
    ledger = made()
    before = entry(ledger)
    endings = release(ledger, before.owner, C, epoch=before.epoch)
    assert (endings.cookies, endings.descriptors) == ((C,), [1010])
    assert before.owner not in dict(endings.copies)
    assert ledger.tombstones == {C}
    assert (len(ledger), ledger.owned[before.owner]) == (0, 0)
    assert release(ledger, THREE, C, epoch=9).cookies == (), "it is void whatever it says"


def test_an_ending_in_peace_leaves_nothing() -> None:
    """Without a move there is no copy that could wake up."""
    ledger = Ledger()
    lend(ledger, ONE, C)
    assert release(ledger, ONE, C).copies == []
    assert not ledger.tombstones


def test_an_ending_names_all_copies() -> None:
    """The replacement's staged one, and the origin's frozen one, never that of who serves it."""
    assert release(freezing(), ONE, C).copies == [(TWO, C)]
    assert release(adopted(), TWO, C, epoch=1).copies == [(ONE, C)]
    assert parked().lose([C]).copies == [(TWO, C), (ONE, C)]


def test_a_row_is_another_connections_once_it_is_free() -> None:
    """Nothing of the one that ended is left in it."""
    ledger = freezing()
    release(ledger, ONE, C)
    lend(ledger, THREE, 11)
    assert ledger.entry(11) == Entry(11, 1011, 0, THREE)


def test_many_come_and_go() -> None:
    """Each has its own row, whatever went before."""
    ledger = Ledger()
    for first in range(0, 4000, 500):
        cookies = range(first, first + 1000)
        new = [cookie for cookie in cookies if cookie not in ledger]
        ledger.lend(1 + first, new, [cookie + 7 for cookie in new], [0] * len(new), [0] * len(new))
        ledger.lose(cookies[:300])
    assert ledger.column("descriptor", ledger) == [cookie + 7 for cookie in ledger]
    assert len(ledger) == sum(ledger.owned.values())
    ledger.lose(list(ledger))
    assert not len(ledger)


def test_what_a_dead_worker_was_given_is_parked() -> None:
    """It had not served it: the record that we have is the newest."""
    ledger = thawing()
    ledger.park([C])
    assert entry(ledger).standing is Standing.PARKED
    assert ledger.thaw([C], ONE) == [2]


def test_a_dead_worker_has_no_copies() -> None:
    """Nothing is staged in it, no coroutine of it waits."""
    ledger = thawing()
    ledger.forget_copies(ONE)
    assert entry(ledger).origin == 0
    ledger.forget_copies(TWO)
    assert entry(ledger).staged_in == 0
    ledger.freeze([C])
    frozen(ledger, TWO, 1)
    assert (entry(ledger).origin, entry(ledger).staged_in) == (0, TWO), "it never had a coroutine of it"


def test_settle_forgets_the_move() -> None:
    """Records, origins and tombstones are of the move only."""
    ledger = adopted()
    lend(ledger, ONE, 11)
    release(ledger, ONE, 11)
    ledger.settle()
    assert not entry(ledger).has_passage
    assert not ledger.tombstones
    assert not ledger.is_moving
    assert release(ledger, TWO, C, epoch=1).copies == []


# ---- what it is served as


def test_a_connection_is_of_the_kind_that_its_worker_says() -> None:
    """Lent as one, it may become another while it is served or asked to stop, and its record has the last word."""
    ledger = Ledger()
    lend(ledger, ONE, C, Kind.HTTP)
    assert entry(ledger).kind is Kind.HTTP
    became(ledger, ONE, Kind.STREAM)
    assert entry(ledger).kind is Kind.STREAM
    ledger.freeze([C])
    became(ledger, ONE, Kind.HTTP)
    assert entry(ledger).kind is Kind.HTTP
    frozen(ledger, ONE, 0, attrs.evolve(RECORD, kind=Kind.WEBSOCKET))
    assert entry(ledger).kind is Kind.WEBSOCKET


def test_a_slot_does_not_tell_the_kind_the_ledger_does() -> None:
    """What a killed WebSocket worker left goes on as a WebSocket."""
    ledger = Ledger()
    lend(ledger, ONE, C, Kind.WEBSOCKET)
    ledger.recover({C: RECORD})
    assert entry(ledger).record == attrs.evolve(RECORD, kind=Kind.WEBSOCKET)


# ---- what is illegal


ILLEGAL: list[tuple[str, Callable[[], Ledger], Callable[[Ledger], object]]] = [
    ("lent twice", lent, lambda it: lend(it, TWO, C)),
    ("lent twice in one message", lent, lambda it: it.lend(TWO, [11, 11], [1, 2], [0, 0], [0, 0])),
    ("lent without a descriptor", lent, lambda it: it.lend(TWO, [11, 12], [1], [0, 0], [0, 0])),
    ("lent as an unknown kind", lent, lambda it: lend(it, ONE, 11, 4)),
    ("inherited twice", Ledger, lambda it: it.inherit(cookie=[C, C], owner=[ONE, ONE], kind=[0, 0])),
    ("inherited as an unknown kind", Ledger, lambda it: it.inherit(cookie=[C], owner=[ONE], kind=[4])),
    ("restored over another", lent, lambda it: it.restore(Entry(C, 1, 0, TWO))),
    ("released by another", lent, lambda it: release(it, TWO, C)),
    ("released while parked", parked, lambda it: release(it, ONE, C)),
    ("released twice in one message", lent, lambda it: release(it, ONE, C, C)),
    ("released at another epoch", lent, lambda it: release(it, ONE, C, epoch=1)),
    ("one released and an unknown one", lent, lambda it: release(it, ONE, C, 99)),
    ("frozen while freezing", freezing, lambda it: it.freeze([C])),
    ("frozen while parked", parked, lambda it: it.freeze([C])),
    ("a record that nobody asked for", lent, lambda it: frozen(it, ONE, 0)),
    ("a record of another", freezing, lambda it: frozen(it, TWO, 0)),
    ("a record of another epoch", freezing, lambda it: frozen(it, ONE, 1)),
    ("a record of an unknown kind", freezing, lambda it: frozen(it, ONE, 0, Record(kind=4))),
    ("a record twice", parked, lambda it: frozen(it, ONE, 0)),
    ("a refusal that nobody asked for", lent, lambda it: refuse(it, ONE, 0)),
    ("a refusal of another", freezing, lambda it: refuse(it, TWO, 0)),
    ("thawed while served", lent, lambda it: it.thaw([C], TWO)),
    ("thawed while freezing", freezing, lambda it: it.thaw([C], TWO)),
    ("thawed twice", thawing, lambda it: it.thaw([C], ONE)),
    ("adopted while served", lent, lambda it: adopt(it, ONE, 0)),
    ("adopted by another", thawing, lambda it: adopt(it, ONE, 1)),
    ("adopted at another epoch", thawing, lambda it: adopt(it, TWO, 0)),
    ("adopted twice", adopted, lambda it: adopt(it, TWO, 1)),
    ("parked while served", adopted, lambda it: it.park([C])),
    ("parked while the incumbent serves", freezing, lambda it: it.park([C])),
    ("another kind by another", lent, lambda it: became(it, TWO, Kind.HTTP)),
    ("another kind of what is parked", parked, lambda it: became(it, ONE, Kind.HTTP)),
    ("another kind of what was given", thawing, lambda it: became(it, TWO, Kind.HTTP)),
    ("a kind that is unknown", lent, lambda it: became(it, ONE, 4)),
    ("ceded by another", lent, lambda it: cede(it, TWO)),
    ("ceded while freezing", freezing, lambda it: cede(it, ONE)),
    ("a record where there is none", lent, lambda it: it.records_for([C], ONE)),
]


@pytest.mark.parametrize(("made", "use"), [pytest.param(made, use, id=name) for name, made, use in ILLEGAL])
def test_an_illegal_use_changes_nothing(made: Callable[[], Ledger], use: Callable[[Ledger], object]) -> None:
    """Each method checks first: what is refused leaves the ledger as it was."""
    ledger = made()
    before = picture(ledger)
    with pytest.raises(IllegalEvent):
        use(ledger)
    assert picture(ledger) == before
