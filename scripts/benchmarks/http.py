"""
HTTP through the adapter beside uvicorn by itself: requests a second, latency, processor time; load comes from wrk.

Both serve the same application with the same options, and are asked in turn.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

import attrs

from benchmarks import servers
from benchmarks.figures import TIMES, Effort, Figure, Part, at_least

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.servers import Served

TITLE = "HTTP: the adapter against uvicorn"
APPLICATIONS = {"ASGI": "hello:app", "FastAPI": "hello_fastapi:app"}
CONNECTIONS = 32
SECONDS = 1  # of each round; wrk takes whole ones
OPTIONS = {"access_log": False, "lifespan": "off"}
_RUNNING = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@attrs.frozen
class _Round:
    """What one run of wrk saw, and what its server used."""

    rate: float
    p99_ms: float
    user_us: float
    cpu_us: float


def measure(effort: Effort) -> Part:
    if shutil.which("wrk") is None:
        return Part("http", TITLE, (), skipped="there is no wrk here; apt-get install wrk")
    figures: list[Figure] = []
    for loop in servers.LOOPS:
        for name, app in APPLICATIONS.items():
            with servers.worker(app, loop=loop, uvicorn=OPTIONS) as ours, _uvicorn(app, loop) as theirs:
                figures += _compare(f"{name}, {loop}", effort, ours, theirs)
    return Part("http", TITLE, tuple(figures))


@contextlib.contextmanager
def _uvicorn(app: str, loop: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "uvicorn", app, "--app-dir", str(servers.APPS), "--loop", loop, "--port", "0"]
    command += ["--no-access-log", "--lifespan", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = next(found[1] for line in process.stderr if (found := _RUNNING.search(line)))
            yield servers.Served(("127.0.0.1", int(port)), process.pid)
        finally:
            process.kill()


def _compare(where: str, effort: Effort, ours: Served, theirs: Served) -> Iterator[Figure]:
    for served in (ours, theirs):
        _round(served)  # to warm up
    rounds = [(_round(ours), _round(theirs)) for _ in range(effort.repeats)]
    our, their = zip(*rounds, strict=True)

    def ratio(of: Callable[[_Round], float]) -> tuple[float, ...]:
        return tuple(of(mine) / of(other) for mine, other in rounds)

    note = f"{_median(our, 'rate'):.0f} against {_median(their, 'rate'):.0f} a second"
    yield Figure(f"requests/s against uvicorn, {where}", ratio(lambda found: found.rate), TIMES, at_least(0.98), note)
    note = f"{_median(our, 'p99_ms'):.2f} against {_median(their, 'p99_ms'):.2f} ms"
    yield Figure(f"p99 against uvicorn, {where}", ratio(lambda found: found.p99_ms), TIMES, note=note)
    note = f"{_median(our, 'user_us'):.1f} against {_median(their, 'user_us'):.1f} µs of user time"
    note += f", {_median(our, 'cpu_us'):.1f} against {_median(their, 'cpu_us'):.1f} with the kernel's"
    yield Figure(f"user CPU a request against uvicorn, {where}", ratio(lambda found: found.user_us), TIMES, note=note)


def _median(rounds: Sequence[_Round], field: str) -> float:
    values: list[float] = [getattr(found, field) for found in rounds]
    return statistics.median(values)


def _round(served: Served) -> _Round:
    url = "http://{}:{}/".format(*served.address)
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "--latency", url]
    before_ns, before_s = servers.cpu_ns(served.worker), servers.user_s(served.worker)
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used_ns, used_s = servers.cpu_ns(served.worker) - before_ns, servers.user_s(served.worker) - before_s
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"not every request was answered:\n{said}")
    requests = int(_found(r"(\d+) requests in", said)[1])
    p99 = _found(r"99%\s+([\d.]+)(us|ms|s)\b", said)
    return _Round(
        rate=float(_found(r"Requests/sec:\s+([\d.]+)", said)[1]),
        p99_ms=float(p99[1]) * _UNITS[p99[2]],
        user_us=used_s * 1e6 / requests,
        cpu_us=used_ns / 1e3 / requests,
    )


def _found(pattern: str, said: str) -> re.Match[str]:
    found = re.search(pattern, said)
    if found is None:
        raise RuntimeError(f"wrk says nothing of {pattern}:\n{said}")
    return found
