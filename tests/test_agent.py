"""The worker's half of the protocol: what each message and each local event means for its connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from copyover import messages
from copyover.errors import IllegalEvent
from copyover.messages import Kind, Record, RecordFlag
from copyover.worker import effects
from copyover.worker.agent import Agent, Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

E = TypeVar("E")


def serving(*cookies: int) -> Agent:
    agent = Agent()
    agent.accepted(cookies, 0, Kind.HANDLER)
    return agent


def staged(*cookies: int) -> Agent:
    agent = Agent()
    agent.handle(messages.Stage(cookie=cookies, listener=(0,) * len(cookies)))
    return agent


def thawed(*cookies: int, flags: int = 0, epoch: int = 1, kind: int = 0) -> Agent:
    agent = staged(*cookies)
    agent.handle(thaw(*cookies, flags=flags, epoch=epoch, kind=kind))
    return agent


def freeze(*cookies: int, batch: int = 1, gather_ms: int = 0, more: bool = False, epoch: int = 0) -> messages.Freeze:
    epochs = (epoch,) * len(cookies)
    return messages.Freeze(batch=batch, more=more, gather_ms=gather_ms, wait_ms=5000, cookie=cookies, epoch=epochs)


def thaw(*cookies: int, flags: int = 0, epoch: int = 1, halted_ns: int = 0, kind: int = 0) -> messages.Thaw:
    records = [Record(kind=kind, flags=flags, halted_ns=halted_ns, state=b"x")] * len(cookies)
    return messages.Thaw(cookie=cookies, epoch=(epoch,) * len(cookies), **messages.record_columns(records))


def records_of(*cookies: int) -> dict[int, Record]:
    return {cookie: Record(state=b"%d" % cookie) for cookie in cookies}


def sent(found: Sequence[effects.Effect]) -> list[messages.Message]:
    return [effect.message for effect in found if isinstance(effect, effects.Send)]


def one(found: Sequence[object], kind: type[E]) -> E:
    (effect,) = [effect for effect in found if isinstance(effect, kind)]
    return effect


def none(found: Sequence[object], kind: type[object]) -> bool:
    return not [effect for effect in found if isinstance(effect, kind)]


def standings(agent: Agent) -> dict[int, Standing]:
    return {cookie: seat.standing for cookie, seat in agent.seats.items()}


class Answers:
    """Counts what the holder was told of each connection: exactly one answer for each freeze."""

    def __init__(self) -> None:
        self.of: dict[int, list[str]] = {}
        self.batches: list[int] = []

    def take(self, found: list[effects.Effect]) -> list[effects.Effect]:
        for message in sent(found):
            if isinstance(message, messages.Frozen) and message.batch:
                self.batches.append(message.batch)
            if isinstance(message, (messages.Frozen, messages.Refused, messages.Release)):
                for cookie in message.cookie:
                    self.of.setdefault(cookie, []).append(type(message).__name__)
        return found


# ---- accepting


def test_what_is_accepted_is_lent_before_anything_else() -> None:
    """The lend is the first effect; the descriptors go with it, at most as many as one message carries."""
    agent = Agent()
    cookies = list(range(300))
    found = agent.accepted(cookies, 2, Kind.HTTP)
    assert [effect.cookies for effect in found if isinstance(effect, effects.Send)] == [
        tuple(cookies[: messages.MAX_DESCRIPTORS]),
        tuple(cookies[messages.MAX_DESCRIPTORS :]),
    ]
    assert all(isinstance(message, messages.Lend) and set(message.listener) == {2} for message in sent(found))
    assert list(agent.unacked) == cookies
    assert set(standings(agent).values()) == {Standing.SERVING}


def test_lends_are_remembered_until_acknowledged() -> None:
    """A new holder is lent again exactly what the old one had not acknowledged."""
    agent = serving(1, 2, 3)
    assert agent.handle(messages.LendAck(total=2)) == []
    assert list(agent.unacked) == [3]
    agent.handle(messages.LendAck(total=3))
    agent.accepted([4], 0, Kind.HANDLER)
    agent.handle(messages.LendAck(total=4))
    assert not agent.unacked


def test_the_holder_is_told_once_what_a_connection_became() -> None:
    """Of what is served, also while it is asked to stop; not what it is already, and not what its record tells."""
    agent = serving(1, 2, 3)
    agent.handle(freeze(2))
    found = agent.became({1: Kind.HTTP, 2: Kind.WEBSOCKET, 3: Kind.HANDLER, 9: Kind.HTTP})
    assert sent(found) == [messages.Became(cookie=(1, 2), epoch=(0, 0), kind=(Kind.HTTP, Kind.WEBSOCKET))]
    assert agent.became({1: Kind.HTTP}) == []
    assert none(staged(1).became({1: Kind.HTTP}), effects.Send)


def test_a_new_holder_hears_the_kind_of_what_is_served() -> None:
    """Of what was accepted, of what came with a record, and of what became something else."""
    agent = thawed(1, kind=Kind.STREAM)
    agent.handle(messages.Enter(cut=False))
    agent.accepted([2, 3], 0, Kind.HTTP)
    agent.became({3: Kind.WEBSOCKET})
    view = one(sent(agent.recalled({}, dict.fromkeys((1, 2, 3), 0))), messages.View)
    assert view.kind == (Kind.STREAM, Kind.HTTP, Kind.WEBSOCKET)


def test_what_comes_back_unserved_is_what_it_was() -> None:
    """The record of such a thaw is empty: the seat knows the kind."""
    agent = Agent()
    agent.accepted([1], 0, Kind.WEBSOCKET)
    agent.handle(freeze(1))
    agent.halted(1, [1])
    agent.exported(effects.Export(1, (1,), is_cut=False), {1: Record(kind=Kind.WEBSOCKET)}, {})
    agent.handle(thaw(1, flags=RecordFlag.UNSERVED))
    assert agent.seats[1].kind is Kind.WEBSOCKET


def test_an_unknown_kind_is_not_thawed() -> None:
    """The whole batch is refused: nothing of it is believed."""
    agent = staged(1)
    with pytest.raises(IllegalEvent, match="as 4, which is no kind"):
        agent.handle(thaw(1, kind=4))
    assert standings(agent) == {1: Standing.STAGED}


@pytest.mark.parametrize("total", [0, 4])
def test_an_ack_of_what_was_not_lent_is_illegal(total: int) -> None:
    """Neither backwards nor beyond; nothing is forgotten."""
    agent = serving(1, 2, 3)
    agent.handle(messages.LendAck(total=1))
    with pytest.raises(IllegalEvent, match="lends acknowledged"):
        agent.handle(messages.LendAck(total=total))
    assert list(agent.unacked) == [2, 3]


def test_accept_off_is_acknowledged_behind_all_lends() -> None:
    """Accepting ends first, then the ack is sent: no lend can follow it."""
    agent = Agent()
    assert agent.handle(messages.AcceptOn(moving=False)) == [effects.Accept(is_on=True)]
    off = [effects.Accept(is_on=False), effects.Send(messages.AcceptOffAck(number=3))]
    assert agent.handle(messages.AcceptOff(number=3, moving=False)) == off
    assert agent.handle(messages.AcceptOff(number=3, moving=True)) == [effects.MoveBegins(), *off]


def test_endings_are_told_with_their_epoch() -> None:
    """Each ending once, with how it ended; what is no seat is no ending."""
    agent = serving(1, 2)
    found = agent.ended({1: messages.How.RESET, 99: messages.How.CLOSED})
    assert sent(found) == [messages.Release(cookie=(1,), epoch=(0,), how=(messages.How.RESET,))]
    assert sent(agent.ended({1: messages.How.CLOSED})) == []


# ---- staging


def test_what_is_staged_is_built_and_counted() -> None:
    """The count is of all so far, so that the holder knows when the last is built."""
    agent = Agent()
    found = agent.handle(messages.Stage(cookie=(1, 2), listener=(0, 1)))
    build = effects.Build((1, 2), (0, 1))
    assert found == [effects.MoveBegins(), build, effects.Send(messages.Staged(total=2))]
    found = agent.handle(messages.Stage(cookie=(3,), listener=(0,)))
    assert found == [effects.Build((3,), (0,)), effects.Send(messages.Staged(total=3))]
    assert set(standings(agent).values()) == {Standing.STAGED}


def test_what_is_here_cannot_be_staged() -> None:
    """Two copies of one connection in one worker would be two owners."""
    with pytest.raises(IllegalEvent, match="staged where it is serving"):
        serving(1).handle(messages.Stage(cookie=(1,), listener=(0,)))


def test_drop_closes_copies_only() -> None:
    """Staged and frozen ones are discarded, unknown ones have gone already, and a served one is never dropped."""
    agent = staged(1, 2)
    assert agent.handle(messages.Drop(cookie=(1, 99))) == [effects.Discard((1,))]
    assert agent.handle(messages.Drop(cookie=(1,))) == []
    with pytest.raises(IllegalEvent, match="dropped where it is serving"):
        serving(1).handle(messages.Drop(cookie=(1,)))
    with pytest.raises(IllegalEvent, match="dropped where it is thawed"):
        thawed(1).handle(messages.Drop(cookie=(1,)))


# ---- freezing, one by one


def test_a_freeze_asks_all_to_halt() -> None:
    """Those that stand at a boundary answer at once, as one batch; the others when they come to one."""
    agent, answers = serving(1, 2), Answers()
    found = agent.handle(freeze(1, 2, batch=3))
    assert one(found, effects.Halt) == effects.Halt(3, (1, 2))
    assert one(found, effects.SetTimer) == effects.SetTimer("wait 3", 5.0)
    assert set(standings(agent).values()) == {Standing.FREEZING}
    export = one(answers.take(agent.halted(3, [1])), effects.Export)
    assert export == effects.Export(3, (1,), is_cut=False)
    answers.take(agent.exported(export, records_of(1), {}))
    export = one(agent.halted(0, [2]), effects.Export)
    assert export == effects.Export(0, (2,), is_cut=False)
    answers.take(agent.exported(export, records_of(2), {}))
    assert answers.of == {1: ["Frozen"], 2: ["Frozen"]}
    assert answers.batches == [3]
    assert set(standings(agent).values()) == {Standing.FROZEN}


def test_a_batch_of_which_none_can_stop_is_answered_too() -> None:
    """The holder counts first answers: a busy batch must not hold up the next."""
    agent = serving(1)
    agent.handle(freeze(1, batch=3))
    export = one(agent.halted(3, []), effects.Export)
    assert sent(agent.exported(export, {}, {})) == [messages.Frozen(batch=3)]


def test_what_cannot_be_exported_is_refused_and_goes_on() -> None:
    """A state that does not serialise keeps its connection here, with the reason."""
    agent, answers = serving(1, 2), Answers()
    agent.handle(freeze(1, 2, batch=3))
    export = one(agent.halted(3, [1, 2]), effects.Export)
    found = answers.take(agent.exported(export, records_of(2), {1: "state['x'] is a set"}))
    assert [message for message in sent(found) if isinstance(message, messages.Refused)] == [
        messages.Refused(cookie=(1,), epoch=(0,), reason=(b"state['x'] is a set",))
    ]
    assert standings(agent) == {1: Standing.SERVING, 2: Standing.FROZEN}
    assert answers.of == {1: ["Refused"], 2: ["Frozen"]}


def test_a_freeze_that_crosses_a_release_is_answered_by_it() -> None:
    """The release is on its way: nothing more is said of the connection, the batch is answered empty."""
    agent, answers = serving(1), Answers()
    answers.take(agent.ended({1: messages.How.CLOSED}))
    found = answers.take(agent.handle(freeze(1, batch=3)))
    assert one(found, effects.Halt).cookies == ()
    assert none(found, effects.SetTimer)
    export = one(agent.halted(3, []), effects.Export)
    answers.take(agent.exported(export, {}, {}))
    assert answers.of == {1: ["Release"]}
    assert answers.batches == [3]


def test_an_ending_while_freezing_is_the_answer() -> None:
    """Its timer finds nothing to refuse."""
    agent, answers = serving(1), Answers()
    agent.handle(freeze(1, batch=3))
    agent.halted(3, [])
    answers.take(agent.ended({1: messages.How.RESET}))
    assert agent.timer("wait 3") == []
    assert answers.of == {1: ["Release"]}


def test_what_never_reaches_a_boundary_is_withdrawn() -> None:
    """After the wait it is refused, and goes on here; what has stopped meanwhile is none of the timer's business."""
    agent, answers = serving(1, 2), Answers()
    agent.handle(freeze(1, 2, batch=3))
    export = one(agent.halted(3, [1]), effects.Export)
    answers.take(agent.exported(export, records_of(1), {}))
    assert agent.timer("wait 3") == [effects.Withdraw((2,))]
    answers.take(agent.withdrawn({2: "in the middle of a message"}))
    assert answers.of == {1: ["Frozen"], 2: ["Refused"]}
    assert standings(agent) == {1: Standing.FROZEN, 2: Standing.SERVING}
    assert agent.timer("wait 3") == []


