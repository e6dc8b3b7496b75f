"""Numbers and blobs of many rows: they are the bytes of the wire, and equal what they were made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import messages
from copyover.columns import Blobs, Column, join, picker
from copyover.messages import Record, Records, record_columns, record_packets

LIMITS = {"B": 8, "H": 16, "I": 32, "Q": 64}

blobs = st.lists(st.binary(max_size=5), max_size=6)


@pytest.mark.parametrize("code", LIMITS)
def test_a_column_is_its_bytes(code: str) -> None:
    """Little-endian, the smallest and the largest number of its code included."""
    numbers = [0, 1, (1 << LIMITS[code]) - 1]
    column = Column(code, numbers)
    assert column.packed() == b"".join(number.to_bytes(LIMITS[code] // 8, "little") for number in numbers)
    assert Column.read(code, column.packed()) == column


@given(st.lists(st.integers(0, 255), max_size=6), st.lists(st.integers(0, 255), max_size=6))
def test_a_column_equals_what_has_the_same_numbers(ours: list[int], theirs: list[int]) -> None:
    """A tuple, a list or another column, and nothing that is no sequence."""
    column = Column("B", ours)
    assert (column == tuple(theirs)) == (column == theirs) == (column == Column("Q", theirs)) == (ours == theirs)
    assert column != 5
    assert hash(column) == hash(tuple(ours))


@given(blobs)
def test_blobs_are_what_they_were_made_of(values: list[bytes]) -> None:
    """One after the other, by their places, and from the end."""
    made = Blobs.of(values)
    assert list(made) == values
    assert made == values
    assert [made[place] for place in range(-len(values), len(values))] == values * 2
    assert list(made[1:3]) == values[1:3]
    assert Blobs.of(made) is made
    with pytest.raises(IndexError):
        made[len(values)]


@given(st.lists(st.integers(0, 5), max_size=6))
def test_a_picker_takes_the_same_places_out_of_every_column(places: list[int]) -> None:
    """In their order, also none, one, or one twice."""
    for column in ([10, 11, 12, 13, 14, 15], Column("H", range(10, 16)), Blobs.of([b"x" * size for size in range(6)])):
        assert picker(places)(column) == tuple(column[place] for place in places)


def test_joined_rows_follow_one_another() -> None:
    """Whatever kinds of columns they are of."""
    assert join([Column("B", [1, 2]), (3,), []]) == (1, 2, 3)


# ---- records in batches


def batch(*cookies: int, size: int = 1) -> Records:
    records = [Record(received=cookie, state=bytes(size)) for cookie in cookies]
    return Records(cookie=cookies, **record_columns(records))


def packets(cookies: list[int], *batches: Records) -> list[Records]:
    found = {cookie: one for one in batches for cookie in one.cookie}
    return list(record_packets(cookies, [found[cookie] for cookie in cookies]))


def test_a_batch_that_is_wanted_whole_is_passed_on_as_it_is() -> None:
    """Nothing of it is copied."""
    (packet,) = packets([3, 1, 2], one := batch(3, 1, 2))
    assert packet is one


@pytest.mark.parametrize("wanted", [[1], [2, 1], [3, 5, 1], [5, 4, 3, 2, 1], [1, 4, 2, 5, 3]])
def test_rows_come_out_in_the_order_in_which_they_are_wanted(wanted: list[int]) -> None:
    """Parts of batches, several batches, and batches that alternate."""
    (packet,) = packets(wanted, batch(1, 2, 3), batch(4, 5))
    assert list(packet.cookie) == wanted
    assert [record.received for record in packet.records()] == wanted
    assert packet.record_of(wanted[-1]) == Record(received=wanted[-1], state=bytes(1))


def test_packets_are_cut_at_the_most_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are put together up to it, and one that came larger stays whole."""
    monkeypatch.setattr(messages, "MAX_ROWS", 3)
    many = [batch(1, 2), batch(3), batch(4), batch(5, 6, 7, 8), batch(9)]
    assert [tuple(packet.cookie) for packet in packets([*range(1, 10)], *many)] == [(1, 2, 3), (4,), (5, 6, 7, 8), (9,)]


def test_packets_are_cut_at_the_most_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of what the states, the unread and the unsent have together."""
    monkeypatch.setattr(messages, "MAX_CHUNK_BYTES", 10)
    many = [batch(1, size=6), batch(2, size=4), batch(3, size=1), batch(4, size=99), batch(5)]
    assert [tuple(packet.cookie) for packet in packets([*range(1, 6)], *many)] == [(1, 2), (3,), (4,), (5,)]


def test_the_mark_of_a_cut_is_set_and_taken_away() -> None:
    """And no other flag is touched."""
    cut, finished = int(messages.RecordFlag.CUT), int(messages.RecordFlag.FINISHED)
    records = Records(cookie=(1, 2), **record_columns([Record(flags=finished), Record(flags=cut)]))
    assert records.flagged(is_cut=True) == (finished | cut, cut)
    assert records.flagged(is_cut=False) == (finished, 0)
