"""
Numbers and blobs of many rows, kept as the bytes that they are on the wire.

It knows no message. What nobody looks at a row at a time is never made into objects: a column is copied, cut and joined
as a whole. Both kinds equal any other sequence of the same values, and neither is ever changed.
"""

from __future__ import annotations

import array
import itertools
import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Numbers = array.array[int]
else:
    Numbers = array.array

T = TypeVar("T")


class Column(Numbers):
    """Numbers of one struct code, one a row."""

    __slots__ = ()

    @classmethod
    def read(cls, code: str, data: bytes | memoryview) -> Column:
        """Return the little-endian numbers that *data* is; what is left of it is not looked at."""
        column = cls(code)
        column.frombytes(data)
        if sys.byteorder == "big":
            column.byteswap()
        return column

    def packed(self) -> bytes:
        """Return the bytes of all numbers, little-endian."""
        if sys.byteorder == "big":
            return Column.read(self.typecode, self.tobytes()).tobytes()
        return self.tobytes()

    def __eq__(self, other: object) -> bool:
        return equal(self, other)

    def __hash__(self) -> int:  # type: ignore[override]  # an array has none, because it may be changed
        return hash(tuple(self))


class Blobs(Sequence[bytes]):
    """Bytes of any length, one a row: all of them joined, and where each ends."""

    __slots__ = ("_ends", "joined", "sizes")

    def __init__(self, sizes: Column, joined: bytes) -> None:
        self.sizes = sizes
        self.joined = joined
        self._ends: list[int] | None = None

    @classmethod
    def of(cls, values: Sequence[bytes]) -> Blobs:
        return values if isinstance(values, cls) else cls(Column("I", map(len, values)), b"".join(values))

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> Blobs: ...
    def __getitem__(self, place: int | slice) -> bytes | Blobs:
        if isinstance(place, slice):
            return Blobs.of([self[each] for each in range(len(self))[place]])
        if self._ends is None:
            self._ends = list(itertools.accumulate(self.sizes))
        end = self._ends[place]
        return self.joined[end - self.sizes[place] : end]

    def __iter__(self) -> Iterator[bytes]:
        if not self.joined:
            return itertools.repeat(b"", len(self))
        ends = itertools.accumulate(self.sizes, initial=0)
        return (self.joined[start:end] for start, end in itertools.pairwise(ends))

    def __eq__(self, other: object) -> bool:
        return equal(self, other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Blobs{tuple(self)!r}"


def equal(column: Sequence[object], other: object) -> bool:
    """Whether *other* has the same values in the same order."""
    if not isinstance(other, (Sequence, Column)) or len(column) != len(other):
        return False
    return all(map(operator.eq, column, other))


def picker(places: Sequence[int]) -> Callable[[Sequence[T]], tuple[T, ...]]:
    """Return what takes the rows at *places* out of a column."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda column: tuple([column[place] for place in places])


def join(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """Return the rows of all *parts*."""
    return tuple(itertools.chain.from_iterable(parts))