def test_the_timer_of_an_earlier_freeze_refuses_nothing_of_a_later_one() -> None:
    """A connection that was asked anew has its whole time again."""
    agent = serving(1)
    agent.handle(freeze(1, batch=3))
    agent.withdrawn({1: "busy"})
    agent.handle(freeze(1, batch=4))
    assert agent.timer("wait 3") == []
    assert agent.timer("wait 4") == [effects.Withdraw((1,))]


def test_a_freeze_of_a_later_epoch_than_ours_is_served_an_earlier_one_is_void() -> None:
    """A freeze of the past speaks of somebody else's time with the connection."""
    agent = thawed(1, epoch=3)
    agent.handle(messages.Enter(cut=False))
    found = agent.handle(freeze(1, batch=5, epoch=2))
    assert one(found, effects.Halt).cookies == ()
    assert standings(agent) == {1: Standing.SERVING}
    assert one(agent.handle(freeze(1, batch=6, epoch=3)), effects.Halt).cookies == (1,)


@pytest.mark.parametrize("agent", [staged(1), serving(1)])
def test_what_does_not_run_cannot_be_frozen(agent: Agent) -> None:
    """A copy, or one that is being frozen already: the holder has lost count."""
    if standings(agent) == {1: Standing.SERVING}:
        agent.handle(freeze(1, batch=1))
    with pytest.raises(IllegalEvent, match="to be frozen where it is"):
        agent.handle(freeze(1, batch=2))


