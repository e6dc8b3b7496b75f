"""
What both demos run: a holder in a temporary directory, its releases, reloads, and client processes that take orders.

It decides how processes are started, asked and ended; what a good run is, the demos decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
WAIT_S = 60.0  # generous: only a real fault takes longer


class DemoError(Exception):
    """The demo could not be shown; the sentence says why."""


# ---- the interpreter


def use_venv(script: str, check: str, packages: tuple[str, ...]) -> None:
    """
    Go on under an interpreter that has copyover: one that was named, or one of a venv made for it.

    *check* are the modules that *packages* bring.
    """
    if os.environ.get("COPYOVER_DEMO_IN_VENV"):
        return
    python = os.environ.get("COPYOVER_DEMO_PYTHON") or str(make_venv(check, packages))
    environment = {**os.environ, "COPYOVER_DEMO_IN_VENV": "1"}
    os.execve(python, [python, "-P", script, *sys.argv[1:]], environment)  # noqa: S606  # the same program


def make_venv(check: str, packages: tuple[str, ...]) -> Path:
    """Return the interpreter of .venv, which is made and filled if need be."""
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        print("Making .venv (once) …", flush=True)
        subprocess.run([base_python(), "-m", "venv", str(ROOT / ".venv")], check=True)
    if subprocess.run([str(python), "-c", f"import {check}"], capture_output=True, check=False).returncode:
        print("Installing copyover into .venv (once) …", flush=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-e", *packages], check=True)
    return python


def base_python() -> str:
    """Return a Python that is new enough."""
    if sys.version_info >= OLDEST:
        return sys.executable
    for minor in range(20, OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise DemoError("copyover needs Python 3.11 or newer, and there is none on the PATH")


# ---- processes


class Child:
    """A process that we started, which answers with lines on its stdout."""

    def __init__(self, command: list[str], **options: Any) -> None:
        # A process group of its own: a Ctrl-C is for the demo alone, which ends its children in order.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0, **options
        )
        self._ahead = b""
        self._pouring: threading.Thread | None = None

    def say(self, order: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says it better
            self.process.stdin.write(order.encode() + b"\n")  # type: ignore[union-attr]

    def line(self) -> str:
        """
        Return the next line.

        Raises:
            DemoError: the process has ended, or says nothing.

        """
        deadline_s = time.monotonic() + WAIT_S
        descriptor = self.process.stdout.fileno()  # type: ignore[union-attr]
        while b"\n" not in self._ahead:
            if not select.select([descriptor], [], [], max(deadline_s - time.monotonic(), 0))[0]:
                raise DemoError(f"process {self.process.pid} did not answer within {WAIT_S:.0f} s")
            data = os.read(descriptor, 64 << 10)
            if not data:
                raise DemoError(f"process {self.process.pid} went away")
            self._ahead += data
        line, _, self._ahead = self._ahead.partition(b"\n")
        return line.decode()

    def pour(self, log: Path) -> None:
        """From now on append what it prints to *log*: a pipe that nobody reads would stop it once it is full."""
        self._pouring = threading.Thread(target=self._pour, args=(log,), daemon=True)
        self._pouring.start()

    def _pour(self, log: Path) -> None:
        with log.open("ab") as file:
            while data := os.read(self.process.stdout.fileno(), 64 << 10):  # type: ignore[union-attr]
                file.write(data)
                file.flush()

    def end(self) -> None:
        """Ask it to end with SIGTERM, and see that it does."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._pouring is not None:
            self._pouring.join(15)
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()  # type: ignore[union-attr]


