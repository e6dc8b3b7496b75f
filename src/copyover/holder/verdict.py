"""
What a slot and the kernel prove together: how a connection goes on whose worker is dead.

It believes the kernel; a slot says what to resume from, never that it may be resumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from copyover.messages import Record, RecordFlag

if TYPE_CHECKING:
    from copyover.slots import Content, Counters


@attrs.frozen
class Verdict:
    """
    With a *record* it goes on from that; without one it is reset, or has ended already.

    *reason*: why it does not go on exactly where it was, for operators; empty if it does.
    """

    record: Record | None = None
    has_ended: bool = False
    reason: str = ""

    @property
    def is_exact(self) -> bool:
        return self.record is not None and not self.reason


def judge(content: Content | None, counters: Counters | None, *, epoch: int, resumes: bool, now_ns: int) -> Verdict:
    """
    Say how a connection of *epoch* goes on; *resumes* is the policy of its listener where it cannot be exact.

    *counters* is None for a unix socket, of which the kernel counts no bytes.
    """
    if counters is not None and counters.is_closed:
        return Verdict(has_ended=True, reason="the client had ended it, or it broke")
    if content is None:
        return Verdict(reason="it had no slot")
    if content.epoch != epoch:
        return Verdict(reason=f"its slot is of epoch {content.epoch}, the connection of {epoch}")
    if counters is not None and counters.is_write_closed:
        # Nothing can be written any more, so nothing is left to do but what its worker was doing.
        flags = RecordFlag.FINISHED | RecordFlag.WRITE_CLOSED
        return Verdict(Record(flags=flags, received=counters.read, sent=counters.written, halted_ns=now_ns))
    return _by_slot(content, counters, resumes=resumes, now_ns=now_ns)


def _by_slot(content: Content, counters: Counters | None, *, resumes: bool, now_ns: int) -> Verdict:
    is_finished = bool(content.flags & RecordFlag.FINISHED)
    rest = _rest_of_unsent(content, counters)
    reason = _doubt(content, counters, has_rest=rest is not None)
    record = Record(
        flags=content.flags,
        schema=content.schema,
        received=content.received if counters is None else counters.read,
        sent=content.sent if counters is None else counters.written,
        halted_ns=now_ns,
        unread=content.unread or b"",
        unsent=rest or b"",
        state=content.state or b"",
    )
    if not reason:
        return Verdict(record)
    # Nobody is left to tell the client of a finished one: a clean end of half an answer would be a lie.
    if is_finished or not resumes or content.state is None or _is_false(content, counters):
        return Verdict(reason=reason)
    return Verdict(_interrupted(record, counters), reason=reason)


def _interrupted(record: Record, counters: Counters | None) -> Record:
    """What was read ahead may be consumed since: only what was written whole before the boundary is still sent."""
    flags = record.flags | RecordFlag.INTERRUPTED
    return attrs.evolve(record, flags=flags, unread=b"", unsent=b"" if counters is None else record.unsent)


def _is_false(content: Content, counters: Counters | None) -> bool:
    """It speaks of bytes that there never were."""
    return counters is not None and (content.received > counters.read or content.sent > counters.written)


def _doubt(content: Content, counters: Counters | None, *, has_rest: bool) -> str:  # noqa: PLR0911  # one a doubt
    """Say why it cannot go on exactly where it was, the weightiest reason; nothing if it can."""
    is_finished = bool(content.flags & RecordFlag.FINISHED)  # what comes is discarded, and no handler needs a state
    if content.state is None and not is_finished:
        return "its state did not fit the slot"
    if _is_false(content, counters):
        return "its slot speaks of bytes that there never were"
    if content.is_touched:
        used = "its socket" if counters is None else "what it had read ahead"
        return f"{used} was used since its last boundary"
    if counters is not None and counters.read != content.received and not is_finished:
        return f"{counters.read - content.received} bytes were read since its last boundary"
    if counters is not None and counters.written > content.sent + content.unsent_bytes:
        return f"{counters.written - content.sent} bytes were written since its last boundary"
    if content.unread is None and not is_finished:
        return "what it had read ahead did not fit the slot"
    return "" if has_rest else "what it had not sent did not fit the slot"


def _rest_of_unsent(content: Content, counters: Counters | None) -> bytes | None:
    """Return what the kernel has not taken of what was unsent at the boundary; None if it is not known."""
    taken = 0 if counters is None else counters.written - content.sent
    if taken >= content.unsent_bytes:
        return b""
    return None if content.unsent is None else content.unsent[taken:]
