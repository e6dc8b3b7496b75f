"""The phases of a change: what each event means in each of them, told as stories."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import pytest

from copyover import events, messages
from copyover.change import Change, Phase
from copyover.entries import Standing
from copyover.errors import IllegalEvent
from copyover.events import Died, FromWorker, Outcome, StopAsked, TimerFired
from copyover.holdings import ACKED_TOGETHER, MAX_BACKOFF_S, Holdings, Strength
from copyover.ledger import Ledger
from copyover.messages import Doing, Kind, RecordFlag
from copyover.move import ROLLING_BATCH, Move
from copyover.parking import Parking
from copyover.reload import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

E = TypeVar("E")
M = TypeVar("M", bound=messages.Message)

READY = messages.Ready(application="app:main", loop="asyncio", writes=1, reads=[1], shares=False, interface="handler")


def lend_of(*cookies: int, listener: int = 0, kind: Kind = Kind.HANDLER) -> messages.Lend:
    return messages.Lend(cookie=cookies, listener=(listener,) * len(cookies), kind=(kind,) * len(cookies))


class Story:
    """A machine, and the words to tell what happens to it. Descriptors are cookie + 1000."""

    def __init__(self, *, capacity: int = 1 << 30, workers: int = 1) -> None:
        self.machine = Machine(capacity)
        self.now_s = 0.0
        self.effects: list[events.Effect] = []  # of the last event
        self.generation = 0
        self.reload(workers=workers)
        self.all_ready()
        self.expects(Phase.SERVING)

    def handle(self, event: events.Event, *, after_s: float = 0.001) -> list[events.Effect]:
        self.now_s += after_s
        self.effects = self.machine.handle(event, self.now_s)
        return self.effects

    def says(self, worker: int, message: messages.Message, descriptors: Sequence[int] = ()) -> list[events.Effect]:
        return self.handle(FromWorker(worker, message, descriptors))

    # ---- what happens

    def reload(self, **wishes: Any) -> list[events.Effect]:
        self.generation += 1
        asked: dict[str, Any] = {"asker": 7, "workers": 1, "move": "together", "timeout_s": 60.0} | wishes
        return self.handle(events.Reload(generation=self.generation, **asked))

    def all_ready(self) -> None:
        for worker in [w.id for w in self.machine.holdings.workers.values() if w.strength is Strength.BOOTING]:
            self.says(worker, READY)

    def lend(self, worker: int, *cookies: int, listener: int = 0, kind: Kind = Kind.HANDLER) -> list[events.Effect]:
        return self.says(worker, lend_of(*cookies, listener=listener, kind=kind), [cookie + 1000 for cookie in cookies])

    def cede(self, worker: int, cookie: int, epoch: int = 0) -> list[events.Effect]:
        columns = messages.record_columns([messages.Record(schema=1, state=f"{cookie} by {worker}".encode())])
        return self.says(worker, messages.Cede(cookie=(cookie,), epoch=(epoch,), **columns))

    def became(self, worker: int, cookie: int, kind: Kind, epoch: int = 0) -> list[events.Effect]:
        return self.says(worker, messages.Became(cookie=(cookie,), epoch=(epoch,), kind=(kind,)))

    def release(self, worker: int, cookie: int, epoch: int = 0) -> list[events.Effect]:
        how = (messages.How.CLOSED,)
        return self.says(worker, messages.Release(cookie=(cookie,), epoch=(epoch,), how=how))

    def staged(self, worker: int) -> list[events.Effect]:
        return self.says(worker, messages.Staged(total=self.machine.holdings.workers[worker].staged))

    def frozen(
        self, worker: int, *cookies: int, epoch: int = 0, batch: int = 0, kind: Kind = Kind.HANDLER
    ) -> list[events.Effect]:
        records = [messages.Record(kind, schema=1, state=f"{cookie} by {worker}".encode()) for cookie in cookies]
        epochs = (epoch,) * len(cookies)
        columns = messages.record_columns(records)
        return self.says(worker, messages.Frozen(batch=batch, cookie=cookies, epoch=epochs, **columns))

    def gathered(self, worker: int, *shared: bytes) -> list[events.Effect]:
        return self.says(worker, messages.Gathered(shared=shared))

    def adopted(self, worker: int, *cookies: int, epoch: int = 1) -> list[events.Effect]:
        epochs = (epoch,) * len(cookies)
        return self.says(worker, messages.Adopted(cookie=cookies, epoch=epochs, pause_us=(900,) * len(cookies)))

    def refused(self, worker: int, cookie: int, *, epoch: int, reason: bytes = b"busy") -> list[events.Effect]:
        return self.says(worker, messages.Refused(cookie=(cookie,), epoch=(epoch,), reason=(reason,)))

    def off(self, worker: int) -> list[events.Effect]:
        found = self.machine.holdings.workers.get(worker)
        return self.says(worker, messages.AcceptOffAck(number=found.offs if found else 1))

    def dies(self, worker: int, how: str = "was killed by SIGKILL") -> list[events.Effect]:
        return self.handle(Died(worker, how))

    def to_staging(self, *cookies: int, **wishes: Any) -> int:
        """Reload with these connections in worker 1; return the replacement."""
        self.lend(1, *cookies)
        self.reload(**wishes)
        self.all_ready()
        self.expects(Phase.STAGING)
        return max(self.machine.holdings.workers)

    def to_moving(self, *cookies: int, **wishes: Any) -> int:
        replacement = self.to_staging(*cookies, **wishes)
        self.staged(replacement)
        self.expects(Phase.MOVING)
        return replacement

    def to_thawed(self, *cookies: int, **wishes: Any) -> int:
        """Freeze all of them, so that the replacement was given their records."""
        replacement = self.to_moving(*cookies, **wishes)
        self.off(1)
        self.frozen(1, *cookies)
        return replacement

    def to_baking(self, *cookies: int, **wishes: Any) -> int:
        """All is with the replacement, the incumbent waits."""
        replacement = self.to_thawed(*cookies, **({"move": "rolling", "bake_s": 30.0} | wishes))
        self.adopted(replacement, *cookies)
        self.expects(Phase.BAKING)
        return replacement

    def expects(self, phase: Phase) -> None:
        assert self.machine.phase is phase

    # ---- what comes out

    def of(self, kind: type[E]) -> list[E]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def sent(self, worker: int) -> list[messages.Message]:
        return [effect.message for effect in self.of(events.Send) if effect.worker == worker]

    def sent_one(self, worker: int, kind: type[M]) -> M:
        (message,) = [message for message in self.sent(worker) if isinstance(message, kind)]
        return message

    @property
    def result(self) -> events.Result:
        (finished,) = self.of(events.Finished)
        return finished.result

    @property
    def killed(self) -> set[int]:
        return {effect.worker for effect in self.of(events.Kill)}

    def standing(self, cookie: int) -> tuple[int, Standing]:
        entry = self.machine.ledger.entry(cookie)
        return entry.owner, entry.standing


def kinds(found: Sequence[messages.Message]) -> list[str]:
    return [type(message).__name__ for message in found]


# ---- the table


def picture(value: object) -> object:
    """All that a machine knows, comparable; the effects of its last event are no part of it."""
    if isinstance(value, (Machine, Holdings, Ledger, Change, Move, Parking)):
        skipped = {"effects", "_now_s", "now_s", "_holdings", "_ledger"}
        return {name: picture(inner) for name, inner in vars(value).items() if name not in skipped}
    if isinstance(value, dict):
        return {key: picture(inner) for key, inner in value.items()}
    return repr(value)


def in_phase(phase: Phase) -> Story:
    """Worker 1 has connections 10 and 11, 12 has moved to worker 2 where the phase allows for it."""
    story = Story()
    if phase is Phase.SERVING:
        story.lend(1, 10, 11)
    elif phase is Phase.BOOTING:
        story.lend(1, 10, 11)
        story.reload(workers=2)
    elif phase is Phase.STAGING:
        story.to_staging(10, 11)
    elif phase is Phase.BAKING:
        story.to_baking(10, 11)
    elif phase in (Phase.MOVING, Phase.ROLLING_BACK):
        replacement = story.to_moving(10, 11, 12)
        story.off(1)
        story.frozen(1, 12)
        story.gathered(1)
        story.adopted(replacement, 12)
        if phase is Phase.ROLLING_BACK:
            story.handle(TimerFired("change"))
    else:
        story.lend(1, 10, 11)
        story.handle(StopAsked(5.0))
        if phase is Phase.STOPPED:
            story.dies(1)
    story.expects(phase)
    return story


def every_message(worker: int) -> list[messages.Message]:
    """One of each kind, of connections that are the worker's, are another's, or are nobody's."""
    found: list[messages.Message] = [
        READY,
        messages.Hello(wire=[1, 1], record=[1, 1], copyover="0", python="3", pid=1, worker=worker, instance="x"),
        messages.Failed(reason="no", status=18),
        messages.AcceptOffAck(number=1),
        messages.Gathered(shared=()),
        messages.Frozen(batch=1),
        messages.Welcome(wire=1, generation=1, names={}, application="", app_dir="", options={}),
        *(messages.Staged(total=total) for total in (0, 2, 99)),
        messages.AcceptOn(moving=False),
        messages.MoveOver(),
    ]
    found.append(messages.Forward(cookie=(10, 77), act=(0, 0), pushed=(b"a", b"b")))
    one = messages.record_columns([messages.Record()])
    for cookie, epoch in itertools.product((10, 12, 77), (0, 1, 2)):
        at: dict[str, Any] = {"cookie": (cookie,), "epoch": (epoch,)}
        found += [
            messages.Release(how=(0,), **at),
            messages.Became(kind=(1,), **at),
            messages.Became(kind=(4,), **at),
            messages.Adopted(pause_us=(0,), **at),
            messages.Refused(reason=(b"busy",), **at),
            messages.Frozen(batch=0, **at, **one),
            messages.Cede(**at, **one),
        ]
    found.append(
        messages.Frozen(batch=0, cookie=(10, 10), epoch=(0, 0), **messages.record_columns([messages.Record()] * 2))
    )
    return found