class Running:
    """A holder with its releases, and the processes of its clients."""

    def __init__(self, app: str, releases: dict[str, Path], directory: Path, children: contextlib.ExitStack) -> None:
        """Serve *app* from the first of *releases*; a release that is not there yet is made, and broken."""
        self.app = app
        self.releases = releases
        self.directory = directory
        self.environment = {**os.environ, "COPYOVER_RUNTIME_DIR": str(directory)}
        self._children = children
        self._break_release()
        self.deploy(next(iter(releases)))
        self.log = directory / "log"
        self.host, self.port = self._start_holder()
        self.crowds: list[Child] = []

    def _break_release(self) -> None:
        self.releases["broken"] = self.directory / "broken"
        self.releases["broken"].mkdir()
        module = self.app.partition(":")[0]
        typo = "raise RuntimeError('somebody deployed a typo')\n"
        (self.releases["broken"] / f"{module}.py").write_text(typo, encoding="utf-8")

    def deploy(self, release: str) -> None:
        """Point ``current`` at *release*, at once: so are deploys done."""
        new = self.directory / "new"
        new.symlink_to(self.releases[release])
        new.rename(self.directory / "current")

    def _start_holder(self) -> tuple[str, int]:
        where = ("--listen", "127.0.0.1:0", "--chdir", str(self.directory / "current"))
        with self.log.open("ab") as log:  # two write to it
            holder = Child(self._copyover("run", *where, self.app), env=self.environment, stderr=log)
        self._children.callback(holder.end)
        try:
            ready = re.search(r"listen=tcp://([\d.]+):(\d+)", holder.line())
        except DemoError as problem:
            raise DemoError(f"the server did not start: {problem}\n{self.log.read_text(errors='replace')}") from None
        holder.pour(self.log)
        if ready is None:
            raise DemoError("the holder is ready and does not say where it listens")
        return ready[1], int(ready[2])

    def _copyover(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "copyover.cli", *arguments]

    def add_crowd(self, program: str, plan: dict[str, Any]) -> None:
        """Start clients in a process of their own, which shares nothing with the server."""
        whole = {"host": self.host, "port": self.port, **plan}
        crowd = Child([sys.executable, "-P", str(Path(__file__).with_name(program)), json.dumps(whole)])
        self._children.callback(crowd.end)
        self.crowds.append(crowd)

    def wait_connected(self) -> None:
        for crowd in self.crowds:
            crowd.line()

    def ask_crowds(self, order: str) -> list[dict[str, Any]]:
        """Give an order to all client processes at once; return their answers."""
        for crowd in self.crowds:
            crowd.say(order)
        return [json.loads(crowd.line()) for crowd in self.crowds]

    def reload(self) -> dict[str, Any]:
        """Run ``copyover reload``, and time it as who deploys sees it."""
        began_s = time.monotonic()
        command = self._copyover("reload", "--json")
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, timeout=WAIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise DemoError(f"copyover reload did not end within {WAIT_S:.0f} s") from None
        took_s = time.monotonic() - began_s
        if not done.stdout.strip():
            raise DemoError(f"copyover reload gave no answer: {done.stderr.decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer | {"took_s": took_s}

    def command(self, command: str) -> str:
        """Return the line that runs a command on this holder, in any shell."""
        return f"COPYOVER_RUNTIME_DIR={self.directory} {Path(sys.executable).with_name('copyover')} {command}"


def wait_ctrl_c(advice: str) -> None:
    """Print *advice*, and wait for SIGINT or SIGTERM."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print(advice, flush=True)
    signal.sigwait(signals)


# ---- the table of reloads


class Reloads:
    """The rows of a demo's reloads, shown one by one, and whether each ended as it had to."""

    ROW: ClassVar[str] = "{:<3} {:<30} {:<12} {:>6} {:>5} {:>5} {:>10} {:>8} {:>8} {:>8}"

    def __init__(self, running: Running, clients: int) -> None:
        self.is_as_expected = True
        self._running = running
        self._clients = clients
        print(self.ROW.format("", "", "", "", "", "", "pause p50", "p99", "max", "took"))
        print(self.ROW.format("#", "reload", "outcome", "moved", "kept", "lost", "ms", "ms", "ms", "s"))

    def run(self, number: int, what: str, release: str, outcome: str) -> None:
        """Deploy *release*, reload, show the row, and wait until each client was served again."""
        self._running.deploy(release)
        answer = self._running.reload()
        self._show(number, what, answer)
        self._running.ask_crowds("round")
        counts = answer["connections"]
        is_moved = outcome != "done" or counts["moved"] + counts["kept"] == self._clients
        self.is_as_expected &= answer["outcome"] == outcome and not counts["lost"] and is_moved

    def _show(self, number: int, what: str, answer: dict[str, Any]) -> None:
        counts, pause = answer["connections"], answer["pause_ms"]
        pauses = [f"{pause[key]:.1f}" for key in ("p50", "p99", "max")] if counts["moved"] else ["-"] * 3
        numbers = [counts[key] for key in ("moved", "kept", "lost")]
        row = self.ROW.format(number, what, answer["outcome"], *numbers, *pauses, f"{answer['took_s']:.2f}")
        print(row, flush=True)
