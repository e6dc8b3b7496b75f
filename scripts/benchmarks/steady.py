"""
What a request costs when nothing happens: system calls, bytes through the holder, processor time; what a visit costs.

Servers are asked in turn, repeat by repeat, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING

from benchmarks import load, servers
from benchmarks.boundaries import slot_costs
from benchmarks.figures import TIMES, Effort, Figure, Goal, Part, at_most
from benchmarks.tracing import CannotTrace, Trace

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.servers import Served

TITLE = "Steady state: what a request costs"
CONNECTIONS = 32
TRACED_CONNECTIONS, TRACED_REQUESTS = 10, 500
VISITS, FEW_VISITS = 3000, 200


def measure(effort: Effort) -> Part:
    figures: list[Figure] = []
    skipped = ""
    try:
        figures += _system_calls()
    except CannotTrace as reason:
        skipped = f"system calls are not counted: {reason}"
    for loop in servers.LOOPS:
        figures += _requests(effort, loop)
        figures += _visits(effort, loop)
    figures += slot_costs(effort)
    return Part("steady", TITLE, tuple(figures), skipped=skipped)


# ---- system calls


def _system_calls() -> Iterator[Figure]:
    """Compare a worker with the same handler on the loop's epoll and nothing between; the holder with silence."""
    nothing = at_most(0)
    for loop in servers.LOOPS:
        ours, holder = _traced(servers.worker(loop=loop))
        bare, _ = _traced(servers.peer("bare", loop))
        # To the hundredth: what a timer or the tracer woke is no request's.
        extra = round((ours.total() - bare.total()) / TRACED_REQUESTS, 2)
        note = ", ".join(f"{name} {count / TRACED_REQUESTS:g}" for name, count in sorted(ours.items()))
        yield Figure(f"extra system calls a request, {loop}", (extra,), "", nothing, note)
        yield Figure(f"system calls of the holder a request, {loop}", (holder.total() / TRACED_REQUESTS,), "", nothing)


def _traced(server: AbstractContextManager[Served]) -> tuple[Counter[str], Counter[str]]:
    """Return the calls of worker and holder while clients ask one after the other."""
    with server as served, load.Clients(served.address, TRACED_CONNECTIONS) as clients:
        clients.ask_in_turn(TRACED_CONNECTIONS)  # past what happens once a connection
        worker, holder = Trace(served.worker), Trace(served.holder or served.worker)
        with contextlib.ExitStack() as traces:
            traces.enter_context(worker)
            if served.holder is not None:
                traces.enter_context(holder)
            clients.ask_in_turn(TRACED_REQUESTS)
        return worker.calls, holder.calls


# ---- processor time of a request


def _requests(effort: Effort, loop: str) -> list[Figure]:
    """Have each server asked by clients that ask again as soon as they are answered."""
    costs, wakes = _request_costs(effort, loop)
    ours = costs["slots"]
    is_asyncio = loop == "asyncio"
    return [
        Figure(f"CPU a request, {loop}", ours, "µs"),
        Figure(
            f"CPU a request with slots against without, {loop}", _ratios(ours, costs["no slots"]), TIMES, at_most(1.05)
        ),
        Figure(
            f"CPU a request against Streams on {loop}",
            _ratios(ours, costs["streams"]),
            TIMES,
            at_most(0.5) if is_asyncio else None,  # uvloop's are C, and not asyncio's
            f"a transport and a protocol: {_median_ratio(costs, 'protocol')}, a handler on bare epoll: "
            f"{_median_ratio(costs, 'bare')}",
        ),
        Figure(f"wake-ups of the holder a million requests, {loop}", wakes, "", at_most(0)),
    ]


def _request_costs(effort: Effort, loop: str) -> tuple[dict[str, tuple[float, ...]], tuple[float, ...]]:
    """Return µs of each server, and how often the holder was woken, repeat by repeat."""
    makers = {
        "slots": servers.worker(loop=loop),
        "no slots": servers.worker(loop=loop, slot_bytes=0),
        **{kind: servers.peer(kind, loop) for kind in ("streams", "protocol", "bare")},
    }
    with contextlib.ExitStack() as running:
        crowds = _crowds(running, makers, CONNECTIONS)
        seconds = effort.seconds / 5
        wakes = []

        def ask(served: Served, clients: load.Clients) -> float:
            before_ns, slept = servers.cpu_ns(served.worker), served.holder and servers.switches(served.holder)
            requests = clients.keep_asking(seconds)
            if served.holder is not None and slept is not None:
                wakes.append((servers.switches(served.holder) - slept) / requests * 1e6)
            return (servers.cpu_ns(served.worker) - before_ns) / requests / 1000

        return _interleaved(effort, crowds, ask), tuple(wakes)


# ---- processor time of a short connection


def _visits(effort: Effort, loop: str) -> list[Figure]:
    """Let clients connect, ask once and go: holder and worker together, against workers that have no holder."""
    makers = {
        "lends": servers.worker(loop=loop),
        "alone": servers.worker_alone(loop=loop),
        "alone, no slots": servers.worker_alone(loop=loop, slot_bytes=0),
        "streams": servers.peer("streams", loop),
    }
    visits = FEW_VISITS if effort.is_quick else VISITS
    of_holder = []
    with contextlib.ExitStack() as running:
        crowds = _crowds(running, makers, 0)

        def visit(served: Served, clients: load.Clients) -> float:
            pids = [pid for pid in (served.worker, served.holder) if pid is not None]
            before_ns = [servers.cpu_ns(pid) for pid in pids]
            clients.visit(visits)
            used_us = [(servers.cpu_ns(pid) - was) / visits / 1000 for pid, was in zip(pids, before_ns, strict=True)]
            of_holder.extend(used_us[1:])
            return sum(used_us)

        costs = _interleaved(effort, crowds, visit)
    goal: Goal | None = at_most(1.10) if loop == "asyncio" else None
    return [
        Figure(
            f"CPU a short connection, holder and worker, {loop}",
            costs["lends"],
            "µs",
            note=f"of that the holder: {statistics.median(of_holder):.1f} µs",
        ),
        Figure(
            f"CPU a short connection against a worker that accepts alone, {loop}",
            _ratios(costs["lends"], costs["alone"]),
            TIMES,
            goal,
            f"against one without slots, too: {_median_ratio(costs, 'alone, no slots', 'lends')}, against Streams: "
            f"{_median_ratio(costs, 'streams', 'lends')}",
        ),
    ]


# ---- fair turns


def _crowds(
    running: contextlib.ExitStack, makers: Mapping[str, AbstractContextManager[Served]], count: int
) -> dict[str, tuple[Served, load.Clients]]:
    crowds = {}
    for name, maker in makers.items():
        served = running.enter_context(maker)
        crowds[name] = served, running.enter_context(load.Clients(served.address, count))
    return crowds


def _interleaved(
    effort: Effort,
    crowds: dict[str, tuple[Served, load.Clients]],
    cost: Callable[[Served, load.Clients], float],
) -> dict[str, tuple[float, ...]]:
    for crowd in crowds.values():
        cost(*crowd)  # to warm up
    turns = [{name: cost(*crowd) for name, crowd in crowds.items()} for _ in range(effort.repeats)]
    return {name: tuple(turn[name] for turn in turns) for name in crowds}


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    return tuple(our / their for our, their in zip(ours, theirs, strict=True))


def _median_ratio(costs: dict[str, tuple[float, ...]], other: str, ours: str = "slots") -> str:
    return f"{statistics.median(_ratios(costs[ours], costs[other])):.2f} {TIMES}"