def every_event() -> list[events.Event]:
    from_workers = [FromWorker(worker, message) for worker in (1, 2, 99) for message in every_message(worker)]
    lends = [
        FromWorker(worker, lend_of(*cookies), descriptors)
        for worker in (1, 2, 99)
        for cookies, descriptors in (((20,), [1020]), ((10,), [1]), ((20, 20), [1, 2]), ((20, 21), [1]))
    ]
    lends.append(FromWorker(1, attrs.evolve(lend_of(20), kind=(4,)), [1020]))
    timers = [TimerFired(name) for name in ("change", "stop", "healthy", "retire 1", "retire 2", "retire 99", "other")]
    asked = events.Reload(7, 9, 1, "together", 60.0)
    reloads = [asked, attrs.evolve(asked, is_remembered=True)]
    record = messages.Record(schema=1)
    deaths: list[events.Event] = [
        Died(worker, "was killed", found) for worker in (1, 2) for found in ({}, {10: record, 11: None})
    ]
    deaths += [events.Reaped(1), events.Reaped(2)]
    bake: list[events.Event] = [events.Checked(None), events.Checked("exited with 1"), events.CancelAsked("cancelled")]
    return [*from_workers, *lends, *timers, *reloads, *deaths, *bake, StopAsked(3.0)]


@pytest.mark.parametrize("phase", Phase)
def test_an_illegal_event_changes_nothing(phase: Phase) -> None:
    """Each event in each phase either has a transition, or raises IllegalEvent and leaves everything as it was."""
    illegal = 0
    for event in every_event():
        machine = in_phase(phase).machine
        if isinstance(event, (Died, events.Reaped)) and event.worker not in machine.holdings.workers:
            continue  # only the living die
        before = picture(machine)
        try:
            machine.handle(event, 1e6)
        except IllegalEvent:
            illegal += 1
            assert picture(machine) == before, event
    assert illegal > 20


@pytest.mark.parametrize("phase", Phase)
def test_the_table_is_all_that_there_is(phase: Phase) -> None:
    """A kind of event that the table does not list for a phase is refused in it, with the kind and the phase named."""
    for event in every_event():
        key = type(event.message) if isinstance(event, FromWorker) else type(event)
        machine = in_phase(phase).machine
        if (phase, key) in Machine._TRANSITIONS or (isinstance(event, FromWorker) and event.worker == 99):
            continue
        if isinstance(event, FromWorker) and not machine.holdings.is_alive(event.worker):
            continue
        with pytest.raises(IllegalEvent, match=f"{key.__name__} has no transition while {phase.value}"):
            machine.handle(event, 1e6)


def test_a_worker_that_is_unknown_is_refused() -> None:
    """A message of a worker that was never started, or is buried, means nothing."""
    with pytest.raises(IllegalEvent, match="worker 99 is unknown"):
        Story().says(99, messages.AcceptOffAck(number=1))


# ---- first boot


def test_the_first_generation_serves_once_all_its_workers_are_ready() -> None:
    """Nothing accepts before the last is ready; then all do, and whoever started the holder is told."""
    machine = Machine()
    first = machine.handle(events.Reload(7, 1, 2, "together", 60.0), 0.0)
    assert [effect.worker for effect in first if isinstance(effect, events.Spawn)] == [1, 2]
    assert events.SetTimer("change", 60.0) in first
    assert not [effect for effect in machine.handle(FromWorker(1, READY), 1.0) if isinstance(effect, events.Send)]
    last = machine.handle(FromWorker(2, READY), 2.0)
    accepting = [
        effect.worker
        for effect in last
        if isinstance(effect, events.Send)
        if effect.message == messages.AcceptOn(moving=False)
    ]
    assert set(accepting) == {1, 2}
    (finished,) = [effect for effect in last if isinstance(effect, events.Finished)]
    assert (finished.asker, finished.result.outcome, finished.result.serving_generation) == (7, Outcome.DONE, 1)
    assert finished.result.from_generation == 0
    assert events.SetTimer("change", None) in last


def test_a_first_generation_that_dies_is_not_started_again() -> None:
    """Where nothing has ever served there is nothing to restore: the failure is reported."""
    machine = Machine()
    machine.handle(events.Reload(7, 1, 1, "together", 60.0), 0.0)
    effects = machine.handle(Died(1, "worker 1 exited with 1 before it was ready"), 1.0)
    (finished,) = [effect for effect in effects if isinstance(effect, events.Finished)]
    assert finished.result.outcome is Outcome.REFUSED
    assert finished.result.error == "worker 1 exited with 1 before it was ready"
    assert finished.result.serving_generation == 0
    assert not [effect for effect in effects if isinstance(effect, events.Spawn)]


# ---- a reload, together


def test_a_together_reload_narrated() -> None:
    """Stage; accept off; freeze all as one cut; thaw, and enter only once the cut is gathered; commit."""
    story = Story()
    story.lend(1, 10, 11)
    assert story.sent(1) == []
    story.reload()
    story.expects(Phase.BOOTING)
    assert story.of(events.Send) == []
    story.says(2, READY)
    story.expects(Phase.STAGING)
    stage = story.sent_one(2, messages.Stage)
    assert stage.cookie == (10, 11)
    assert [effect.descriptors for effect in story.of(events.Send)] == [(1010, 1011)]
    story.says(2, messages.Staged(total=1))
    story.expects(Phase.STAGING)
    story.says(2, messages.Staged(total=2))
    story.expects(Phase.MOVING)
    assert story.sent(1) == [messages.AcceptOff(number=1, moving=True)]
    assert story.sent(2) == []
    story.off(1)
    freeze = story.sent_one(1, messages.Freeze)
    assert (freeze.cookie, freeze.epoch, freeze.more) == ((10, 11), (0, 0), False)
    assert (freeze.gather_ms, freeze.wait_ms) == (1000, 5000)
    story.frozen(1, 10, 11, batch=freeze.batch)
    assert kinds(story.sent(2)) == ["Thaw"]
    thaw = story.sent_one(2, messages.Thaw)
    assert (thaw.epoch, thaw.state) == ((1, 1), (b"10 by 1", b"11 by 1"))
    assert thaw.flags == (RecordFlag.CUT, RecordFlag.CUT)
    story.gathered(1, b"shared")
    assert story.sent(2) == [messages.Enter(cut=True, shared=(b"shared",)), messages.AcceptOn(moving=True)]
    story.adopted(2, 10)
    story.expects(Phase.MOVING)
    story.adopted(2, 11)
    assert story.sent(1) == [messages.Commit(drain_ms=3_600_000)]
    assert messages.MoveOver() in story.sent(2)
    assert (story.result.outcome, story.result.moved, story.result.lost, story.result.error) == (
        Outcome.DONE,
        2,
        0,
        None,
    )
    assert story.result.pauses_us == (900, 900)
    assert set(story.result.phases_ms) == {"booting", "staging", "moving"}
    assert story.machine.holdings.workers[1].strength is Strength.RETIRING
    assert not story.machine.ledger.entry(10).has_passage


def test_all_of_one_incumbent_go_to_one_worker_of_the_replacement() -> None:
    """Together, rooms stay whole: each incumbent's connections have one destination."""
    story = Story(workers=2)
    story.lend(1, 10, 11)
    story.lend(2, 20, 21)
    story.reload(workers=2)
    story.all_ready()
    assert {story.sent_one(worker, messages.Stage).cookie for worker in (3, 4)} == {(10, 11), (20, 21)}


def test_a_cut_is_entered_when_all_that_go_there_are_gathered() -> None:
    """Two incumbents into one: the replacement enters with both shared states, after both, stragglers included."""
    story = Story(workers=2)
    story.lend(1, 10)
    story.lend(2, 20)
    story.reload(workers=1)
    story.all_ready()
    story.staged(3)
    story.off(1)
    story.off(2)
    story.gathered(1, b"one")
    story.frozen(1, 10)  # a straggler: it missed the cut of its own worker, and waits for the other's
    assert kinds(story.sent(3)) == ["Thaw"]
    story.frozen(2, 20)
    assert kinds(story.sent(3)) == ["Thaw"]
    story.gathered(2, b"two")
    assert story.sent_one(3, messages.Enter).shared == (b"one", b"two")


def test_shared_state_travels_without_any_connection() -> None:
    """The rooms of an idle server move too: no commit before the incumbent's cut, empty as it is, is gathered."""
    story = Story()
    story.reload()
    story.says(2, READY)
    story.off(1)
    story.expects(Phase.MOVING)
    story.gathered(1, b"rooms")
    assert story.sent_one(2, messages.Enter) == messages.Enter(cut=True, shared=(b"rooms",))
    assert story.result.outcome is Outcome.DONE


def test_a_straggler_follows_alone() -> None:
    """What reaches its boundary after the cut was entered is thawed and entered at once."""
    story = Story()
    replacement = story.to_moving(10, 11)
    story.off(1)
    story.frozen(1, 10)
    story.gathered(1)
    story.adopted(replacement, 10)
    story.frozen(1, 11)
    assert kinds(story.sent(replacement)) == ["Thaw", "Enter"]
    assert story.sent_one(replacement, messages.Thaw).flags == (0,)
    assert story.sent_one(replacement, messages.Enter) == messages.Enter(cut=False)


def test_lends_before_the_ack_move_too() -> None:
    """Connections that come while staging or moving are staged, and frozen with the others."""
    story = Story()
    replacement = story.to_staging(10)
    story.lend(1, 11)
    assert story.sent_one(replacement, messages.Stage).cookie == (11,)
    story.staged(replacement)
    story.lend(1, 12)
    assert story.sent_one(replacement, messages.Stage).cookie == (12,)
    story.off(1)
    assert story.sent_one(1, messages.Freeze).cookie == (10, 11, 12)


def test_no_commit_before_accept_off_is_acknowledged() -> None:
    """With nothing to move, the incumbent's last lends may still be on their way: the move waits for its word."""
    story = Story()
    story.reload(move="rolling")
    story.says(2, READY)
    story.expects(Phase.MOVING)
    story.lend(1, 10)
    story.expects(Phase.MOVING)
    story.off(1)
    assert story.sent_one(1, messages.Freeze).cookie == (10,)


def test_no_commit_before_every_connection_is_answered() -> None:
    """Adopted, kept or ended: as long as one of them is none of these, the incumbent keeps everything."""
    story = Story()
    replacement = story.to_moving(10, 11, 12)
    story.off(1)
    story.frozen(1, 10)
    story.gathered(1)
    story.adopted(replacement, 10)
    story.refused(1, 11, epoch=0, reason=b"in the middle of a message")
    assert story.sent(replacement) == [messages.Drop(cookie=(11,))]
    story.expects(Phase.MOVING)
    story.release(1, 12)
    assert story.of(events.Close) == [events.Close((1012,))]
    assert story.sent_one(replacement, messages.Drop).cookie == (12,)
    assert (story.result.moved, story.result.kept, story.result.ended) == (1, 1, 1)
    assert story.result.kept_reasons == ((11, "in the middle of a message"),)
    assert story.machine.holdings.kept == {11: "in the middle of a message"}
    story.release(1, 11)
    assert story.machine.holdings.kept == {}