# ---- a cut


def test_a_cut_is_exported_when_the_last_has_stopped() -> None:
    """All records of one moment and the shared state with them; then gathered, behind all of them."""
    agent, answers = serving(1, 2, 3), Answers()
    found = agent.handle(freeze(1, 2, 3, batch=1, gather_ms=700))
    assert effects.SetTimer("gather 1", 0.7) in found
    found = answers.take(agent.halted(1, [1, 2]))
    assert none(found, effects.Export)
    assert sent(found) == [messages.Frozen(batch=1)]
    assert standings(agent)[1] is Standing.HALTED
    export = one(agent.halted(0, [3]), effects.Export)
    assert export == effects.Export(0, (1, 2, 3), is_cut=True)
    found = answers.take(agent.exported(export, records_of(1, 2, 3), {}, b"shared"))
    assert sent(found)[-1] == messages.Gathered(shared=(b"shared",))
    assert answers.of == {1: ["Frozen"], 2: ["Frozen"], 3: ["Frozen"]}


def test_an_empty_cut_is_gathered_at_once() -> None:
    """A worker without connections holds up nobody; it still exports its shared state."""
    agent = Agent()
    agent.handle(freeze(batch=1, gather_ms=700))
    export = one(agent.halted(1, []), effects.Export)
    assert export == effects.Export(0, (), is_cut=True)
    assert sent(agent.exported(export, {}, {}, None)) == [messages.Gathered(shared=())]


