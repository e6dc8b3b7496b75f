"""
The pause of live connections in a reload, as the reload tells it and as clients see it.

The load is a schedule of requests over all connections, from other processes, which waits for no answer. The clients'
figure compares windows of one length and one run: one with a reload in it, command and interpreters' starts included,
and one beside it without.
"""

from __future__ import annotations

import select
import statistics
import time
from typing import TYPE_CHECKING

import attrs

from benchmarks.figures import TIMES, Effort, Figure, Goal, Part, Series, at_most, counted
from benchmarks.running import ECHO, LOOPS, MOVES, Asked, Crowd, reload_all, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import ReloadResult, Server

TITLE = "Pause of a live connection in a reload, under 3 000 requests/s"
RATE = 3000.0
CALM_S = 0.3  # between a reload and what is measured next: the retired worker has gone
GOALS_AT = 15_000
GOALS: dict[tuple[str, str, str], Goal] = {
    ("rolling", "asyncio", "p99"): at_most(2, "ms"),
    ("rolling", "uvloop", "p99"): at_most(1, "ms"),
    ("together", "asyncio", "max"): at_most(120, "ms"),
    ("together", "uvloop", "max"): at_most(120, "ms"),
}
CLIENTS_GOAL = at_most(2, TIMES)


@attrs.frozen
class Reloaded:
    """One reload of a move, and the waits of clients in its window and in one of the same length without a reload."""

    result: ReloadResult
    window: tuple[int, int]
    calm: tuple[int, int]


def measure(effort: Effort) -> Part:
    figures: list[Figure] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for count in effort.connections:
        for loop in LOOPS:
            reloads, asked = _measure(count, loop, effort.repeats)
            for move, done in reloads.items():
                found = list(_figures(count, loop, move, done, asked))
                figures += found
                points.setdefault(f"{move}, {loop}", []).append((count, found[0].value))
    series = tuple(Series("pause", name, tuple(line)) for name, line in points.items())
    return Part(name="pause", title=TITLE, figures=tuple(figures), series=series)


def _measure(count: int, loop: str, repeats: int) -> tuple[dict[str, list[Reloaded]], list[Asked]]:
    reloads: dict[str, list[Reloaded]] = {move: [] for move in MOVES}
    with serving(ECHO, "app:echo", loop=loop) as server, Crowd(server.address, count, RATE) as crowd:
        crowd.load()
        _let_run(CALM_S)
        for _ in range(repeats):
            for move in MOVES:
                reloads[move].append(_reload(server, count, move))
        return reloads, crowd.tell()


def _reload(server: Server, count: int, move: str) -> Reloaded:
    began_ns = time.monotonic_ns()
    result = reload_all(server, count, move=move)
    ended_ns = time.monotonic_ns()
    _let_run(CALM_S)
    calm_ns = time.monotonic_ns()
    _let_run((ended_ns - began_ns) / 1e9)
    return Reloaded(result, (began_ns, ended_ns), (calm_ns, time.monotonic_ns()))


def _let_run(seconds: float) -> None:
    """Let the load go on: what is measured is time that passes."""
    select.select([], [], [], seconds)


def _figures(count: int, loop: str, move: str, reloads: list[Reloaded], asked: list[Asked]) -> Iterator[Figure]:
    name = f"{counted(count)}, {move}, {loop}"

    def goal(what: str) -> Goal | None:
        return GOALS.get((move, loop, what)) if count == GOALS_AT else None

    for what in ("p99", "max", "p50"):
        values = tuple(done.result.pause_ms[what] for done in reloads)
        yield Figure(f"{name}: pause {what}", values, "ms", goal(what))
    moving = [_p99_ms(_longest(asked, done.window)) for done in reloads]
    calm = [_p99_ms(_longest(asked, done.calm)) for done in reloads]
    late = [_p99_ms([one.late_ns for one in _within(asked, done.window)]) for done in reloads]
    note = f"the clients themselves were late by {statistics.median(late):.1f} ms at the p99"
    yield Figure(f"{name}: clients' longest wait, p99", tuple(moving), "ms", note=note)
    yield Figure(
        f"{name}: clients' longest wait against that without a reload, p99",
        tuple(ours / theirs for ours, theirs in zip(moving, calm, strict=True)),
        TIMES,
        CLIENTS_GOAL if move == "rolling" and count == GOALS_AT else None,
    )


def _within(asked: list[Asked], window: tuple[int, int]) -> Iterator[Asked]:
    return (one for one in asked if window[0] <= one.sent_ns < window[1])


def _longest(asked: list[Asked], window: tuple[int, int]) -> list[int]:
    """Return the longest wait of each connection that sent in the window."""
    longest: dict[tuple[int, int], int] = {}
    for one in _within(asked, window):
        longest[one.connection] = max(longest.get(one.connection, 0), one.wait_ns)
    return list(longest.values())


def _p99_ms(values_ns: list[int]) -> float:
    ordered = sorted(values_ns)
    return ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)] / 1e6