def test_an_answer_to_what_has_ended_is_void() -> None:
    """A freeze and a release that crossed: the empty answer, whenever it comes, is no offence."""
    story = Story()
    replacement = story.to_moving(10, move="rolling")
    story.off(1)
    batch = story.sent_one(1, messages.Freeze).batch
    story.release(1, 10)
    story.expects(Phase.SERVING)
    assert story.says(1, messages.Frozen(batch=batch)) == []
    assert story.machine.holdings.is_alive(replacement)


def test_what_ends_in_the_replacement_is_dropped_in_the_incumbent() -> None:
    """A tombstone: the copy that waits for a roll-back must never wake up."""
    story = Story()
    replacement = story.to_thawed(10, 11, move="rolling")
    story.adopted(replacement, 10)
    story.release(replacement, 10, epoch=1)
    assert story.sent(1) == [messages.Drop(cookie=(10,))]
    assert 10 in story.machine.ledger.tombstones


# ---- what others push


def pushed(*rows: tuple[int, bytes]) -> dict[str, Any]:
    cookies, pushes = zip(*rows, strict=True)
    return {"cookie": cookies, "act": (messages.Act.SEND,) * len(rows), "pushed": pushes}


def test_a_push_follows_its_connection() -> None:
    """A straggler's broadcast: to whoever has the connection, to nobody if it has ended."""
    story = Story()
    replacement = story.to_thawed(10, 11)
    story.gathered(1)
    story.adopted(replacement, 10)
    story.says(1, messages.Forward(**pushed((10, b"a"), (77, b"b"), (10, b"c"))))
    assert story.of(events.Send) == [events.Send(replacement, messages.Push(**pushed((10, b"a"), (10, b"c"))))]


def test_a_push_waits_until_the_connection_is_adopted() -> None:
    """Nobody may have it who could still give it back unserved: it would be lost with that copy, or sent twice."""
    story = Story()
    replacement = story.to_thawed(10)
    story.says(1, messages.Forward(**pushed((10, b"a"))))
    assert story.of(events.Send) == []
    story.handle(TimerFired("change"))
    story.frozen(replacement, 10, epoch=1)
    assert "Push" not in kinds(story.sent(1))
    story.adopted(1, 10, epoch=2)
    assert story.sent_one(1, messages.Push) == messages.Push(**pushed((10, b"a")))


# ---- a reload, rolling


def test_rolling_moves_in_batches() -> None:
    """At most two batches are between freeze and adopted; the replacement accepts from the start."""
    story = Story()
    cookies = range(1, 3 * ROLLING_BATCH + 1)
    story.lend(1, *cookies)
    story.reload(move="rolling")
    story.says(2, READY)
    story.staged(2)
    assert story.sent(2) == [messages.AcceptOn(moving=True)]
    story.off(1)
    first, second = (message for message in story.sent(1) if isinstance(message, messages.Freeze))
    assert (len(first.cookie), len(second.cookie)) == (ROLLING_BATCH, ROLLING_BATCH)
    assert (first.gather_ms, second.gather_ms) == (0, 0)
    story.frozen(1, *first.cookie, batch=first.batch)
    assert kinds(story.sent(2)) == ["Thaw", "Enter"]
    third = story.sent_one(1, messages.Freeze)
    story.frozen(1, *second.cookie, batch=second.batch)
    story.adopted(2, *first.cookie)
    story.adopted(2, *second.cookie)
    story.frozen(1, *third.cookie, batch=third.batch)
    story.adopted(2, *third.cookie)
    assert (story.result.outcome, story.result.moved) == (Outcome.DONE, 3 * ROLLING_BATCH)


def test_rolling_spreads_over_the_workers() -> None:
    """Each connection goes to the least loaded worker of the replacement."""
    story = Story()
    story.lend(1, *range(10, 20))
    story.reload(move="rolling", workers=2)
    story.all_ready()
    assert [len(story.sent_one(worker, messages.Stage).cookie) for worker in (2, 3)] == [5, 5]


def test_a_busy_batch_holds_up_no_other() -> None:
    """The first answer to a batch frees its place, although some of it are still in the middle of a message."""
    story = Story()
    story.lend(1, *range(1, 3 * ROLLING_BATCH + 1))
    story.reload(move="rolling")
    story.says(2, READY)
    story.staged(2)
    story.off(1)
    first, _ = (message for message in story.sent(1) if isinstance(message, messages.Freeze))
    story.says(1, messages.Frozen(batch=first.batch))
    assert len(story.sent_one(1, messages.Freeze).cookie) == ROLLING_BATCH


# ---- a reload, auto


def to_auto(**wishes: Any) -> Story:
    """Incumbents 1 (WebSocket 20, and 10 to 13 of HTTP) and 2 (WebSocket 21); replacements 3 and 4."""
    story = Story(workers=2)
    story.lend(1, 10, 11, 12, 13, kind=Kind.HTTP)
    story.lend(1, 20, kind=Kind.WEBSOCKET)
    story.lend(2, 21, kind=Kind.WEBSOCKET)
    story.reload(move="auto", workers=2, **wishes)
    story.all_ready()
    return story


def test_auto_moves_http_after_the_cut() -> None:
    """All but HTTP is one cut; HTTP is served on meanwhile, and is frozen once every cut has been entered."""
    story = to_auto()
    story.staged(3)
    story.staged(4)
    assert story.sent(3) == [], "it accepts when its cut has been entered"
    story.off(1)
    cut = story.sent_one(1, messages.Freeze)
    assert (cut.cookie, cut.gather_ms) == ((20,), 1000)
    story.off(2)
    story.frozen(1, 20)
    story.gathered(1, b"j1")
    assert kinds(story.sent(3)) == ["Enter", "AcceptOn"]
    assert not story.sent(1), "the other cut has not been entered"
    assert story.standing(10) == (1, Standing.SERVED)
    story.frozen(2, 21)
    story.gathered(2, b"j2")
    assert kinds(story.sent(4)) == ["Enter", "AcceptOn"]
    batch = story.sent_one(1, messages.Freeze)
    assert (batch.cookie, batch.gather_ms) == ((10, 11, 12, 13), 0)
    story.adopted(3, 20)
    story.adopted(4, 21)
    story.frozen(1, *batch.cookie, batch=batch.batch, kind=Kind.HTTP)
    for worker in (3, 4):
        given = [e.cookie for e in story.machine.ledger.entries() if e.owner == worker and e.kind is Kind.HTTP]
        assert len(given) == 2, "HTTP goes to the least loaded"
        story.adopted(worker, *given)
    assert (story.result.outcome, story.result.moved) == (Outcome.DONE, 6)


def test_auto_without_http_is_together_and_with_http_alone_still_shares() -> None:
    """An empty cut is asked for too: the shared state travels with it, and HTTP finds it there."""
    story = Story()
    story.lend(1, 10, kind=Kind.HTTP)
    story.reload(move="auto")
    story.all_ready()
    story.staged(2)
    story.off(1)
    cut = story.sent_one(1, messages.Freeze)
    assert (cut.cookie, cut.gather_ms) == ((), 1000)
    story.gathered(1, b"j{}")
    assert story.sent_one(2, messages.Enter).shared == (b"j{}",)
    assert story.sent_one(1, messages.Freeze).cookie == (10,)


def test_a_cut_that_dies_with_its_worker_holds_up_no_http() -> None:
    """A worker that is killed before it has gathered is waited for no longer."""
    story = to_auto()
    story.staged(3)
    story.staged(4)
    story.off(1)
    story.off(2)
    story.frozen(1, 20)
    story.gathered(1)
    story.dies(2)
    assert story.sent_one(1, messages.Freeze).cookie == (10, 11, 12, 13)


def test_http_that_became_a_websocket_while_it_was_staged_is_of_the_cut() -> None:
    """It is built anew where its worker's cut goes, and its other copy is closed."""
    story = to_auto()
    elsewhere = next(c for c in (10, 11, 12, 13) if story.machine.ledger.entry(c).staged_in == 4)
    story.became(1, elsewhere, Kind.WEBSOCKET)
    story.staged(3)
    story.staged(4)
    story.off(1)
    assert story.sent_one(1, messages.Freeze).cookie == (elsewhere, 20)
    story.frozen(1, elsewhere, 20, kind=Kind.WEBSOCKET)
    assert kinds(story.sent(3)) == ["Stage", "Thaw"]
    assert story.sent_one(3, messages.Stage).cookie == (elsewhere,)
    assert story.sent(4) == [messages.Drop(cookie=(elsewhere,))]


def test_http_that_became_a_websocket_in_the_queue_follows_as_a_straggler() -> None:
    """Its record says what it is: it goes to the cut of its worker, alone."""
    story = to_auto()
    story.staged(3)
    story.staged(4)
    story.off(1)
    story.off(2)
    story.frozen(1, 20)
    story.gathered(1)
    elsewhere = next(c for c in (10, 11, 12, 13) if story.machine.ledger.entry(c).staged_in == 4)
    story.became(1, elsewhere, Kind.WEBSOCKET)
    story.frozen(2, 21)
    story.gathered(2)
    assert elsewhere in story.sent_one(1, messages.Freeze).cookie
    story.frozen(1, elsewhere, kind=Kind.WEBSOCKET)
    assert kinds(story.sent(3)) == ["Stage", "Thaw", "Enter"]
    assert story.sent(4) == [messages.Drop(cookie=(elsewhere,))]


def test_a_stream_that_ends_in_the_cut_moves_with_it() -> None:
    """What was of the cut when it was closed is entered with it, whatever it became."""
    story = Story()
    story.lend(1, 10, kind=Kind.STREAM)
    story.reload(move="auto")
    story.all_ready()
    story.staged(2)
    story.off(1)
    story.became(1, 10, Kind.HTTP)
    story.frozen(1, 10, kind=Kind.HTTP)
    assert story.sent_one(2, messages.Thaw).flags == (RecordFlag.CUT,)


# ---- what a retiring worker cedes


def to_kept(*cookies: int) -> Story:
    """Worker 1 retires and keeps these; worker 2 serves."""
    story = Story()
    story.to_moving(*cookies, move="rolling")
    story.off(1)
    for cookie in cookies:
        story.refused(1, cookie, epoch=0)
    story.expects(Phase.SERVING)
    assert set(story.machine.holdings.kept) == set(cookies)
    return story