def test_the_gather_timer_closes_the_cut_without_the_stragglers() -> None:
    """They follow alone when they can."""
    agent, answers = serving(1, 2), Answers()
    agent.handle(freeze(1, 2, batch=1, gather_ms=700))
    answers.take(agent.halted(1, [1]))
    export = one(agent.timer("gather 1"), effects.Export)
    assert export == effects.Export(0, (1,), is_cut=True)
    answers.take(agent.exported(export, records_of(1), {}, None))
    export = one(agent.halted(0, [2]), effects.Export)
    assert export == effects.Export(0, (2,), is_cut=False)
    found = answers.take(agent.exported(export, records_of(2), {}))
    assert not [message for message in sent(found) if isinstance(message, messages.Gathered)]
    assert answers.of == {1: ["Frozen"], 2: ["Frozen"]}


def test_a_gather_timer_whose_cut_is_closed_does_nothing() -> None:
    """Nor does that of an earlier cut close a later one."""
    agent = serving(1)
    agent.handle(freeze(1, batch=1, gather_ms=700))
    agent.exported(one(agent.halted(1, [1]), effects.Export), records_of(1), {}, None)
    assert agent.timer("gather 1") == []
    agent.accepted([2], 0, Kind.HANDLER)
    agent.handle(freeze(2, batch=2, gather_ms=700))
    agent.halted(2, [])
    assert agent.timer("gather 1") == []
    assert agent.timer("gather 2") == [effects.Export(0, (), is_cut=True)]


