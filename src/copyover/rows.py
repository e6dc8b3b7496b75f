"""
Where the numbers of many connections are kept: a column for each kind of number, a row for each cookie.

It knows no meaning of any. A connection costs some 130 bytes so, and makes no object that a garbage collection visits.
"""

from __future__ import annotations

import array
import operator
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_BLOCK = 256  # rows that are added at a time


@attrs.define
class Rows:
    """*places* tells the row of each cookie; a row is another's once its connection has ended."""

    places: dict[int, int] = attrs.field(factory=dict)
    _free: list[int] = attrs.field(factory=list)
    _columns: list[array.array[Any]] = attrs.field(factory=list)
    _size: int = 0

    def column(self, code: str) -> array.array[Any]:
        """Return a new column of that struct code, before there are rows."""
        made = array.array(code)
        self._columns.append(made)
        return made

    def of(self, cookies: Collection[int]) -> Sequence[int]:
        """
        Return the rows of *cookies*.

        Raises:
            KeyError: one has none.

        """
        if len(cookies) > 1:
            found: Sequence[int] = operator.itemgetter(*cookies)(self.places)
            return found
        return [self.places[cookie] for cookie in cookies]

    def add(self, cookies: Collection[int]) -> list[int]:
        """Give each of *cookies*, none of which has one, a row of zeros."""
        missing = len(cookies) - len(self._free)
        if missing > 0:
            self._grow(-(-missing // _BLOCK) * _BLOCK)
        rows = [self._free.pop() for _ in cookies]
        self.places.update(zip(cookies, rows, strict=True))
        return rows

    def _grow(self, more: int) -> None:
        for column in self._columns:
            column.frombytes(bytes(more * column.itemsize))
        self._free[:0] = range(self._size + more - 1, self._size - 1, -1)
        self._size += more

    def remove(self, cookies: Iterable[int]) -> None:
        rows = [self.places.pop(cookie) for cookie in cookies]
        if not rows:
            return
        at = operator.itemgetter(*rows, rows[0])  # of one row it would return no tuple
        for column in self._columns:
            if any(at(column)):  # most are zero, and to see that takes a quarter of the time
                for row in rows:
                    column[row] = 0
        self._free += rows
        if not self.places and self._size > _BLOCK:
            self._shrink()

    def _shrink(self) -> None:
        """Give back what the most that there ever were needed."""
        self.places, self._free, self._size = {}, [], 0
        for column in self._columns:
            del column[:]
