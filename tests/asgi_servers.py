"""How tests start and reload ASGI applications, and kill their workers; what it yields is the server's own account."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from clients import DEADLINE_S
from gates import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from copyover.testing import ReloadResult, Server, Servers

APPS = "tests/apps"
SOON: dict[str, Any] = {
    "gather_s": 0.1,
    "boundary_s": 0.3,
}  # who reaches no boundary is kept, and the test does not wait long for it
PATIENT: dict[str, Any] = {"gather_s": 60.0, "boundary_s": 60.0}  # a test lets it reach its boundary

EVERY_LOOP = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
EVERY_STACK = pytest.mark.parametrize(
    ("http", "loop"), [("httptools", "uvloop"), ("h11", "asyncio"), ("httptools", "asyncio"), ("h11", "uvloop")]
)
BOTH_PARSERS = pytest.mark.parametrize(("http", "loop"), [("httptools", "uvloop"), ("h11", "asyncio")])


def serve(
    servers: Servers,
    app: str = "asgi_raw:app",
    *,
    http: str = "httptools",
    loop: str = "uvloop",
    chdir: str = APPS,
    name: str = "test",
    uvicorn: Mapping[str, object] | None = None,
    **config: Any,
) -> Server:
    """Start *app*; a client may be idle for as long as a slow machine makes it."""
    if loop == "uvloop":
        pytest.importorskip("uvloop", reason="the extra uvloop is not installed")
    options = {"http": http, "timeout_keep_alive": 600} | dict(uvicorn or {})
    return servers(app, chdir=chdir, loop=loop, name=name, config={"uvicorn": options, **config})


class Deployment:
    """A server whose release is a symlink that deploys move; the application is ``app:app`` of that directory."""

    def __init__(self, servers: Servers, root: Path, source: str, **config: Any) -> None:
        self.root = root
        self.current = root / "current"
        self.deploy("one", source)
        self.server = serve(servers, "app:app", chdir=str(self.current), **config)

    def deploy(self, name: str, source: str) -> None:
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "app.py").write_text(source, encoding="utf-8")
        new = self.root / "new"
        new.symlink_to(name)
        new.rename(self.current)


@contextlib.contextmanager
def reloading(server: Server, **flags: Any) -> Iterator[Callable[[], ReloadResult]]:
    """Reload beside the test; what is given waits for the result."""
    results: list[ReloadResult] = []
    thread = threading.Thread(target=lambda: results.append(server.reload(**flags)))
    thread.start()

    def result() -> ReloadResult:
        thread.join(2 * DEADLINE_S)
        return results[0]

    try:
        yield result
    finally:
        thread.join(2 * DEADLINE_S)


def wait_blocked(server: Server) -> None:
    """Return once a reload waits for a connection."""
    wait_until(lambda: server.status()["phase"]["blocked_by"], "a reload that waits")


def wait_phase(server: Server, phase: str) -> None:
    wait_until(lambda: server.status()["phase"]["name"] == phase, f"the phase {phase}")


def wait_alone(server: Server) -> int:
    """Return the pid of the only worker, once all others have gone."""
    wait_until(lambda: len(server.worker_pids()) == 1, "the retiring workers to go")
    return server.worker_pids()[0]


def kill_worker(server: Server) -> None:
    """Kill the first, and return once the holder has noticed."""
    pid = server.worker_pids()[0]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in server.worker_pids(), "the holder to notice a death")
