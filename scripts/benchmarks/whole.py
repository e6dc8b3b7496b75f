"""
The whole of a reload: what a connection costs from ready to the last one thawed, and what who deploys waits for.

A connection's cost is staging and moving, by the holder's clock, over the number of connections, which are idle here.
Staging begins when the replacement has said that it is ready, and moving ends when it serves the last connection. The
start of the interpreter and the import of the application come before; who retires, retires behind.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks import pgbouncer
from benchmarks.figures import TIMES, Effort, Figure, Part, Series, at_most, counted
from benchmarks.running import ECHO, LOOPS, MOVES, Crowd, reload_all, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TITLE = "The whole reload, from ready to the last one thawed"
GOAL = at_most(10, "µs")
LINEAR_FROM = 1000
LINEAR_GOAL = at_most(1.3, TIMES)
PGBOUNCER_SESSIONS = 10_000
QUICK_SESSIONS = 1000
FASTAPI = """
from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def hello() -> dict[str, str]:
    return {"hello": "world"}
"""


def measure(effort: Effort) -> Part:
    figures: list[Figure] = []
    series: list[Series] = []
    for loop in LOOPS:
        costs = _costs(loop, effort.linear, effort.repeats)
        for move in MOVES:
            found = {count: tuple(costs[count, move]) for count in effort.linear}
            figures += _per_connection(f"{move}, {loop}", found)
            points = tuple((count, statistics.median(values) * count / 1000) for count, values in found.items())
            series.append(Series("time", f"{move}, {loop}", points))
    beside, why_not = _beside_pgbouncer(effort)
    figures += beside
    figures += _as_deployer_sees(effort.repeats)
    return Part(name="whole", title=TITLE, figures=tuple(figures), series=tuple(series), skipped=why_not)


def _costs(loop: str, counts: Sequence[int], repeats: int) -> dict[tuple[int, str], list[float]]:
    """Return the µs a connection of each reload, by the number of connections and the move, as more and more come."""
    costs: dict[tuple[int, str], list[float]] = {(count, move): [] for count in counts for move in MOVES}
    with serving(ECHO, "app:echo", loop=loop) as server, contextlib.ExitStack() as end:
        crowds: list[Crowd] = []
        connected = 0
        for count in counts:
            crowds.append(end.enter_context(Crowd(server.address, count - connected)))
            connected = count
            for _ in range(repeats):
                for move in MOVES:
                    phases_ms = reload_all(server, count, move=move).answer["phases_ms"]
                    costs[count, move].append((phases_ms["staging"] + phases_ms["moving"]) * 1000 / count)
        for crowd in crowds:
            crowd.verify()
    return costs


def _per_connection(name: str, found: dict[int, tuple[float, ...]]) -> Iterator[Figure]:
    for count, values in found.items():
        goal = GOAL if count >= LINEAR_FROM else None  # below, what a reload costs by itself is most of it
        yield Figure(f"{counted(count)}, {name}: a connection", values, "µs", goal)
    if len(found) > 1:
        spread = tuple(max(costs) / min(costs) for costs in zip(*found.values(), strict=True))
        note = f"the dearest against the cheapest of {min(found)} to {max(found)} connections"
        goal = LINEAR_GOAL if min(found) >= LINEAR_FROM else None
        yield Figure(f"{name}: linear within", spread, TIMES, goal, note)


def _beside_pgbouncer(effort: Effort) -> tuple[list[Figure], str]:
    program = pgbouncer.find()
    if program is None:
        return [], "no pgbouncer here: its takeover is not measured beside"
    sessions = min(QUICK_SESSIONS if effort.is_quick else PGBOUNCER_SESSIONS, effort.room)
    spent_us = pgbouncer.measure_takeovers(program, sessions, effort.repeats)
    note = f"{sessions} idle sessions, from SUSPEND to serving; it waits for transactions to end first"
    return [Figure("PgBouncer's takeover: a session", spent_us, "µs", note=note)], ""


def _as_deployer_sees(repeats: int) -> list[Figure]:
    """Return what `copyover reload` of a FastAPI application takes, beside the import of that application alone."""
    reloads_ms: list[float] = []
    booting_ms: list[float] = []
    imports_ms: list[float] = []
    with TemporaryDirectory(prefix="co-") as directory, serving(FASTAPI, "app:app") as server:
        Path(directory, "app.py").write_text(FASTAPI, encoding="utf-8")
        alone = [sys.executable, "-c", "import app"]
        for _ in range(repeats):
            began_s = time.perf_counter()
            result = server.reload().assert_lossless()
            reloads_ms.append((time.perf_counter() - began_s) * 1000)
            booting_ms.append(result.answer["phases_ms"]["booting"])
            began_s = time.perf_counter()
            subprocess.run(alone, cwd=directory, check=True)
            imports_ms.append((time.perf_counter() - began_s) * 1000)
    beyond = tuple(ours / theirs for ours, theirs in zip(reloads_ms, imports_ms, strict=True))
    return [
        Figure("FastAPI: `copyover reload`, the whole command", tuple(reloads_ms), "ms", note="no connections"),
        Figure("FastAPI: from the start of the interpreter to ready", tuple(booting_ms), "ms"),
        Figure('FastAPI: `python -c "import app"` alone', tuple(imports_ms), "ms"),
        Figure("FastAPI: the whole command against the import", beyond, TIMES),
    ]
