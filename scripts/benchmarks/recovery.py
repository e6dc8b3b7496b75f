"""
How long clients wait when a worker is killed, and how long a reload has to wait when the holder is.

Each client is idle when its worker dies, asks at once, and is served again when its answer has come.
"""

from __future__ import annotations

import os
import signal
import statistics
import time

import attrs

from benchmarks import load, servers
from benchmarks.figures import Effort, Figure, Part, at_most

TITLE = "After kill -9"
REPEATS = 3  # each has a server of its own: a second death soon after the first is restarted later


@attrs.frozen
class _Course:
    """What happened when, in ms since the worker was killed; *interpreter* and *holder* are how long that took."""

    judged: float  # the holder has looked at every slot and every socket
    interpreter: float  # from the start of the next worker until it was ready
    first: float  # of them was served
    served: float  # all of them
    holder: float


def measure(effort: Effort) -> Part:
    count = effort.most
    figures = []
    for loop in servers.LOOPS:
        courses = [_course(loop, count) for _ in range(min(REPEATS, effort.repeats))]
        beyond = tuple(course.served - course.interpreter for course in courses)
        median = {
            field.name: statistics.median(getattr(course, field.name) for course in courses)
            for field in attrs.fields(_Course)
        }
        note = (
            "with the interpreter's start ({interpreter:.0f} ms): the holder knew what each was at after {judged:.0f}, "
            "the first was served after {first:.0f}, the last after {served:.0f} ms"
        ).format(**median)
        figures += [
            Figure(
                f"{count} connections of a killed worker served again, {loop}", beyond, "ms", at_most(300, "ms"), note
            ),
            Figure(
                f"a holder after a killed one can reload {count} connections, {loop}",
                tuple(course.holder for course in courses),
                "ms",
                note="from `copyover run`, with two starts of an interpreter",
            ),
        ]
    return Part("recovery", TITLE, tuple(figures))


def _course(loop: str, count: int) -> _Course:
    with servers.copyover(loop=loop) as server, load.Clients(server.address, count, processes=2) as clients:
        (worker,) = server.worker_pids()
        killed_s = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        first_s, served_s = clients.ask_all()
        happened = {noted["event"]: noted["monotonic_s"] for noted in servers.events_of(server)}
        server.kill()
        begun_s = time.monotonic()
        server.run()
        holder_s = time.monotonic() - begun_s
        server.reload().assert_lossless()
        clients.ask_all()
    return _Course(
        judged=(happened["died"] - killed_s) * 1000,
        interpreter=(happened["restarted"] - happened["started"]) * 1000,
        first=(first_s - killed_s) * 1000,
        served=(served_s - killed_s) * 1000,
        holder=holder_s * 1000,
    )
