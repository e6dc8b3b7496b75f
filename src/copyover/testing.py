"""
The pytest plugin: a holder of your own per test, reloads, and clients that check every byte meanwhile.

It decides how a test's server is started and ended, and what of its log fails the test; it never imports your server.

A test of your own server, ``chat.py`` beside ``tests/``::

    def test_a_reload_loses_nothing(copyover_server):
        server = copyover_server("chat:echo")
        with server.swarm(clients=50, churn=5) as swarm:
            for _ in range(3):
                server.reload().assert_lossless()
                swarm.wait_round()
        swarm.report.assert_lossless()

``echo`` answers each line with itself; give ``swarm(reply=lambda line: …)`` for what your server answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import attrs
import pytest

from copyover.swarm import Swarm, wait_ended
from copyover.verifying import Plan, SwarmReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["ReloadResult", "Server", "Servers", "Swarm", "SwarmReport", "copyover_server"]

START_S = 60.0  # generous: only a real fault takes longer
STOP_S = 60.0
COMMAND_S = 180.0


@attrs.frozen
class ReloadResult:
    """What ``copyover reload --json`` printed and exited with."""

    exit_code: int
    answer: dict[str, Any]
    stderr: str

    @property
    def outcome(self) -> str:
        """One of done, refused, rolled-back, busy, started; or failed, where there was no answer."""
        return str(self.answer.get("outcome", "failed"))

    @property
    def error(self) -> str | None:
        return self.answer.get("error")

    @property
    def moved(self) -> int:
        return int(self.answer["connections"]["moved"])

    @property
    def kept(self) -> int:
        return int(self.answer["connections"]["kept"])

    @property
    def ended(self) -> int:
        return int(self.answer["connections"]["ended"])

    @property
    def lost(self) -> int:
        return int(self.answer["connections"]["lost"])

    @property
    def closed(self) -> int:
        """How many came by a listener that a roll-back took away again."""
        return int(self.answer["connections"]["closed"])

    @property
    def pause_ms(self) -> dict[str, float]:
        """The pauses of the moved connections: p50, p99, max."""
        return dict(self.answer["pause_ms"])

    @property
    def took_ms(self) -> float:
        return float(sum(self.answer["phases_ms"].values()))

    def assert_lossless(self) -> ReloadResult:
        """
        Return the result, if the new generation serves and nothing was lost.

        Raises:
            AssertionError: it was refused or rolled back, or connections were lost.

        """
        if self.exit_code != 0 or self.outcome != "done" or self.lost:
            raise AssertionError(f"the reload exited with {self.exit_code}:\n{self.answer}\n{self.stderr}")
        return self

    def assert_refused(self) -> ReloadResult:
        """
        Return the result, if the incumbent serves on and nothing was lost.

        Raises:
            AssertionError: the reload went through, or connections were lost.

        """
        if self.exit_code not in (3, 12, 13, 14) or self.outcome not in ("refused", "rolled-back") or self.lost:
            raise AssertionError(f"the reload exited with {self.exit_code}:\n{self.answer}\n{self.stderr}")
        return self


@attrs.define
class Told:
    """What one holder has said on stdout: *event* is set once it is ready, or has ended."""

    event: threading.Event = attrs.field(factory=threading.Event)
    ready: str = ""


class Server:
    """
    One holder with its server, in a runtime directory of its own.

    Set ``expect_errors`` where the test provokes tracebacks or protocol errors in the log.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.expect_errors = False
        # Short, and not pytest's tmp_path: the path of a unix socket has 107 bytes at most. unix(7)
        self.directory = Path(tempfile.mkdtemp(prefix="co-"))
        if settings.keys() & {"user", "control_group"}:
            self.directory.chmod(0o711)  # else they could not pass through
        self.output = ""  # what was printed to stdout so far, the application's prints included
        self._log = self.directory / "log"
        self._environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(self.directory)}
        self._last_log = ""
        self._is_asked_to_stop = False
        self._told = Told()
        self._settings: dict[str, Any] = {}
        self.configure(**settings)
        self.addresses: list[tuple[str, int] | str] = []
        self._begin()

    # ---- starting

    def run(self) -> None:
        """
        Start another holder: after ``kill`` it takes over from the one that was killed.

        Raises:
            RuntimeError: it did not become ready, with its log; or there are two.

        """
        previous = self._process
        self._begin()
        if not wait_ended(previous, STOP_S):
            raise RuntimeError(f"the holder {previous.pid} lives beside its successor")

    def _begin(self) -> None:
        self._told = Told()
        self._process = self._start()
        self._reader = threading.Thread(
            target=self._read_output, args=(self._process, self._told), name=f"copyover-{self.name}", daemon=True
        )
        self._reader.start()
        self.addresses = self._wait_ready()

    def configure(self, **settings: Any) -> None:
        """Change keys of copyover.toml; the next reload reads them. None removes a key."""
        self._settings = {key: value for key, value in (self._settings | settings).items() if value is not None}
        lines = [f"{key} = {_as_toml(value)}\n" for key, value in self._settings.items()]
        new = self.directory / "copyover.toml.new"
        new.write_text("".join(lines), encoding="utf-8")
        new.rename(self.directory / "copyover.toml")

    def _start(self) -> subprocess.Popen[bytes]:
        command = self._command("run", "--config", str(self.directory / "copyover.toml"), "--name", self.name)
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  # our own command line
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=self._environment
            )

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "copyover.cli", *arguments]

    def _read_output(self, process: subprocess.Popen[bytes], told: Told) -> None:
        """Empty the pipe for as long as anybody may write to it, so that no print blocks; workers outlive a holder."""
        if process.stdout is None:
            raise AssertionError("it is a pipe")
        with process.stdout as lines:
            for line in lines:
                self.output += line.decode(errors="replace")
                if line.startswith(b"ready name="):
                    told.ready = line.decode().rstrip("\n")
                    told.event.set()
        told.event.set()

    def _wait_ready(self) -> list[tuple[str, int] | str]:
        in_time = self._told.event.wait(START_S)
        ready = re.search(r"^ready name=.* listen=(\S+)$", self._told.ready)
        if ready is None:
            log = self.log
            self.discard()
            what = "ended before it was ready" if in_time else f"was not ready within {START_S:g} s"
            raise RuntimeError(f"the server {what}\n{log}")
        return [_address(url) for url in ready[1].split(",")]

    # ---- asking

    @property
    def pid(self) -> int:
        """The holder's."""
        return self._process.pid

    @property
    def address(self) -> tuple[str, int]:
        """The first TCP listener's host and port."""
        return next(address for address in self.addresses if not isinstance(address, str))

    @property
    def path(self) -> str:
        """The first unix listener's path."""
        return next(address for address in self.addresses if isinstance(address, str))

    @property
    def log(self) -> str:
        """What holder and workers have written to stderr so far."""
        with contextlib.suppress(FileNotFoundError):  # discarded
            self._last_log = self._log.read_text(encoding="utf-8", errors="replace")
        return self._last_log

    def reload(self, **flags: Any) -> ReloadResult:
        """Run ``copyover reload --json``; ``timeout_s=5`` becomes ``--timeout 5``, ``no_wait=True`` ``--no-wait``."""
        arguments = []
        for flag, value in flags.items():
            if value is not None and value is not False:
                arguments.append("--" + flag.removesuffix("_s").replace("_", "-"))
                arguments += [] if value is True else [str(value)]
        return self.command("reload", "--json", *arguments)

    def command(self, command: str, *arguments: str) -> ReloadResult:
        """Run any command that answers with one JSON object: ``command("cancel", "--json")``."""
        done = self._run(command, *arguments)
        return ReloadResult(done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr)

    def status(self) -> dict[str, Any]:
        """Return the object of ``copyover status --json``."""
        found: dict[str, Any] = json.loads(self._run("status", "--json").stdout)
        return found

    def connections(self) -> list[dict[str, Any]]:
        """Return the rows of ``copyover connections --json``."""
        rows: list[dict[str, Any]] = json.loads(self._run("connections", "--json").stdout)["connections"]
        return rows

    def audit(self) -> dict[str, Any]:
        """Return the object of ``copyover audit --json``: what the kernel says of the connections."""
        found: dict[str, Any] = json.loads(self._run("audit", "--json").stdout)
        return found

    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.status()["workers"] if worker["pid"] is not None]

    def descriptors(self, pid: int | None = None) -> int:
        """Return how many descriptors the holder, or the process *pid*, has open."""
        return len(os.listdir(f"/proc/{self.pid if pid is None else pid}/fd"))  # noqa: PTH208  # a count, no paths

    def swarm(
        self,
        clients: int = 8,
        *,
        reply: Callable[[bytes], bytes] | None = None,
        address: tuple[str, int] | str | None = None,
        **plan: Any,
    ) -> Swarm:
        """Connect verifying clients; *plan* has the other fields of copyover.verifying.Plan."""
        return Swarm(Plan(address=address or self.addresses[0], clients=clients, **plan), reply)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self._command(arguments[0], self.name, *arguments[1:])
        return subprocess.run(  # noqa: S603  # our own command line
            command, env=self._environment, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )

    # ---- ending

    def stop(self) -> int:
        """
        Ask it to stop with SIGTERM, and return the holder's exit code once it is gone.

        Raises:
            TimeoutError: it did not stop in time; it was killed.

        """
        if self._process.poll() is None:
            self._process.terminate()
            self._is_asked_to_stop = True
        if not wait_ended(self._process, STOP_S):
            self.kill()
            raise TimeoutError(f"the holder did not stop within {STOP_S:g} s\n{self.log}")
        return self._process.wait()

    def kill(self) -> None:
        """SIGKILL the holder; its workers serve on."""
        self._process.kill()
        wait_ended(self._process, STOP_S)

    def discard(self) -> list[int]:
        """End what is left of it and remove its directory; return the pids of processes that outlived a stop."""
        if self._process.poll() is None:
            self.kill()
        left = [pid for pid in _pids_of(str(self.directory)) if _kill(pid)]
        self._reader.join(STOP_S)
        self._last_log = self.log
        shutil.rmtree(self.directory, ignore_errors=True)
        return left if self._is_asked_to_stop else []

    def problems(self) -> list[str]:
        """Return the lines of the log that no healthy server writes."""
        return [line for line in self.log.splitlines() if "event=refused" in line or line.startswith("Traceback (")]