def test_a_cut_of_several_packets_waits_for_the_last() -> None:
    """However fast the first ones stop, and whatever the timer says."""
    agent = serving(1, 2)
    agent.handle(freeze(1, batch=1, gather_ms=700, more=True))
    found = agent.halted(1, [1])
    assert none(found, effects.Export)
    again = one(agent.timer("gather 1"), effects.SetTimer)
    assert again.name == "gather 1"
    agent.handle(freeze(2, batch=2, gather_ms=700, more=False))
    export = one(agent.halted(2, [2]), effects.Export)
    assert export == effects.Export(0, (1, 2), is_cut=True)


@pytest.mark.parametrize("leaves", ["ends", "is withdrawn"])
def test_a_cut_does_not_wait_for_what_has_left_it(leaves: str) -> None:
    """One that ended or was refused can never stop: the others go without it, at once and once only."""
    agent, answers = serving(1, 2), Answers()
    agent.handle(freeze(1, 2, batch=1, gather_ms=9000))
    answers.take(agent.halted(1, [1]))
    if leaves == "ends":
        found = answers.take(agent.ended({2: messages.How.CLOSED}))
    else:
        assert agent.timer("wait 1") == [effects.Withdraw((2,))]
        found = answers.take(agent.withdrawn({2: "busy"}))
    export = one(found, effects.Export)
    assert export == effects.Export(0, (1,), is_cut=True)
    answers.take(agent.exported(export, records_of(1), {}, None))
    assert agent.timer("gather 1") == []
    assert answers.of == {1: ["Frozen"], 2: ["Release" if leaves == "ends" else "Refused"]}


def test_a_halted_connection_may_still_end() -> None:
    """Pushed over its limit while it waits for the cut, say: the release is its answer."""
    agent, answers = serving(1, 2), Answers()
    agent.handle(freeze(1, 2, batch=1, gather_ms=700))
    agent.halted(1, [1])
    answers.take(agent.ended({1: messages.How.ABORTED}))
    export = one(agent.halted(0, [2]), effects.Export)
    assert export.cookies == (2,)
    assert answers.of == {1: ["Release"]}


# ---- thawing


def test_what_is_thawed_is_restored_and_not_served() -> None:
    """Before enter nothing runs; adopted is queued before anything is served."""
    agent = staged(1, 2)
    message = thaw(1, 2, epoch=1, halted_ns=1_000_000)
    found = agent.handle(message)
    assert found == [effects.Restore((1, 2), tuple(message.records()))]
    assert agent.restored({}) == []
    assert set(standings(agent).values()) == {Standing.THAWED}
    found = agent.handle(messages.Enter(cut=False), 4_500_000)
    adopted = messages.Adopted(cookie=(1, 2), epoch=(1, 1), pause_us=(3500, 3500))
    assert found == [effects.Send(adopted), effects.Serve((1, 2), is_cut=False)]
    assert set(standings(agent).values()) == {Standing.SERVING}


def test_a_cut_is_entered_together_with_the_shared_state_first() -> None:
    """Those of the cut wait for enter(cut); what follows alone does not wait, and is not entered with it."""
    agent = staged(1, 2)
    agent.handle(thaw(1, flags=RecordFlag.CUT))
    agent.handle(thaw(2))
    found = agent.handle(messages.Enter(cut=False))
    assert one(found, effects.Serve).cookies == (2,)
    found = agent.handle(messages.Enter(cut=True, shared=(b"s",)))
    assert found == [effects.ImportShared((b"s",)), effects.Serve((1,), is_cut=True)]


