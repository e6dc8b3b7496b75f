"""Which bytes a slot is, and what is believed of one whose writer died anywhere."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import slots
from copyover.errors import WireError
from copyover.messages import RecordFlag
from copyover.slots import Content, Pen, TcpState

FLAGS = st.sampled_from([0, 1, 2, 3, 16, 32, 48])
NUMBERS = st.integers(0, (1 << 64) - 1)
BLOBS = st.binary(max_size=600)
CONTENTS = st.builds(
    Content,
    epoch=st.integers(0, (1 << 32) - 1),
    flags=FLAGS,
    schema=st.integers(0, 0xFFFF),
    received=NUMBERS,
    sent=NUMBERS,
    unread=BLOBS,
    unsent=BLOBS,
    state=st.none() | BLOBS,
)


class File:
    """A file of slots in memory."""

    def __init__(self, slot_bytes: int = 1024, count: int = 3) -> None:
        self.slot_bytes = slot_bytes
        self.bytes = bytearray(slots.HEADER_BYTES + slot_bytes * count)
        self.words = memoryview(self.bytes).cast("Q")

    def pen(self, place: int = 0) -> Pen:
        return Pen(memoryview(self.bytes), self.words, place, self.slot_bytes)

    def slot(self, place: int = 0) -> bytes:
        start = slots.HEADER_BYTES + place * self.slot_bytes
        return bytes(self.bytes[start : start + self.slot_bytes])


def publish(pen: Pen, content: Content) -> None:
    pen.publish(
        *(content.received, content.sent, content.epoch, int(content.flags), content.schema),
        *(content.unread or b"", content.unsent or b"", content.state),
    )


def as_read(content: Content, room: int) -> Content:
    """What should be read of it: the state first, then what is unsent, then what is unread, as far as each fits."""
    kept: dict[str, Any] = {}
    for name in ("state", "unsent", "unread"):
        blob = getattr(content, name)
        kept[name] = blob if blob is not None and len(blob) <= room else None
        room -= len(kept[name] or b"")
    return Content(
        *(content.epoch, content.flags, content.schema, content.received, content.sent),
        **kept,
        unsent_bytes=len(content.unsent or b""),
    )


@pytest.mark.skipif(sys.byteorder != "little", reason="the golden bytes are those of a little-endian machine")
def test_the_golden_bytes_of_version_1() -> None:
    """A holder of a later release reads what a worker of this one wrote: these bytes never change."""
    header = slots.shape(256, 7, worker=5, generation=3)
    assert header.pack().hex(" ", 4) == "636f736c 6f747300 01000000 00010000 07000000 03000000 05000000 00000000"
    file = File(256)
    pen = file.pen()
    pen.publish(0x1111, 0x2222, 3, int(RecordFlag.INTERRUPTED), 9, b"un", b"sent", b"{}")
    pen.name(0xABCD)
    assert file.slot()[:16].hex(" ", 8) == "cdab000000000000 0100000000000000"
    assert file.slot()[16:136] == bytes(120)
    assert file.slot()[136:192].hex(" ", 8) == (
        "0100000000000000 1111000000000000 2222000000000000 0300000010000900 0200000004000000 0200000000000000 "
        "7b7d73656e74756e"
    )
    pen.touch()
    assert file.slot()[8:16].hex() == "0100000000000080"


@given(st.lists(CONTENTS, min_size=1, max_size=5), st.sampled_from([256, 272, 1024, 4096]))
def test_what_was_published_last_is_read(contents: list[Content], slot_bytes: int) -> None:
    """However often, whatever was there before; what does not fit is marked."""
    file = File(slot_bytes)
    pen = file.pen(1)
    pen.name(77)
    for content in contents:
        publish(pen, content)
        assert slots.read(file.slot(1)) == (77, as_read(content, slots.capacity(slot_bytes)))
    assert file.slot(0) == file.slot(2) == bytes(slot_bytes)


@given(CONTENTS, CONTENTS, st.data())
def test_a_writer_that_dies_anywhere_leaves_the_last_boundary(
    before: Content, torn: Content, data: st.DataObject
) -> None:
    """Whatever part of the next one it had written: until the one store that makes it count, nothing has changed."""
    file = File()
    pen = file.pen()
    publish(pen, before)
    pen.name(5)
    whole = bytearray(file.bytes)
    publish(pen, torn)
    word = slots.HEADER_BYTES + 8
    for at, byte in enumerate(file.bytes):
        if byte != whole[at] and not word <= at < word + 8 and data.draw(st.booleans()):
            whole[at] = byte
    file.bytes[:] = whole
    assert slots.read(file.slot()) == (5, as_read(before, slots.capacity(1024)))


def test_counts_alone_are_published_over_what_is_there() -> None:
    """The cheap way of an unchanged state: both halves have it, only the counts differ."""
    file = File()
    pen = file.pen()
    pen.name(5)
    for count in (1, 2):
        pen.publish(count, count, 4, 0, 1, b"", b"", b"state")
    for count in (3, 4, 5):
        pen.recount(count, 10 * count)
        assert slots.read(file.slot()) == (5, Content(4, 0, 1, count, 10 * count, state=b"state"))


def test_the_mark_of_use_goes_with_the_next_publish() -> None:
    """What it marks is still read; and a free slot is nobody's."""
    file = File()
    pen = file.pen()
    pen.touch()
    pen.name(5)
    assert slots.read(file.slot()) is None
    pen.publish(1, 2, 0, 0, 1, b"", b"", b"")
    pen.touch()
    found = slots.read(file.slot())
    assert found is not None
    assert found[1].is_touched
    assert found[1].received == 1
    pen.publish(1, 2, 0, 0, 1, b"", b"", b"")
    assert not pen.is_touched
    pen.name(0)
    assert slots.read(file.slot()) is None


