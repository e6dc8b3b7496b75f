"""
What a measurement is: figures with their goals, points of charts, the parts they belong to, and how hard to try.

It measures nothing and prints nothing.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

SPARE = 1100  # descriptors that a holder keeps for itself, and some for a reload
TIMES = "\N{MULTIPLICATION SIGN}"  # the unit of ratios


@attrs.frozen
class Goal:
    text: str
    is_met: Callable[[float], bool] = attrs.field(eq=False, repr=False)


def at_most(limit: float, unit: str = "") -> Goal:
    return Goal(f"≤ {limit:g} {unit}".rstrip(), lambda value: value <= limit)


def at_least(limit: float, unit: str = "") -> Goal:
    return Goal(f"≥ {limit:g} {unit}".rstrip(), lambda value: value >= limit)


def counted(connections: int) -> str:
    return f"{connections:_} connections".replace("_", " ")


@attrs.frozen
class Figure:
    """
    What was measured once a repeat; the median of the repeats is its value.

    Each value of a ratio, whose unit is TIMES, was taken within one repeat.
    """

    name: str
    values: tuple[float, ...] = attrs.field(validator=attrs.validators.min_len(1))
    unit: str
    goal: Goal | None = None
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; nothing where there is none."""
        return None if self.goal is None else self.goal.is_met(self.value)


@attrs.frozen
class Series:
    """A line of a chart: its points are (connections, what the chart shows)."""

    chart: str
    name: str
    points: tuple[tuple[float, float], ...]


@attrs.frozen
class Part:
    name: str
    title: str
    figures: tuple[Figure, ...]
    series: tuple[Series, ...] = ()
    skipped: str = ""


@attrs.frozen
class Effort:
    """How hard a part tries: the same code with small numbers takes seconds."""

    repeats: int
    connections: tuple[int, ...]
    linear: tuple[int, ...]  # the numbers of connections over which a cost should be the same for each
    seconds: float  # of load, for what is measured under load
    is_quick: bool
    room: int = 18_900  # connections that one process here can hold

    @property
    def most(self) -> int:
        """How many connections the largest measurement has."""
        return max(self.connections)

    def within(self, descriptors: int) -> Effort:
        """Return what of this is possible with so many descriptors a process: clients spread, a holder cannot."""
        room = max(descriptors - SPARE, 1)

        def fitting(counts: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(count for count in counts if count <= room) or (room,)

        return attrs.evolve(self, room=room, connections=fitting(self.connections), linear=fitting(self.linear))


THOROUGH = Effort(
    repeats=5,
    connections=(100, 1000, 5000, 15_000),
    linear=(1000, 5000, 10_000, 18_000),
    seconds=5.0,
    is_quick=False,
)
QUICK = Effort(repeats=2, connections=(20, 60), linear=(20, 60), seconds=0.5, is_quick=True)