def test_what_is_ceded_is_served_by_the_generation_that_serves() -> None:
    """It is built there from its record, and counts as kept no more; its ceder closes its copy once it is adopted."""
    story = to_kept(10)
    story.cede(1, 10)
    assert kinds(story.sent(2)) == ["Stage", "Thaw", "Enter"]
    assert story.sent_one(2, messages.Thaw).state == (b"10 by 1",)
    assert not story.sent(1)
    assert (story.machine.holdings.kept, story.machine.holdings.counters["ceded"]) == ({}, 1)
    assert "ceded" in [note.event for note in story.of(events.Note)]
    story.adopted(2, 10)
    assert story.sent(1) == [messages.Drop(cookie=(10,))]
    assert story.sent(2) == [messages.MoveOver()]
    assert not story.machine.ledger.entry(10).has_passage


def test_what_nobody_else_can_read_goes_back_to_its_ceder() -> None:
    """Its coroutine there still waits, and goes on; it is kept again, with the reason."""
    story = to_kept(10)
    story.cede(1, 10)
    story.refused(2, 10, epoch=1, reason=b"no such schema")
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)
    assert not story.of(events.Reset)
    story.adopted(1, 10, epoch=2)
    assert story.sent(1) == [], "move_over would forget what else it has ceded"
    assert story.standing(10) == (1, Standing.SERVED)
    assert story.machine.holdings.kept == {10: "no such schema"}


def test_what_nobody_can_read_and_whose_ceder_died_is_lost() -> None:
    """Only then: its client is told."""
    story = to_kept(10)
    story.cede(1, 10)
    story.dies(1)
    story.refused(2, 10, epoch=1)
    assert story.of(events.Reset) == [events.Reset((1010,))]


def test_a_ceder_may_die_and_who_was_given_it_too() -> None:
    """The record is with the holder until somebody serves it."""
    story = to_kept(10)
    story.cede(1, 10)
    story.dies(1)
    story.dies(2)
    (spawn,) = story.of(events.Spawn)
    story.says(spawn.worker, READY)
    assert story.sent_one(spawn.worker, messages.Thaw).state == (b"10 by 1",)
    assert story.standing(10) == (spawn.worker, Standing.THAWING)


def test_what_was_ceded_goes_back_exactly_if_who_was_given_it_died_before_the_stop() -> None:
    """While all is stopping nobody else takes it: its ceder ends it, at its boundary."""
    story = to_kept(10)
    story.cede(1, 10)
    story.handle(StopAsked(5.0))
    story.dies(2)
    assert kinds(story.sent(1)) == ["Thaw", "Enter"]
    assert not story.of(events.Reset)


def test_a_cede_that_crosses_the_stop_is_given_back() -> None:
    """The worker had not heard of the stop."""
    story = to_kept(10)
    story.handle(StopAsked(5.0))
    story.cede(1, 10)
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)


def test_a_cede_before_the_move_waits_for_it() -> None:
    """It is staged with all others; if the change is refused, who serves takes it, and its ceder still can."""
    story = to_kept(10)
    story.lend(2, 20)
    story.reload(move="rolling")
    story.all_ready()
    story.expects(Phase.STAGING)
    story.cede(1, 10)
    assert kinds(story.sent(3)) == ["Stage"]
    story.dies(3)
    assert kinds(story.sent(2)) == ["AcceptOn", "Stage", "Thaw", "Enter"]
    story.refused(2, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)


def test_a_cede_in_a_move_goes_forward() -> None:
    """The replacement gets it; that it can read nothing of a generation before rolls nothing back."""
    story = to_kept(10)
    story.reload(move="rolling", bake_s=30.0)
    story.all_ready()
    story.cede(1, 10)
    story.expects(Phase.MOVING)
    assert kinds(story.sent(3)) == ["Stage", "Thaw", "Enter"]
    story.refused(3, 10, epoch=1)
    assert kinds(story.sent(2)) == ["Stage", "Thaw", "Enter"], "the incumbent serves, too"
    story.refused(2, 10, epoch=2)
    assert kinds(story.sent(1)) == ["Thaw", "Enter"]
    story.adopted(1, 10, epoch=3)
    story.off(2)
    story.expects(Phase.BAKING)
    story.handle(TimerFired("change"))
    assert (story.result.outcome, story.result.kept, story.result.moved) == (Outcome.DONE, 1, 0)
    assert story.machine.holdings.kept == {10: "busy"}


def test_what_a_bake_does_not_wait_for_holds_up_the_next_change() -> None:
    """A connection that was ceded as the bake ended is adopted before the next move stages."""
    story = to_kept(10)
    story.reload(move="rolling", bake_s=30.0)
    story.all_ready()
    story.off(2)
    story.expects(Phase.BAKING)
    story.cede(1, 10)
    story.handle(TimerFired("change"))
    story.expects(Phase.SERVING)
    story.reload(move="rolling")
    story.all_ready()
    story.expects(Phase.BOOTING)
    story.adopted(3, 10)
    story.expects(Phase.STAGING)


def test_what_is_ceded_and_has_no_listener_any_more_is_closed() -> None:
    """A roll-back took its listener away: who serves does not know it. Its ceder closes its copy too."""
    story = to_kept(10)
    story.machine.holdings.withdrawn.add(0)
    story.cede(1, 10)
    assert story.of(events.Close) == [events.Close((1010,))]
    assert story.sent(1) == [messages.Drop(cookie=(10,))]
    assert not story.sent(2)


def test_only_who_retires_may_cede() -> None:
    """From a worker of the generation that serves it breaks the protocol; what a killed one had sent still counts."""
    story = to_kept(10)
    story.lend(2, 20)
    with pytest.raises(IllegalEvent, match="worker 2 is ready and ceded"):
        story.cede(2, 20)
    story.machine.holdings.kill(1)
    story.cede(1, 10)
    assert kinds(story.sent(2)) == ["Stage", "Thaw", "Enter"]


def test_a_ceded_connection_that_ends_takes_its_copy_along() -> None:
    """Also one that is lost while nobody has it."""
    story = to_kept(10)
    story.cede(1, 10)
    story.release(2, 10, epoch=1)
    assert story.sent(1) == [messages.Drop(cookie=(10,))]


def report(worker: int, generation: int, *rows: tuple[int, int, Doing], is_leaving: bool = False) -> events.Report:
    """Generations up to 2 are committed; *rows* are cookie, epoch and what the worker does."""
    found = [
        events.Row(cookie, epoch, 0, doing, messages.Record(schema=1, state=b"viewed"), True, 100 * worker + cookie)
        for cookie, epoch, doing in rows
    ]
    return events.Report(worker, generation, READY, generation <= 2, is_leaving, found, [])


def reunited(*reports: events.Report) -> Story:
    story = Story()
    story.machine = Machine()
    story.handle(events.Reunited(events.Reload(0, 0, 1, "auto", 60.0), reports))
    return story


def test_a_new_holder_goes_on_with_what_was_ceded() -> None:
    """Its ceder says that it waits, frozen; it can still go back, and its very coroutine goes on."""
    story = reunited(report(1, 1, (10, 0, Doing.FROZE), is_leaving=True), report(2, 2))
    assert story.sent_one(2, messages.Thaw).state == (b"viewed",)
    story.refused(2, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)


def test_a_new_holder_goes_on_from_the_record_where_others_may_have_served() -> None:
    """Two thaws lie between who ceded it and who has it now: the coroutine there may be of the past."""
    story = reunited(report(1, 1, (10, 0, Doing.FROZE), is_leaving=True), report(2, 2, (10, 2, Doing.WAITS)))
    assert kinds(story.sent(2))[:2] == ["Enter", "Enter"]
    story.refused(2, 10, epoch=2)
    assert story.sent_one(1, messages.Thaw).state == (b"viewed",)


def test_a_new_holder_has_a_stale_copy_dropped() -> None:
    """Somebody has adopted it since: who ceded it need not wait."""
    story = reunited(report(1, 1, (10, 0, Doing.FROZE), is_leaving=True), report(2, 2, (10, 1, Doing.SERVES)))
    assert story.sent_one(1, messages.Drop).cookie == (10,)
    assert story.standing(10) == (2, Standing.SERVED)


def test_what_was_on_its_way_back_is_entered_while_a_change_is_rolled_back() -> None:
    """By its ceder, which is killed if it does not answer."""
    story = reunited(report(1, 1, (10, 2, Doing.WAITS), is_leaving=True), report(2, 2), report(3, 3))
    story.expects(Phase.ROLLING_BACK)
    assert kinds(story.sent(1)) == ["Enter", "Enter"]
    story.off(3)
    story.expects(Phase.ROLLING_BACK)
    story.handle(TimerFired("change"))
    assert story.killed == {1}
    story.dies(1)
    assert kinds(story.sent(2)) == ["Stage", "Thaw", "Enter"]
    assert story.machine.holdings.kept == {}
    story.adopted(2, 10, epoch=3)
    assert story.result.outcome is Outcome.ROLLED_BACK


# ---- what a connection is served as


def test_what_a_connection_became_counts_if_its_worker_dies() -> None:
    """The word of a worker that was killed since is the newest."""
    story = Story()
    story.lend(1, 10, kind=Kind.HTTP)
    story.machine.holdings.kill(1)
    story.became(1, 10, Kind.WEBSOCKET)
    story.handle(Died(1, "was killed by SIGKILL", {10: messages.Record()}))
    (spawn,) = story.of(events.Spawn)
    story.says(spawn.worker, READY)
    assert story.sent_one(spawn.worker, messages.Thaw).kind == (Kind.WEBSOCKET,)


# ---- the replacement fails before the move


def assert_refused(story: Story, *, status: int = 3) -> events.Result:
    story.expects(Phase.SERVING)
    assert (story.result.outcome, story.result.status) == (Outcome.REFUSED, status)
    assert story.result.serving_generation == 1
    assert story.result.lost == story.result.moved == 0
    assert set(story.sent(1)) <= {messages.AcceptOn(moving=False)}, "the incumbent must not notice"
    assert not any(entry.has_passage for entry in story.machine.ledger.entries())
    return story.result


def test_a_replacement_that_dies_while_booting_is_refused() -> None:
    """The incumbent never noticed, and serves on."""
    story = in_phase(Phase.BOOTING)
    story.dies(2, "worker 2 exited with 1")
    assert assert_refused(story, status=18).error == "worker 2 exited with 1"
    assert story.killed == {3}
    story.dies(3)
    assert story.of(events.Spawn) == []