@given(st.sampled_from([256, 1024]), st.data())
def test_garbage_is_refused_or_within_its_bounds(slot_bytes: int, data: st.DataObject) -> None:
    """Nothing that a worker wrote makes its reader fail, or read beyond the slot."""
    found = slots.read(data.draw(st.binary(min_size=slot_bytes, max_size=slot_bytes)))
    if found is not None:
        content = found[1]
        assert sum(len(blob or b"") for blob in (content.unread, content.unsent, content.state)) <= slot_bytes


@given(CONTENTS, st.integers(0, 47), st.integers(1, 255))
def test_a_half_that_does_not_fit_its_word_or_itself_is_refused(content: Content, at: int, change: int) -> None:
    """A wrong sequence, unknown flags, lengths beyond the half; what is read of the rest is what is there."""
    file = File()
    pen = file.pen()
    publish(pen, content)
    pen.name(5)
    file.bytes[slots.HEADER_BYTES + 16 + 504 + at] ^= change
    found = slots.read(file.slot())
    if at < 8:
        assert found is None
    if found is not None:
        assert sum(len(blob or b"") for blob in (found[1].unread, found[1].unsent, found[1].state)) <= 456


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((0, b"x"), "instead of"),
        ((8, b"\x02"), "version 2"),
        ((12, b"\x00\x00\x00\x00"), "none of ours"),
        ((12, b"\x08\x04\x00\x00"), "none of ours"),
        ((12, b"\xff\xff\xff\xff"), "none of ours"),
        ((16, b"\xff\xff\xff\xff"), "none of ours"),
    ],
)
def test_a_header_of_another_kind_is_refused(change: tuple[int, bytes], says: str) -> None:
    """By magic, version, and a shape that a file can have."""
    page = bytearray(slots.shape(1024, 9, worker=1, generation=1).pack())
    assert slots.read_header(bytes(page)) == slots.Header(1024, 9, 1, 1)
    page[change[0] : change[0] + len(change[1])] = change[1]
    with pytest.raises(WireError, match=says):
        slots.read_header(bytes(page))


def test_a_short_header_is_refused() -> None:
    """An empty file, or one that was cut."""
    with pytest.raises(WireError, match="has 10 bytes"):
        slots.read_header(bytes(10))


def test_without_slots_a_file_is_its_header() -> None:
    """It is the register of its worker all the same; a size in between is rounded up."""
    assert slots.shape(0, 100, worker=1, generation=1).file_bytes == slots.HEADER_BYTES
    assert slots.read_header(slots.shape(0, 100, worker=4, generation=1).pack()).slots == 0
    assert slots.shape(1000, 2, worker=1, generation=1).slot_bytes == 1008


@pytest.mark.parametrize(
    ("state", "read", "written"),
    [
        (TcpState.ESTABLISHED, 7, 25),
        (TcpState.CLOSE_WAIT, 6, 25),
        (TcpState.FIN_WAIT1, 7, 24),
        (TcpState.FIN_WAIT2, 7, 24),
        (TcpState.CLOSING, 6, 24),
        (TcpState.LAST_ACK, 6, 24),
    ],
)
def test_fins_are_no_bytes(state: TcpState, read: int, written: int) -> None:
    """The kernel counts the peer's from its arrival, ours from the moment that it is queued."""
    found = slots.count(state, acked=20, arrived=10, unread=3, unacked=5)
    assert (found.read, found.written) == (read, written)
    assert found.is_write_closed == (written == 24)
    assert not found.is_closed
    assert slots.count(TcpState.CLOSE, acked=0, arrived=0, unread=0, unacked=0).is_closed