def test_a_cut_is_adopted_when_all_of_it_are_in() -> None:
    """The pause of each ends there; what ends before was never adopted."""
    agent = staged(1, 2, 3)
    agent.handle(thaw(1, 2, 3, flags=RecordFlag.CUT, halted_ns=1_000_000))
    agent.handle(messages.Enter(cut=True), 2_000_000)
    assert set(standings(agent).values()) == {Standing.THAWED}
    agent.ended({2: messages.How.CLOSED})
    adopted = messages.Adopted(cookie=(1, 3), epoch=(1, 1), pause_us=(5000, 5000))
    assert agent.entered([1, 2, 3], 6_000_000) == [effects.Send(adopted)]
    assert set(standings(agent).values()) == {Standing.SERVING}
    assert agent.entered([1, 2, 3], 7_000_000) == []


def test_who_is_asked_back_while_he_enters_stops_at_a_boundary_or_was_never_here() -> None:
    """What others pushed to him goes along; a handler in the middle of its top, which may hang, has no whole record."""
    agent = staged(1, 2)
    agent.handle(thaw(1, 2, flags=RecordFlag.CUT, halted_ns=1_000_000))
    agent.handle(messages.Enter(cut=True), 2_000_000)
    given = thaw(2, flags=RecordFlag.CUT, halted_ns=1_000_000)
    asked = freeze(1, 2, batch=9, epoch=1)
    assert agent.handle(asked, 3_000_000) == [effects.Catch(asked, (1, 2))]
    found = agent.caught(asked, {1}, 3_000_000)
    assert sent(found) == [
        messages.Adopted(cookie=(1,), epoch=(1,), pause_us=(2000,)),
        messages.Frozen(batch=0, cookie=(2,), epoch=(1,), **messages.record_columns(list(given.records()))),
    ]
    assert one(found, effects.Halt) == effects.Halt(9, (1,))
    assert standings(agent) == {1: Standing.FREEZING, 2: Standing.FROZEN}


def test_who_enters_when_the_holder_dies_is_served_here() -> None:
    """A new holder finds no half-entered handler: nobody waits for its word."""
    agent = staged(1, 2)
    agent.handle(thaw(1, flags=RecordFlag.CUT))
    agent.handle(thaw(2))
    agent.handle(messages.Enter(cut=True))
    agent.orphaned()
    assert standings(agent) == {1: Standing.SERVING, 2: Standing.THAWED}
    assert agent.entered([1], 5) == []


def test_a_pause_never_overflows_and_never_is_negative() -> None:
    """Clocks of two processes and long moves: the column holds what it can."""
    agent = staged(1, 2)
    agent.handle(thaw(1, halted_ns=10**18))
    agent.handle(thaw(2, halted_ns=0))
    adopted = sent(agent.handle(messages.Enter(cut=False), 10**17))[0]
    assert isinstance(adopted, messages.Adopted)
    assert adopted.pause_us == (0, 0xFFFFFFFF)


def test_what_cannot_be_restored_is_given_back_and_closed() -> None:
    """The refuser holds nothing any more: the holder's record stands, somebody else gets it."""
    agent = thawed(1, 2)
    found = agent.restored({1: "it has schema 3"})
    assert sent(found) == [messages.Refused(cookie=(1,), epoch=(1,), reason=(b"it has schema 3",))]
    assert one(found, effects.Discard) == effects.Discard((1,))
    assert standings(agent) == {2: Standing.THAWED}
    assert one(agent.handle(messages.Enter(cut=False)), effects.Serve).cookies == (2,)


@pytest.mark.parametrize(("agent", "epoch"), [(Agent(), 1), (serving(1), 1), (thawed(1, epoch=1), 2), (staged(1), 0)])
def test_a_thaw_of_what_is_not_here_or_is_of_the_past_is_illegal(agent: Agent, epoch: int) -> None:
    """Only a staged or frozen copy takes a record, and only a newer one; nothing changes."""
    before = standings(agent)
    with pytest.raises(IllegalEvent, match="cannot be thawed"):
        agent.handle(thaw(1, epoch=epoch))
    assert standings(agent) == before


def test_a_batch_of_thaws_is_checked_whole() -> None:
    """One wrong row, and none of the others is touched."""
    agent = staged(1)
    with pytest.raises(IllegalEvent):
        agent.handle(thaw(1, 2))
    assert standings(agent) == {1: Standing.STAGED}


