"""What a slot and the kernel prove together."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover.holder.verdict import Verdict, judge
from copyover.messages import Record, RecordFlag
from copyover.slots import Content, Counters, TcpState

SLOT = Content(epoch=2, flags=0, schema=4, received=100, sent=50, unread=b"par", state=b"{}")
OPEN = Counters(100, 50, TcpState.ESTABLISHED)


def verdict(content: Content | None, counters: Counters | None, *, epoch: int = 2, resumes: bool = False) -> Verdict:
    return judge(content, counters, epoch=epoch, resumes=resumes, now_ns=9)


def slot(**changes: Any) -> Content:
    return attrs.evolve(SLOT, **changes)


def test_equal_counts_are_exact() -> None:
    """The record is the last boundary, with all that was read and not consumed."""
    found = verdict(SLOT, OPEN)
    assert found.is_exact
    assert found.record == Record(0, 0, 4, 100, 50, 9, b"par", b"", b"{}")


@pytest.mark.parametrize("taken", [0, 1, 4, 5])
def test_of_unsent_bytes_those_that_the_kernel_took_are_dropped(taken: int) -> None:
    """They went in order: the rest of them is what is still to be sent."""
    found = verdict(slot(unsent=b"12345", unsent_bytes=5), Counters(100, 50 + taken, TcpState.ESTABLISHED))
    assert found.is_exact
    assert found.record is not None
    assert (found.record.sent, found.record.unsent) == (50 + taken, b"12345"[taken:])


def test_unsent_bytes_that_did_not_fit_are_exact_once_all_are_gone() -> None:
    """Their number is enough then."""
    content = slot(unsent=None, unsent_bytes=5)
    assert verdict(content, Counters(100, 55, TcpState.ESTABLISHED)).is_exact
    assert "had not sent" in verdict(content, Counters(100, 54, TcpState.ESTABLISHED)).reason


BUSY = [
    (SLOT, Counters(101, 50, TcpState.ESTABLISHED), "1 bytes were read"),
    (SLOT, Counters(100, 52, TcpState.ESTABLISHED), "2 bytes were written"),
    (slot(unread=None), OPEN, "read ahead did not fit"),
    (slot(is_touched=True), None, "its socket was used"),
]


@pytest.mark.parametrize(("content", "counters", "says"), BUSY)
def test_what_was_used_since_is_reset_or_interrupted(content: Content, counters: Counters | None, says: str) -> None:
    """By the policy of its listener; what was read ahead may be consumed, and is not given to anybody."""
    reset = verdict(content, counters)
    assert reset.record is None
    assert says in reset.reason
    resumed = verdict(content, counters, resumes=True)
    assert resumed.reason == reset.reason
    assert resumed.record is not None
    assert resumed.record.flags == RecordFlag.INTERRUPTED
    assert (resumed.record.unread, resumed.record.unsent, resumed.record.state) == (b"", b"", b"{}")
    if counters is not None:
        assert (resumed.record.received, resumed.record.sent) == (counters.read, counters.written)


@pytest.mark.parametrize(
    ("content", "counters", "says"),
    [
        (None, OPEN, "no slot"),
        (slot(epoch=1), OPEN, "epoch 1, the connection of 2"),
        (slot(epoch=3), OPEN, "epoch 3, the connection of 2"),
        (slot(state=None), OPEN, "state did not fit"),
        (slot(received=101), OPEN, "never were"),
        (slot(sent=51), OPEN, "never were"),
        (slot(flags=RecordFlag.FINISHED, unsent=None, unsent_bytes=9), OPEN, "had not sent"),
    ],
)
@pytest.mark.parametrize("resumes", [False, True])
def test_what_cannot_be_resumed_is_reset_whatever_the_policy(
    content: Content | None, counters: Counters, says: str, *, resumes: bool
) -> None:
    """No slot, one of another time, no state, a lie, or the clean end of half an answer."""
    found = verdict(content, counters, resumes=resumes)
    assert (found.record, found.has_ended) == (None, False)
    assert says in found.reason


def test_what_has_ended_in_the_kernel_is_not_lost() -> None:
    """Both ends had closed it, or the client's reset came: nothing of ours took it away."""
    assert verdict(SLOT, Counters(0, 0, TcpState.CLOSE)).has_ended
    assert verdict(None, Counters(0, 0, TcpState.CLOSE)).has_ended


def test_after_our_fin_nothing_is_left_but_to_linger() -> None:
    """Whatever its handler still wanted: nothing can be written any more."""
    found = verdict(SLOT, Counters(300, 400, TcpState.FIN_WAIT2))
    assert found.is_exact
    assert found.record is not None
    assert found.record.flags == RecordFlag.FINISHED | RecordFlag.WRITE_CLOSED
    assert found.record.unsent == b""


def test_a_finished_connection_sends_what_is_left() -> None:
    """Its handler is through: what the client sends is discarded, and needs no state."""
    content = slot(flags=RecordFlag.FINISHED, unsent=b"bye", unsent_bytes=3, state=None, unread=None)
    found = verdict(content, Counters(500, 51, TcpState.ESTABLISHED))
    assert found.is_exact
    assert found.record is not None
    assert (found.record.flags, found.record.unsent) == (RecordFlag.FINISHED, b"ye")


def test_one_that_reached_no_boundary_begins_anew() -> None:
    """Nothing was read or written: its handler is entered as if it had never been."""
    fresh = slot(flags=RecordFlag.FRESH, received=0, sent=0, unread=b"", state=b"")
    found = verdict(fresh, Counters(0, 0, TcpState.ESTABLISHED))
    assert found.is_exact
    assert found.record is not None
    assert found.record.flags == RecordFlag.FRESH
    late = verdict(fresh, Counters(0, 8, TcpState.ESTABLISHED), resumes=True)
    assert late.record is not None
    assert late.record.flags == RecordFlag.FRESH | RecordFlag.INTERRUPTED


@given(
    st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.binary(max_size=9), st.booleans()
)
def test_exact_is_what_nobody_can_have_used(  # noqa: PLR0917  # the counts of both sides
    received: int,
    sent: int,
    read: int,
    written: int,
    unsent: bytes,
    resumes: bool,  # noqa: FBT001
) -> None:
    """The client's whole stream, for any counts: bytes before, then the rest of the unsent ones; none twice."""
    content = slot(received=received, sent=sent, unsent=unsent, unsent_bytes=len(unsent))
    found = verdict(content, Counters(read, written, TcpState.ESTABLISHED), resumes=resumes)
    assert found.is_exact == (read == received and sent <= written <= sent + len(unsent))
    if found.is_exact and found.record is not None:
        assert unsent[: written - sent] + found.record.unsent == unsent