def test_a_replacement_that_says_it_failed_is_refused_with_its_status() -> None:
    """Its own words and exit status reach whoever asked."""
    story = in_phase(Phase.BOOTING)
    story.says(2, messages.Failed(reason="there is no module app", status=10))
    assert assert_refused(story, status=10).error == "there is no module app"
    assert story.killed == {2, 3}


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.STAGING])
def test_a_replacement_that_is_too_late_is_refused(phase: Phase) -> None:
    """Not ready, or not built, within the limit: it is killed, and the sentence says how long it had."""
    story = in_phase(phase)
    story.handle(TimerFired("change"))
    error = assert_refused(story, status=18).error
    assert error == f"generation 2 was not ready within 60 s (still {phase.value})"
    assert 2 in story.killed


def test_a_replacement_that_dies_while_staging_is_refused() -> None:
    """What was built, paused, goes with it; nothing had been frozen."""
    story = in_phase(Phase.STAGING)
    story.dies(2, "worker 2 was killed by SIGSEGV")
    assert_refused(story, status=18)
    assert story.standing(10) == (1, Standing.SERVED)


def test_a_replacement_that_fails_while_staging_is_refused() -> None:
    """The same with its own word."""
    story = in_phase(Phase.STAGING)
    story.says(2, messages.Failed(reason="out of memory", status=18))
    assert_refused(story, status=18)


def test_an_incumbent_that_fails_or_dies_before_the_move_does_not_stop_it() -> None:
    """Its connections are lost, and counted; the replacement goes on to serve."""
    story = in_phase(Phase.STAGING)
    story.says(1, messages.Failed(reason="oh", status=1))
    story.expects(Phase.STAGING)
    story.dies(1)
    assert {descriptor for effect in story.of(events.Reset) for descriptor in effect.descriptors} == {1010, 1011}
    assert [drop.cookie for drop in story.sent(2) if isinstance(drop, messages.Drop)] == [(10, 11)]
    story.staged(2)
    assert (story.result.outcome, story.result.lost, story.result.serving_generation) == (Outcome.DONE, 2, 2)


def test_a_schema_that_cannot_be_read_is_refused_at_the_start() -> None:
    """Before anything is staged; the sentence names the schemas and the remedy."""
    story = Story()
    story.lend(1, 10)
    story.reload()
    story.says(2, attrs.evolve(READY, writes=3, reads=[2, 3]))
    error = assert_refused(story).error
    assert error is not None
    assert "reads states of schema 2, 3" in error
    assert "have schema 1" in error
    assert "reads={1, …}" in error


def test_what_a_refused_replacement_still_says_is_void() -> None:
    """It is killed, and not yet reaped: that it is ready now is of no interest."""
    story = in_phase(Phase.BOOTING)
    story.handle(TimerFired("change"))
    assert story.says(2, READY) == []
    assert story.says(3, messages.Staged(total=0)) == []


# ---- refusals of single connections


def test_a_thaw_that_the_replacement_refuses_goes_back() -> None:
    """The incumbent's very coroutine goes on; the connection is kept, with the reason."""
    story = Story()
    replacement = story.to_thawed(10, 11)
    story.gathered(1)
    story.refused(replacement, 10, epoch=1, reason=b"cannot read it")
    thaw = story.sent_one(1, messages.Thaw)
    assert (thaw.cookie, thaw.epoch, thaw.flags, thaw.state) == ((10,), (2,), (RecordFlag.UNSERVED,), (b"",))
    assert story.sent_one(1, messages.Enter) == messages.Enter(cut=False)
    story.adopted(replacement, 11)
    story.adopted(1, 10, epoch=2)
    assert (story.result.moved, story.result.kept) == (1, 1)
    assert story.result.kept_reasons == ((10, "cannot read it"),)
    assert story.standing(10) == (1, Standing.SERVED)


def test_a_thaw_that_is_refused_where_no_incumbent_lives_is_lost() -> None:
    """Nobody can serve it: its client is told by a true reset, and it is counted."""
    story = Story()
    replacement = story.to_thawed(10)
    story.dies(1)
    story.refused(replacement, 10, epoch=1)
    assert story.of(events.Reset) == [events.Reset((1010,))]
    assert (story.result.outcome, story.result.lost) == (Outcome.DONE, 1)


def test_a_refused_thaw_that_crosses_the_freeze_of_a_roll_back_goes_back() -> None:
    """The replacement holds nothing then: our record stands, and the incumbent gets it."""
    story = Story()
    replacement = story.to_thawed(10, move="rolling")
    story.handle(TimerFired("change"))
    assert story.sent_one(replacement, messages.Freeze).cookie == (10,)
    story.refused(replacement, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).epoch == (2,)
    assert story.standing(10) == (1, Standing.THAWING)


def test_a_record_that_the_incumbent_refuses_stays_in_the_replacement() -> None:
    """Rolling back, what the incumbent cannot read is served where it was; that worker retires instead of dying."""
    story = Story()
    replacement = story.to_thawed(10, move="rolling")
    story.lend(replacement, 20)
    story.handle(TimerFired("change"))
    story.off(replacement)
    story.adopted(replacement, 10)
    story.frozen(replacement, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).state == (b"10 by 2",)
    story.refused(1, 10, epoch=2, reason=b"schema 2")
    assert story.sent_one(replacement, messages.Thaw).epoch == (3,)
    story.adopted(replacement, 10, epoch=3)
    story.frozen(replacement, 20)
    story.adopted(1, 20)
    assert (story.result.outcome, story.result.lost, story.result.kept) == (Outcome.ROLLED_BACK, 0, 1)
    assert story.machine.holdings.workers[replacement].strength is Strength.RETIRING
    assert story.machine.holdings.kept == {10: "schema 2"}


def test_what_goes_back_to_the_replacement_in_a_roll_back_waits_for_no_cut() -> None:
    """There is none any more: it is entered at once, alone."""
    story = Story(workers=2)
    story.lend(1, 10)
    story.reload(workers=1)
    story.all_ready()
    story.staged(3)
    story.off(1)
    story.off(2)
    story.frozen(1, 10)
    story.handle(TimerFired("change"))
    story.frozen(3, 10, epoch=1)
    story.dies(1)
    assert kinds(story.sent(2)) == ["Stage", "Thaw", "Enter"]
    story.refused(2, 10, epoch=3, reason=b"cannot read it")
    assert story.sent_one(3, messages.Thaw).flags == (0,)
    assert story.sent_one(3, messages.Enter) == messages.Enter(cut=False)


def test_a_record_that_everybody_refuses_is_lost() -> None:
    """Nobody living can serve it; that is not silent."""
    story = Story()
    replacement = story.to_thawed(10, move="rolling")
    story.refused(replacement, 10, epoch=1)
    story.refused(1, 10, epoch=2)
    assert story.of(events.Reset) == [events.Reset((1010,))]
    assert (story.result.outcome, story.result.lost) == (Outcome.DONE, 1)


# ---- roll back


def test_roll_back_narrated() -> None:
    """At the deadline all returns: what was served there with its newest record, what was not as it was."""
    story = Story()
    replacement = story.to_moving(10, 11, 12)
    story.off(1)
    story.frozen(1, 10, 11)
    story.gathered(1)
    story.adopted(replacement, 10)
    story.handle(TimerFired("change"))
    story.expects(Phase.ROLLING_BACK)
    assert story.sent(1) == [messages.AcceptOn(moving=False)]
    assert kinds(story.sent(replacement)) == ["AcceptOff", "Freeze"]
    assert story.sent_one(replacement, messages.Freeze).cookie == (10, 11)
    assert events.SetTimer("change", 10.0) in story.effects
    story.lend(replacement, 20)
    story.off(replacement)
    assert story.sent_one(replacement, messages.Freeze).cookie == (20,)
    story.frozen(replacement, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).state == (b"10 by 2",)
    assert story.sent_one(1, messages.Thaw).flags == (0,)
    story.adopted(1, 10, epoch=2)
    story.adopted(replacement, 11)  # it crossed the freeze
    story.frozen(replacement, 11, epoch=1)
    assert story.sent_one(1, messages.Thaw).flags == (0,)
    story.adopted(1, 11, epoch=2)
    story.frozen(1, 12)  # the answer to the freeze of the move
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)
    story.adopted(1, 12)
    story.frozen(replacement, 20)
    assert story.sent_one(1, messages.Stage).cookie == (20,)
    story.adopted(1, 20)
    assert (story.result.outcome, story.result.moved, story.result.lost) == (Outcome.ROLLED_BACK, 0, 0)
    assert story.result.serving_generation == 1
    assert story.result.error == "the move did not end within 60 s"
    assert story.sent(1)[0] == messages.MoveOver()
    assert story.killed == {replacement}
    assert all(story.standing(cookie) == (1, Standing.SERVED) for cookie in (10, 11, 12, 20))


def test_a_roll_back_closes_what_came_by_an_added_listener() -> None:
    """The incumbent has no such listener: the replacement ends these in the orderly way, and they are counted."""
    story = Story()
    replacement = story.to_moving(10, move="rolling", added=frozenset({5}))
    story.lend(replacement, 20)
    story.lend(replacement, 21, 22, listener=5)
    story.handle(TimerFired("change"))
    assert story.sent_one(replacement, messages.Freeze).cookie == (20,)
    assert story.sent_one(replacement, messages.Push) == messages.Push(
        cookie=(21, 22), act=(messages.Act.CLOSE,) * 2, pushed=(b"", b"")
    )
    story.frozen(replacement, 20)
    story.adopted(1, 20)
    story.off(1)
    story.lend(replacement, 23, listener=5)  # it was on its way
    story.release(replacement, 21)
    story.off(replacement)
    assert (story.result.outcome, story.result.closed, story.result.lost) == (Outcome.ROLLED_BACK, 3, 0)
    assert story.result.ended == 0
    assert story.sent_one(replacement, messages.Push).cookie == (23,)
    assert story.sent_one(replacement, messages.Commit)  # it sends what is unsent, and goes when both have ended
    assert story.standing(22) == (replacement, Standing.SERVED)


def test_what_was_to_be_closed_and_is_lost_is_counted_lost() -> None:
    """Each connection once: the replacement was killed before it could end it."""
    story = Story()
    replacement = story.to_moving(10, move="rolling", added=frozenset({5}))
    story.lend(replacement, 21, listener=5)
    story.handle(TimerFired("change"))
    story.dies(replacement)
    assert (story.result.closed, story.result.lost) == (0, 1)