def _as_toml(value: Any) -> str:
    """Write a value in one line. JSON's strings, numbers, booleans and arrays of them are TOML's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_as_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _address(url: str) -> tuple[str, int] | str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return str(parts.hostname), int(parts.port or 0)


def _pids_of(directory: str) -> Iterator[int]:
    """Find the processes that were started for *directory*: its name is in their environment and nobody else's."""
    mark = f"COPYOVER_RUNTIME_DIR={directory}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                yield int(process.name)


def _kill(pid: int) -> bool:
    """SIGKILL *pid*; false if it is dead already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Servers:
    """The factory that the fixture gives: call it once for each server that the test needs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._servers: list[Server] = []

    def __call__(
        self,
        app: str,
        *,
        chdir: str | os.PathLike[str] | None = None,
        listen: Sequence[str] = ("127.0.0.1:0",),
        workers: int = 1,
        python: str | None = None,
        move: str | None = None,
        loop: str | None = None,
        config: Mapping[str, Any] | None = None,
        name: str = "test",
    ) -> Server:
        """
        Start a holder with *app*, and return it once it serves.

        *chdir* is relative to pytest's rootdir; a symlink stays one. *config* has further keys of copyover.toml.

        Raises:
            RuntimeError: it did not become ready; with its log.

        """
        # abspath, not resolve: a test moves the symlink and reloads.
        directory = os.path.abspath(self._root / (chdir or "."))  # noqa: PTH100
        settings = {"app": app, "chdir": directory, "listen": list(listen), "workers": workers}
        optional = {"python": python, "move": move, "loop": loop}
        server = Server(name, settings | optional | dict(config or {}))
        self._servers.append(server)
        return server

    def end(self) -> list[str]:
        """Stop all; return what a healthy server would not have done."""
        problems = []
        for server in self._servers:
            try:
                server.stop()
            except TimeoutError as late:
                problems.append(str(late))
            found = [] if server.expect_errors else server.problems()
            sys.stderr.write(server.log)  # pytest shows it where the test fails
            outlived = server.discard()
            problems += found
            if outlived and not server.expect_errors:
                problems.append(f"processes {outlived} of the server {server.name} outlived its stop")
        return problems


@pytest.fixture
def copyover_server(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Start servers under holders of their own; see copyover.testing."""
    servers = Servers(request.config.rootpath)
    problems: list[str] = []
    try:
        yield servers
    finally:
        problems = servers.end()
    if problems:
        pytest.fail("the server's log is not that of a healthy one:\n" + "\n".join(problems), pytrace=False)