def test_a_roll_back_freezes_what_was_thawed_and_never_served() -> None:
    """It is exported again at once, without a halt: it stands where the record says."""
    agent, answers = thawed(1), Answers()
    found = agent.handle(freeze(1, batch=7, epoch=1))
    export = one(found, effects.Export)
    assert export == effects.Export(0, (1,), is_cut=False)
    assert one(found, effects.Halt) == effects.Halt(7, ())
    answers.take(agent.exported(export, records_of(1), {}))
    answers.take(agent.exported(one(agent.halted(7, []), effects.Export), {}, {}))
    assert answers.of == {1: ["Frozen"]}
    assert answers.batches == [7]
    assert one(agent.handle(messages.Enter(cut=False)), effects.Serve).cookies == ()


def test_what_was_never_served_and_cannot_be_exported_is_given_back() -> None:
    """It must not begin to run here: nobody was told that it is adopted."""
    agent = thawed(1)
    export = one(agent.handle(freeze(1, batch=7, epoch=1)), effects.Export)
    found = agent.exported(export, {}, {1: "too large"})
    assert isinstance(sent(found)[-1], messages.Refused)
    assert one(found, effects.Discard) == effects.Discard((1,))
    assert standings(agent) == {}


def test_a_frozen_connection_comes_back() -> None:
    """Thawed where it was frozen, at a later epoch, it is served here again, and can end."""
    agent = serving(1)
    agent.handle(freeze(1, batch=1))
    agent.exported(one(agent.halted(1, [1]), effects.Export), records_of(1), {})
    agent.handle(thaw(1, flags=RecordFlag.UNSERVED, epoch=2))
    agent.handle(messages.Enter(cut=False))
    assert sent(agent.ended({1: messages.How.CLOSED})) == [
        messages.Release(cookie=(1,), epoch=(2,), how=(messages.How.CLOSED,))
    ]


# ---- what others push


def test_a_push_to_what_has_moved_is_forwarded() -> None:
    """In batches, in order; nothing is kept here."""
    pushed = [(number, messages.Act.SEND, b"x%d" % number) for number in range(messages.MAX_ROWS + 1)]
    first, second = sent(serving(1).forward(pushed))
    assert isinstance(first, messages.Forward)
    assert isinstance(second, messages.Forward)
    assert [*first.cookie, *second.cookie] == [number for number, _, _ in pushed]
    assert [*first.pushed, *second.pushed] == [data for _, _, data in pushed]
    assert serving(1).forward([]) == []


def test_a_push_is_delivered_where_the_connection_is() -> None:
    """To what is here; what is frozen here has moved on, and the push follows it; what has ended needs none."""
    agent = mixed()
    found = agent.handle(messages.Push(cookie=(1, 2, 99), act=(0, 1, 2), pushed=(b"a", b"", b"")))
    assert one(found, effects.Deliver) == effects.Deliver((1,), (0,), (b"a",))
    assert sent(found) == [messages.Forward(cookie=(2,), act=(messages.Act.CLOSE,), pushed=(b"",))]


# ---- the end of a move, the end of the worker


def retiring(*cookies: int) -> Agent:
    agent = serving(*cookies)
    agent.handle(messages.Commit(drain_ms=1000))
    return agent


def test_a_retiring_worker_cedes_what_it_kept() -> None:
    """It waits here, frozen, until it is dropped."""
    agent = retiring(1, 2)
    assert agent.may_cede
    (message,) = sent(agent.ceded(records_of(1)))
    assert isinstance(message, messages.Cede)
    assert (message.cookie, message.epoch, message.state) == ((1,), (0,), (b"1",))
    assert standings(agent) == {1: Standing.FROZEN, 2: Standing.SERVING}
    assert one(agent.handle(messages.Drop(cookie=(1,))), effects.Discard).cookies == (1,)


def test_what_came_back_is_not_ceded_again() -> None:
    """Nobody else can serve it: it would go to and fro."""
    agent = retiring(1)
    agent.ceded(records_of(1))
    assert not agent.is_cedable(1)
    agent.handle(thaw(1, flags=RecordFlag.UNSERVED))
    agent.handle(messages.Enter(cut=False))
    assert standings(agent) == {1: Standing.SERVING}
    assert not agent.is_cedable(1)
    with pytest.raises(IllegalEvent, match="cannot be ceded"):
        agent.ceded(records_of(1))