def test_a_parked_connection_of_an_added_listener_goes_to_no_incumbent() -> None:
    """Nobody serves it: the holder itself closes it."""
    story = Story()
    replacement = story.to_moving(10, move="rolling", added=frozenset({5}))
    story.lend(replacement, 21, listener=5)
    ledger = story.machine.ledger
    ledger.freeze([21])
    record = messages.record_columns([messages.Record()])
    ledger.frozen(replacement, messages.Frozen(batch=0, cookie=(21,), epoch=(0,), **record))
    story.handle(TimerFired("change"))
    assert story.of(events.Close) == [events.Close((1021,))]
    story.off(replacement)
    assert (story.result.closed, story.result.lost) == (1, 0)


def test_a_committed_listener_is_one_like_any_other() -> None:
    """Its connections move, and come back, once the incumbent has it too."""
    story = Story()
    replacement = story.to_moving(10, move="rolling", added=frozenset({5}))
    story.lend(replacement, 21, listener=5)
    story.off(1)
    story.release(1, 10)
    assert (story.result.outcome, story.result.closed) == (Outcome.DONE, 0)
    story.reload(move="rolling")
    story.all_ready()
    assert story.machine.ledger.entry(21).staged_in == max(story.machine.holdings.workers)


def test_rolling_back_freezes_nothing_more_of_the_incumbent() -> None:
    """What was waiting for its batch is where it belongs."""
    story = Story()
    story.lend(1, *range(1, 3 * ROLLING_BATCH + 1))
    story.reload(move="rolling")
    story.says(2, READY)
    story.staged(2)
    story.off(1)
    first, _ = (message for message in story.sent(1) if isinstance(message, messages.Freeze))
    story.handle(TimerFired("change"))
    story.frozen(1, *first.cookie, batch=first.batch)
    assert kinds(story.sent(1)) == ["Thaw", "Enter"]


def test_what_nobody_served_wakes_where_it_was() -> None:
    """Thawed in the replacement and not adopted: the incumbent's own coroutine goes on."""
    story = Story()
    replacement = story.to_thawed(10)
    story.handle(TimerFired("change"))
    story.frozen(replacement, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)


def test_a_replacement_that_dies_in_the_move_costs_what_it_served() -> None:
    """Its state died with it; all that it had been given and had not served goes back."""
    story = Story()
    replacement = story.to_thawed(10, 11, move="rolling")
    story.adopted(replacement, 10)
    story.dies(replacement, "worker 2 was killed by SIGKILL")
    assert story.of(events.Reset) == [events.Reset((1010,))]
    assert messages.Drop(cookie=(10,)) in story.sent(1)
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)
    story.adopted(1, 11, epoch=2)
    assert (story.result.outcome, story.result.lost) == (Outcome.ROLLED_BACK, 1)
    assert story.result.error == "worker 2 was killed by SIGKILL, while moving"


@pytest.mark.parametrize("sender", [1, 2])
def test_whoever_fails_in_the_move_turns_it_back(sender: int) -> None:
    """The incumbent's shared state cannot travel, or the replacement cannot take it: nothing is served there."""
    story = Story()
    story.to_thawed(10)
    story.says(sender, messages.Failed(reason="shared state", status=3))
    story.expects(Phase.ROLLING_BACK)
    story.frozen(2, 10, epoch=1)
    story.adopted(1, 10, epoch=2)
    story.off(2)
    assert (story.result.outcome, story.result.error) == (Outcome.ROLLED_BACK, "shared state")


def test_a_roll_back_that_is_too_slow_kills_the_replacement() -> None:
    """It is read to the end first: what it had sent still counts."""
    story = Story()
    replacement = story.to_thawed(10, 11, move="rolling")
    story.adopted(replacement, 10)
    story.handle(TimerFired("change"))
    story.handle(TimerFired("change"))
    assert story.killed == {replacement}
    story.frozen(replacement, 10, epoch=1)
    assert story.sent_one(1, messages.Thaw).cookie == (10,)
    story.dies(replacement)
    assert story.sent_one(1, messages.Thaw).cookie == (11,)
    story.adopted(1, 10, 11, epoch=2)
    assert (story.result.outcome, story.result.lost) == (Outcome.ROLLED_BACK, 0)


def test_what_the_replacement_cannot_freeze_stays_there() -> None:
    """Rolling back, a connection in the middle of a message is kept in the replacement, which retires."""
    story = Story()
    replacement = story.to_thawed(10, move="rolling")
    story.lend(replacement, 20)
    story.handle(TimerFired("change"))
    story.off(replacement)
    story.adopted(replacement, 10)
    story.refused(replacement, 10, epoch=1, reason=b"busy")
    assert story.sent_one(1, messages.Drop).cookie == (10,)
    story.frozen(replacement, 20)
    story.adopted(1, 20)
    assert (story.result.outcome, story.result.kept) == (Outcome.ROLLED_BACK, 1)
    assert kinds(story.sent(replacement)) == ["Commit"]
    assert story.killed == set()


# ---- the incumbent dies


def test_an_incumbent_that_dies_in_the_move_lets_what_it_froze_go_forward() -> None:
    """Frozen ones go on in the replacement, what it still served is lost, and the reload is done."""
    story = Story()
    replacement = story.to_moving(10, 11)
    story.off(1)
    story.frozen(1, 10)
    story.dies(1)
    assert story.of(events.Reset) == [events.Reset((1011,))]
    assert messages.Enter(cut=True) in story.sent(replacement)
    story.adopted(replacement, 10)
    assert (story.result.outcome, story.result.moved, story.result.lost) == (Outcome.DONE, 1, 1)


def test_an_incumbent_that_dies_in_the_roll_back_turns_it_forward() -> None:
    """Who lives serves: all that the replacement has, or gives back, stays with it."""
    story = Story()
    replacement = story.to_thawed(10, 11, move="rolling")
    story.adopted(replacement, 10)
    story.handle(TimerFired("change"))
    story.frozen(replacement, 10, epoch=1)
    story.dies(1)
    story.expects(Phase.MOVING)
    assert story.sent_one(replacement, messages.Thaw).cookie == (10,)
    assert messages.AcceptOn(moving=True) in story.sent(replacement)
    story.adopted(replacement, 10, epoch=3)
    story.adopted(replacement, 11)
    story.frozen(replacement, 11, epoch=1)
    story.adopted(replacement, 11, epoch=2)
    assert (story.result.outcome, story.result.lost, story.result.serving_generation) == (Outcome.DONE, 0, 2)


def test_both_dead_waits_for_a_fresh_worker() -> None:
    """Rolling back with nobody left, what is parked goes to a fresh worker of the incumbent; the rest is reset."""
    story = Story()
    replacement = story.to_thawed(10, 11, move="rolling")
    story.handle(TimerFired("change"))
    story.dies(1)
    story.handle(Died(replacement, "was killed", {11: None}))
    story.expects(Phase.SERVING)
    assert (story.result.lost, story.result.serving_generation) == (1, 1)
    assert [effect.generation for effect in story.of(events.Spawn)] == [1]
    assert story.standing(10)[1] is Standing.PARKED
    fresh = max(story.machine.holdings.workers)
    story.says(fresh, READY)
    assert story.sent_one(fresh, messages.Thaw).state == (b"10 by 1",)
    story.adopted(fresh, 10, epoch=2)
    assert story.standing(10) == (fresh, Standing.SERVED)


# ---- baking


def test_the_incumbent_stays_whole_while_the_replacement_bakes() -> None:
    """Nothing is committed or forgotten before the bake is over; then the incumbent retires."""
    story = Story()
    replacement = story.to_baking(10)
    assert story.sent(1) == []
    assert events.SetTimer("change", 30.0) in story.effects
    story.lend(replacement, 20)
    story.handle(TimerFired("change"))
    assert (story.result.outcome, story.result.moved) == (Outcome.DONE, 1)
    story.sent_one(1, messages.Commit)


@pytest.mark.parametrize(
    "problem", [events.CancelAsked("cancelled"), events.Checked("exited with 1"), Died(2, "was killed", {})]
)
def test_whatever_goes_wrong_in_the_bake_brings_all_back(problem: events.Event) -> None:
    """What the replacement served and accepted meanwhile returns with its newest record."""
    story = Story()
    replacement = story.to_baking(10)
    story.lend(replacement, 20)
    newest = {cookie: messages.Record(schema=1, state=b"%d by 2" % cookie) for cookie in (10, 20)}
    if isinstance(problem, Died):
        story.handle(attrs.evolve(problem, recovered=newest))
    else:
        story.handle(problem)
        assert story.sent_one(replacement, messages.Freeze).cookie == (10, 20)
        story.frozen(replacement, 10, epoch=1)
        assert story.sent_one(1, messages.Thaw).state == (b"10 by 2",)
        story.frozen(replacement, 20)
        story.off(replacement)
    assert set(story.machine.ledger.owned.elements()) == {1}
    story.adopted(1, 10, epoch=2)
    story.adopted(1, 20)
    assert (story.result.outcome, story.result.serving_generation, story.result.lost) == (Outcome.ROLLED_BACK, 1, 0)


def test_a_bake_without_one_success_of_its_health_command_is_rolled_back() -> None:
    """A command that hangs says nothing good; one success is enough."""
    story = Story()
    story.to_baking(10, needs_health=True)
    assert events.CheckHealth(is_on=True) in story.effects
    story.handle(TimerFired("change"))
    story.expects(Phase.ROLLING_BACK)
    assert story.machine.change is not None
    assert story.machine.change.reason == "the health command has not succeeded once within 30 s"

    story = Story()
    story.to_baking(10, needs_health=True)
    story.handle(events.Checked(None))
    story.handle(TimerFired("change"))
    assert story.result.outcome is Outcome.DONE
    assert events.CheckHealth(is_on=False) in story.effects


def test_without_an_incumbent_there_is_nothing_to_bake_for() -> None:
    """The last incumbent dies while it waits: the replacement commits at once."""
    story = Story()
    story.to_baking(10)
    story.dies(1)
    assert story.result.outcome is Outcome.DONE


def test_a_stop_ends_the_bake() -> None:
    """Who stops the server does not wait for a bake."""
    story = Story()
    story.to_baking(10)
    story.handle(StopAsked(5.0))
    assert story.result.outcome is Outcome.DONE
    story.expects(Phase.STOPPING)


def test_a_full_holder_that_bakes_accepts_again_once_there_is_room() -> None:
    """A bake may take long: the replacement does not wait for its end."""
    story = Story(capacity=2)
    replacement = story.to_baking(10)
    story.lend(replacement, 20)
    story.sent_one(replacement, messages.AcceptOff)
    story.off(replacement)
    story.release(replacement, 10, epoch=1)
    story.sent_one(replacement, messages.AcceptOn)


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.STAGING, Phase.MOVING])
def test_a_change_can_be_cancelled_in_every_phase(phase: Phase) -> None:
    """Before the move it is refused, in the move rolled back; the reason is the operator's."""
    story = in_phase(phase)
    story.handle(events.CancelAsked("cancelled by an operator"))
    if phase is Phase.MOVING:
        story.expects(Phase.ROLLING_BACK)
    else:
        assert (story.result.outcome, story.result.error) == (Outcome.REFUSED, "cancelled by an operator")


@pytest.mark.parametrize("is_one_way", [False, True])
def test_a_release_whose_states_the_incumbent_cannot_read_goes_one_way_only(is_one_way: bool) -> None:  # noqa: FBT001
    """A roll-back could not bring them back: refused before the move, unless somebody says that this is meant."""
    story = Story()
    story.lend(1, 10)
    story.reload(is_one_way=is_one_way)
    story.says(2, attrs.evolve(READY, writes=2, reads=[1, 2]))
    if is_one_way:
        story.expects(Phase.STAGING)
        return
    assert story.result.outcome is Outcome.REFUSED
    assert "writes states of schema 2, the incumbent reads 1" in str(story.result.error)


# ---- recovery


def test_what_a_killed_worker_left_at_a_boundary_goes_to_another() -> None:
    """Those that the kernel vouches for resume in another worker of the generation, the others are reset."""
    story = Story(workers=2)
    story.lend(1, 10, 11)
    story.handle(Died(1, "was killed", {10: messages.Record(schema=1, state=b"newest"), 11: None}))
    assert story.of(events.Reset) == [events.Reset((1011,))]
    assert kinds(story.sent(2)) == ["Stage", "Thaw", "Enter"]
    assert story.sent_one(2, messages.Thaw).state == (b"newest",)
    story.adopted(2, 10)
    assert kinds(story.sent(2)) == ["MoveOver"]
    assert story.standing(10) == (2, Standing.SERVED)
    assert story.machine.holdings.counters["recovered"] == 1


def test_a_record_that_nobody_has_touched_stands_where_there_is_no_slot() -> None:
    """A replacement that dies with a record that it never served gives it back, with or without slots."""
    story = Story()
    replacement = story.to_thawed(10, move="rolling")
    story.dies(replacement)
    assert story.sent_one(1, messages.Thaw).flags == (RecordFlag.UNSERVED,)


def test_a_record_that_was_served_is_not_used_again() -> None:
    """The worker died with its adoption unsent: the kernel says that somebody has served since."""
    story = Story()
    replacement = story.to_thawed(10, move="rolling")
    story.handle(Died(replacement, "was killed", {10: None}))
    assert story.of(events.Reset) == [events.Reset((1010,))]


def test_a_fresh_worker_that_cannot_read_what_was_left_costs_the_connection() -> None:
    """Another of its release could not either; the client is told."""
    story = Story()
    story.lend(1, 10)
    story.handle(Died(1, "was killed", {10: messages.Record(schema=1)}))
    fresh = max(story.machine.holdings.workers)
    story.says(fresh, READY)
    story.refused(fresh, 10, epoch=1)
    assert story.of(events.Reset) == [events.Reset((1010,))]


def test_the_next_worker_boots_while_what_is_left_is_looked_at() -> None:
    """It is started once the worker is reaped, and once only; what was left finds it in whatever order they come."""
    story = Story()
    story.lend(1, 10)
    story.handle(events.Reaped(1))
    assert [spawn.worker for spawn in story.of(events.Spawn)] == [2]
    story.handle(Died(1, "was killed", {10: messages.Record(schema=1, state=b"left")}))
    assert story.of(events.Spawn) == []
    story.says(2, READY)
    assert story.sent_one(2, messages.Thaw).state == (b"left",)
    assert story.machine.holdings.counters["restarts"] == 1


def test_what_retires_or_boots_is_not_followed_by_another_when_it_is_reaped() -> None:
    """The one is not needed any more; of the other its death tells, with the reason."""
    for phase in Phase:
        story = in_phase(phase)
        for worker in list(story.machine.holdings.workers.values()):
            if phase is not Phase.SERVING or worker.strength is not Strength.READY:
                story.handle(events.Reaped(worker.id))
                assert story.effects == []


def test_a_reload_waits_for_what_is_being_resumed_and_takes_along_what_is_parked() -> None:
    """Nothing is left behind in a worker that is about to hand over, and nothing waits for a release that is broken."""
    story = Story()
    story.lend(1, 10)
    story.handle(Died(1, "was killed", {10: messages.Record(schema=1)}))
    story.says(2, READY)
    story.reload()
    story.says(3, READY)
    story.expects(Phase.BOOTING)
    story.adopted(2, 10)
    story.expects(Phase.STAGING)

    story = Story()
    story.lend(1, 10)
    story.handle(Died(1, "was killed", {10: messages.Record(schema=1, state=b"left")}))
    story.reload()
    story.says(3, READY)
    story.staged(3)
    assert story.sent_one(3, messages.Thaw).state == (b"left",)
    assert story.sent_one(3, messages.Enter).cut
    story.adopted(3, 10)
    assert (story.result.outcome, story.result.lost) == (Outcome.DONE, 0)


# ---- one change at a time


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.STAGING, Phase.MOVING, Phase.ROLLING_BACK, Phase.STOPPING])
def test_another_reload_is_busy(phase: Phase) -> None:
    """The second is told so at once; the first is not disturbed."""
    story = in_phase(phase)
    before = picture(story.machine)
    story.reload(asker=8)
    (finished,) = story.of(events.Finished)
    assert (finished.asker, finished.result.outcome) == (8, Outcome.BUSY)
    assert phase.value in (finished.result.error or "")
    assert picture(story.machine) == before


def test_a_signal_meanwhile_is_remembered_once() -> None:
    """Two SIGHUPs during a reload are one more reload after it, whatever its outcome."""
    story = in_phase(Phase.BOOTING)
    for _ in range(2):
        story.reload(asker=0, is_remembered=True)
        assert story.of(events.Finished) == []
    story.dies(2)
    assert story.of(events.AskAgain) == [events.AskAgain()]
    story.reload()
    story.all_ready()
    story.handle(TimerFired("change"))
    assert story.of(events.AskAgain) == []


# ---- workers die while serving


def test_a_worker_that_dies_is_started_again_ever_more_slowly() -> None:
    """At once the first time, then with a back-off that doubles up to its limit; its connections are lost."""
    story = Story()
    story.lend(1, 10)
    story.dies(1)
    assert story.of(events.Reset) == [events.Reset((1010,))]
    delays = []
    for _ in range(12):
        (spawn,) = story.of(events.Spawn)
        assert spawn.generation == 1
        delays.append(spawn.after_s)
        story.dies(spawn.worker)
    assert delays[0] == 0.0
    assert all(before <= after for before, after in itertools.pairwise(delays))
    assert delays[-1] == MAX_BACKOFF_S


def test_a_worker_that_stays_is_forgiven() -> None:
    """Ten seconds of health, and the next restart is immediate again."""
    story = Story()
    for _ in range(3):
        story.dies(max(story.machine.holdings.workers))
    assert story.of(events.Spawn)[0].after_s > 0
    worker = story.of(events.Spawn)[0].worker
    story.says(worker, READY)
    assert story.sent(worker) == [messages.AcceptOn(moving=False)]
    story.handle(TimerFired("healthy"))
    story.dies(worker)
    assert story.of(events.Spawn)[0].after_s == 0.0


def test_a_restart_that_is_later_than_the_replacement_gives_way() -> None:
    """A worker that is still booting when staging begins is of no use any more: it is killed."""
    story = Story()
    story.dies(1)
    (spawn,) = story.of(events.Spawn)
    story.reload()
    (replacement,) = [effect.worker for effect in story.of(events.Spawn)]
    assert story.killed == set()
    story.says(replacement, READY)
    assert spawn.worker in story.killed
    story.dies(spawn.worker)
    story.expects(Phase.SERVING)
    assert story.machine.holdings.generation == 2


def test_a_worker_that_dies_while_the_replacement_boots_is_restored_at_once() -> None:
    """However long a release takes to boot, the incumbent serves at its full strength; the restart moves, too."""
    story = Story(workers=2)
    story.reload(workers=1)
    (replacement,) = [effect.worker for effect in story.of(events.Spawn)]
    story.dies(2)
    (spawn,) = story.of(events.Spawn)
    assert spawn.generation == 1
    story.says(spawn.worker, READY)
    assert kinds(story.sent(spawn.worker)) == ["AcceptOn"]
    story.lend(spawn.worker, 10)
    story.says(replacement, READY)
    assert story.sent_one(replacement, messages.Stage).cookie == (10,)


def test_a_worker_that_says_it_failed_is_noted() -> None:
    """While serving, its death will tell the rest."""
    story = Story()
    story.says(1, messages.Failed(reason="oh", status=1))
    assert [note.event for note in story.of(events.Note)] == ["failed"]
    assert story.killed == set()


# ---- retiring


def reload_keeping(story: Story, incumbent: int, cookie: int, **wishes: Any) -> int:
    """Reload while *cookie* cannot move; return the replacement."""
    story.lend(incumbent, cookie)
    story.reload(**wishes)
    story.all_ready()
    replacement = max(story.machine.holdings.workers)
    story.staged(replacement)
    story.off(incumbent)
    story.gathered(incumbent)
    story.refused(incumbent, cookie, epoch=0)
    return replacement


def test_the_oldest_of_too_many_retiring_generations_is_expired() -> None:
    """With max_retiring 2, the third reload ends what the first generation still had, at once."""
    story = Story()
    second = reload_keeping(story, 1, 10)
    third = reload_keeping(story, second, 20)
    assert messages.Commit(drain_ms=0) not in story.sent(1)
    reload_keeping(story, third, 30)
    assert story.sent(1) == [messages.Commit(drain_ms=0)]
    assert story.sent(second) == []
    message = messages.Release(cookie=(10,), epoch=(0,), how=(messages.How.EXPIRED,))
    story.says(1, message)
    assert story.machine.holdings.counters["expired"] == 1