def test_only_who_retires_and_has_a_holder_may_cede() -> None:
    """Not who serves, not who stops, and nobody while there is none to pass it on."""
    agent = serving(1)
    assert not agent.may_cede
    agent.handle(messages.Commit(drain_ms=1000))
    assert agent.is_cedable(1)
    assert not agent.is_cedable(9)
    agent.orphaned()
    assert not agent.may_cede
    agent.recalled({}, {1: 0})
    assert agent.is_cedable(1)
    agent.handle(messages.Stop(drain_ms=1000))
    assert not agent.may_cede
    stopping = serving(1)
    stopping.handle(messages.Stop(drain_ms=1000))
    assert not stopping.may_cede


def test_the_drain_limit_forgets_nothing_that_was_ceded() -> None:
    """A second commit: what was ceded since the first may still come back."""
    agent = retiring(1)
    agent.ceded(records_of(1))
    assert none(agent.handle(messages.Commit(drain_ms=0)), effects.Discard)
    agent.handle(thaw(1, flags=RecordFlag.UNSERVED))


def mixed() -> Agent:
    """Worker with one served, one frozen and one staged connection."""
    agent = serving(1, 2)
    agent.handle(freeze(2, batch=1))
    agent.exported(one(agent.halted(1, [2]), effects.Export), records_of(2), {})
    agent.handle(messages.Stage(cookie=(3,), listener=(0,)))
    return agent


def test_commit_forgets_what_moved_and_retires() -> None:
    """Copies are closed; what is still served is finished within the drain limit."""
    agent = mixed()
    assert agent.handle(messages.Commit(drain_ms=2500)) == [
        effects.Discard((2, 3)),
        effects.MoveEnds(),
        effects.Retire(2.5),
    ]
    assert standings(agent) == {1: Standing.SERVING}
    assert agent.handle(messages.Commit(drain_ms=0)) == [effects.MoveEnds(), effects.Retire(0.0)]


def test_move_over_forgets_the_copies_and_serves_on() -> None:
    """Nothing of a move that has ended is left behind."""
    agent = mixed()
    assert agent.handle(messages.MoveOver()) == [effects.Discard((2, 3)), effects.MoveEnds()]
    assert standings(agent) == {1: Standing.SERVING}


def test_stop_accepts_nothing_more() -> None:
    """Accepting ends before connections do."""
    assert serving(1).handle(messages.Stop(drain_ms=1000)) == [
        effects.Accept(is_on=False),
        effects.StopServing(1.0),
    ]


@pytest.mark.parametrize(
    "message", [messages.AcceptOffAck(number=1), messages.Staged(total=1), messages.Frozen(batch=0)]
)
def test_a_worker_takes_no_worker_s_message(message: messages.Message) -> None:
    """What only workers say is refused by name."""
    with pytest.raises(IllegalEvent, match=f"a worker takes no {type(message).__name__}"):
        Agent().handle(message)


def test_every_message_of_the_holder_is_known() -> None:
    """Welcome is for the start; all others have a transition."""
    known: Any = Agent._TRANSITIONS
    assert set(known) == set(messages.FROM_HOLDER) - {messages.Welcome}


def test_the_records_of_a_large_cut_are_taken_piece_by_piece() -> None:
    """The holder has the first while the next is taken; the shared state comes with the last."""
    cookies = range(1, messages.MAX_DESCRIPTORS + 3)
    agent = serving(*cookies)
    agent.handle(freeze(*cookies, gather_ms=1000))
    exports = [effect for effect in agent.halted(1, cookies) if isinstance(effect, effects.Export)]
    assert [export.is_cut for export in exports] == [False, True]
    assert [cookie for export in exports for cookie in export.cookies] == list(cookies)
    for export in exports:
        found = agent.exported(export, records_of(*export.cookies), {}, b"shared" if export.is_cut else None)
        assert [message.rows for message in sent(found) if isinstance(message, messages.Frozen)] == [
            len(export.cookies)
        ]
        assert bool([message for message in sent(found) if isinstance(message, messages.Gathered)]) == export.is_cut