def test_a_retiring_worker_that_does_not_go_is_killed() -> None:
    """It closes what is left at the drain limit by itself; one that does not is killed five seconds later."""
    story = Story()
    reload_keeping(story, 1, 10, drain_s=30.0)
    assert events.SetTimer("retire 1", 35.0) in story.effects
    assert story.sent(1) == [messages.Commit(drain_ms=30_000)]
    story.handle(TimerFired("retire 1"))
    assert story.killed == {1}
    story.dies(1)
    assert story.of(events.Spawn) == []
    assert events.SetTimer("retire 1", None) in story.effects
    assert story.machine.holdings.counters["lost"] == 1


def test_the_timer_of_a_worker_that_went_does_nothing() -> None:
    """It may have fired already when its worker was buried."""
    story = Story()
    assert story.handle(TimerFired("retire 99")) == []


# ---- lends


def test_lends_are_acknowledged_many_at_a_time() -> None:
    """A count covers all before it, so that short connections, a few at a time, are not answered one by one."""
    story = Story()
    story.lend(1, *range(1, ACKED_TOGETHER))
    assert story.sent(1) == []
    story.lend(1, ACKED_TOGETHER, ACKED_TOGETHER + 1)
    assert story.sent(1) == [messages.LendAck(total=ACKED_TOGETHER + 1)]
    story.lend(1, *range(ACKED_TOGETHER + 2, 2 * ACKED_TOGETHER))
    assert story.sent(1) == []


# ---- capacity


def test_a_full_holder_lets_clients_wait_in_the_backlog() -> None:
    """At its capacity it turns accepting off, and on again once there is room for a while."""
    story = Story(capacity=2)
    story.lend(1, 10)
    assert story.sent(1) == []
    story.lend(1, 11)
    assert story.sent(1) == [messages.AcceptOff(number=1, moving=False)]
    story.lend(1, 12)  # accepted before it heard of that
    assert story.sent(1) == []
    story.off(1)
    story.release(1, 12)
    assert story.sent(1) == []
    story.release(1, 11)
    assert story.sent(1) == [messages.AcceptOn(moving=False)]


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.REFUSED, Outcome.ROLLED_BACK])
def test_room_that_comes_during_a_change_is_used_after_it(outcome: Outcome) -> None:
    """Whoever serves then accepts."""
    story = Story(capacity=2)
    replacement = story.to_staging(10, 11, move="rolling")
    story.off(1)  # the holder was full
    if outcome is Outcome.REFUSED:
        story.release(1, 11)
        story.handle(TimerFired("change"))
        assert messages.AcceptOn(moving=False) in story.sent(1)
        return
    story.staged(replacement)
    assert messages.AcceptOn(moving=True) not in story.sent(replacement)
    story.off(1)
    story.release(1, 11)
    if outcome is Outcome.ROLLED_BACK:
        story.handle(TimerFired("change"))
        seen = story.sent(1)
        story.off(replacement)
        story.frozen(1, 10)
        story.adopted(1, 10)
        assert messages.AcceptOn(moving=False) in seen + story.sent(1)
        return
    story.frozen(1, 10)
    story.adopted(replacement, 10)
    assert story.result.outcome is Outcome.DONE
    assert messages.AcceptOn(moving=False) in story.sent(replacement)


def test_the_ack_of_an_earlier_accept_off_does_not_count_for_the_move() -> None:
    """Full, room again, a reload: lends may still come until the last accept_off is acknowledged."""
    story = Story(capacity=2)
    story.lend(1, 10, 11)
    story.release(1, 11)
    story.reload(move="rolling")
    story.says(2, READY)
    story.staged(2)
    story.expects(Phase.MOVING)
    story.says(1, messages.AcceptOffAck(number=1))
    assert story.sent(1) == []
    story.says(1, messages.AcceptOffAck(number=2))
    assert story.sent_one(1, messages.Freeze).cookie == (10,)
    for number in (2, 3):
        with pytest.raises(IllegalEvent, match=f"acknowledged accept_off {number}, it was sent 2"):
            story.says(1, messages.AcceptOffAck(number=number))


def test_an_accept_off_that_was_never_understood_does_not_hold_up_the_next() -> None:
    """Its acknowledgement never comes; that of the next change's counts for both."""
    story = Story()
    replacement = story.to_moving(10, move="rolling")
    story.says(1, messages.Failed(reason="a worker could not follow the holder", status=3))
    story.off(replacement)
    story.reload(move="rolling")
    story.says(3, READY)
    story.staged(3)
    story.says(1, messages.AcceptOffAck(number=2))
    assert story.sent_one(1, messages.Freeze).cookie == (10,)


# ---- quotas of a worker


def with_quotas(connections: int | None = None, record_bytes: int = 1 << 30) -> Story:
    story = Story()
    story.reload(quotas=events.Quotas(connections, record_bytes))
    story.all_ready()
    story.staged(2)
    story.off(1)
    story.gathered(1)
    story.dies(1, "exited with 0")
    return story


def test_a_worker_at_its_quota_stops_accepting_and_begins_again() -> None:
    """What it had accepted by then is taken; one connection less than the quota is not enough room, 5 % are."""
    story = with_quotas(connections=20)
    story.lend(2, *range(20))
    assert story.sent(2) == [messages.AcceptOff(number=1, moving=False)]
    assert story.machine.holdings.workers[2].is_full
    story.lend(2, 20)
    assert story.sent(2) == []
    story.off(2)
    for cookie in range(18, 21):
        assert "AcceptOn" not in kinds(story.sent(2))
        story.release(2, cookie)
    assert kinds(story.sent(2)) == ["AcceptOn"]
    assert not story.machine.holdings.workers[2].is_full


def test_a_worker_that_lends_after_its_word_breaks_the_protocol() -> None:
    """It said that it accepts no more: what it lends then is not believed, nor kept."""
    story = with_quotas(connections=1)
    story.lend(2, 10)
    story.off(2)
    with pytest.raises(IllegalEvent, match="worker 2 lent 1 connections and is told to accept none"):
        story.lend(2, 11)
    assert set(story.machine.ledger) == {10}


def test_a_replacement_that_is_given_its_quota_does_not_accept() -> None:
    """What moves to it counts; as soon as there is room, it accepts."""
    story = with_quotas(connections=2)
    story.lend(2, 10, 11)
    story.off(2)
    story.reload(quotas=events.Quotas(2))
    story.all_ready()
    story.staged(3)
    story.off(2)
    story.frozen(2, 10, 11)
    story.gathered(2)
    assert kinds(story.sent(3)) == ["Enter", "AcceptOff"]
    story.adopted(3, 10, 11)
    assert story.result.outcome is Outcome.DONE
    assert "AcceptOn" not in kinds(story.sent(3))
    story.off(3)
    story.release(3, 10, epoch=1)
    assert kinds(story.sent(3)) == ["AcceptOn"]


def test_an_incumbent_whose_connections_have_gone_accepts_after_a_roll_back() -> None:
    """It was full, and they ended during the change: the end of the change lets it accept."""
    story = with_quotas(connections=1)
    story.lend(2, 10)
    story.off(2)
    story.reload(quotas=events.Quotas(1))
    story.release(2, 10)
    story.handle(TimerFired("change"))
    assert story.result.outcome is Outcome.REFUSED
    assert "AcceptOn" in kinds(story.sent(2))


def test_records_over_the_quota_roll_the_move_back() -> None:
    """The quota is that of the reload that was asked for, over all records of one worker."""
    story = Story()
    story.to_moving(10, 11, quotas=events.Quotas(record_bytes=10))
    story.off(1)
    story.frozen(1, 10)
    story.expects(Phase.MOVING)
    story.frozen(1, 11)
    story.expects(Phase.ROLLING_BACK)
    assert story.machine.change is not None
    assert story.machine.change.reason == (
        "worker 1 gave records of 14 bytes, over its quota of 10: raise worker_record_bytes, or let unsent_bytes and "
        "the states be smaller"
    )


# ---- stop


def test_stop_while_serving() -> None:
    """Every worker is told to end at its boundaries; when the last has gone the holder may go."""
    story = Story(workers=2)
    story.handle(StopAsked(4.0))
    story.expects(Phase.STOPPING)
    assert story.sent(1) == story.sent(2) == [messages.Stop(drain_ms=4000)]
    assert events.SetTimer("stop", 9.0) in story.effects
    story.dies(1)
    assert story.of(events.Spawn) == []
    story.dies(2)
    story.expects(Phase.STOPPED)


@pytest.mark.parametrize("event", [TimerFired("stop"), StopAsked(0.0)])
def test_stop_too_slow_or_asked_twice_kills(event: events.Event) -> None:
    """At the limit, or at the second request, nobody is waited for."""
    story = in_phase(Phase.STOPPING)
    story.handle(event)
    assert story.killed == {1}


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.STAGING])
def test_stop_before_the_move_refuses_it(phase: Phase) -> None:
    """The replacement goes at once, the incumbent at its boundaries."""
    story = in_phase(phase)
    story.handle(StopAsked(4.0))
    assert story.result.outcome is Outcome.REFUSED
    assert story.result.error == "the holder was told to stop"
    story.expects(Phase.STOPPING)
    assert story.sent(1) == [messages.Stop(drain_ms=4000)]
    assert 2 in story.killed


def test_stop_in_the_move_waits_for_its_end() -> None:
    """A connection in passage is not dropped: the change ends first, then all stop."""
    story = Story()
    replacement = story.to_thawed(10)
    assert story.handle(StopAsked(4.0)) == []
    story.gathered(1)
    story.adopted(replacement, 10)
    assert story.result.outcome is Outcome.DONE
    story.expects(Phase.STOPPING)
    assert story.sent(replacement)[-1] == messages.Stop(drain_ms=4000)
    assert story.of(events.Spawn) == []


def test_stop_in_the_roll_back_waits_for_its_end() -> None:
    """The same, backwards."""
    story = Story()
    replacement = story.to_thawed(10)
    story.handle(TimerFired("change"))
    story.handle(StopAsked(4.0))
    story.off(replacement)
    story.frozen(replacement, 10, epoch=1)
    story.adopted(1, 10, epoch=2)
    story.expects(Phase.STOPPING)
    assert story.sent(1)[-1] == messages.Stop(drain_ms=4000)


def test_stop_kills_a_restart_under_way() -> None:
    """A worker that is still booting has nothing to end."""
    story = Story()
    story.dies(1)
    (spawn,) = story.of(events.Spawn)
    story.handle(StopAsked(4.0))
    assert story.killed == {spawn.worker}
    story.dies(spawn.worker)
    story.expects(Phase.STOPPED)
