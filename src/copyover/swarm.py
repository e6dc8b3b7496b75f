"""
A swarm of verifying clients as tests hold it: started, waited for, stopped, outside the test's own event loop.

It decides where the clients run, a process or a thread; what they check is decided in verifying.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, Self

import attrs

from copyover.verifying import Pack, Plan, SwarmReport, echo

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class _Engine(Protocol):
    """Where the clients run: a process or a thread."""

    def ask(self, what: str, timeout_s: float) -> dict[str, Any]: ...
    def end(self, timeout_s: float) -> None: ...


class Swarm:
    """
    Verifying clients on real connections, outside the caller's event loop.

    They run in a process of their own, or in a thread if *reply*, which says what a line must be answered with, is
    given. Lines begin with their number: ``b"17 client 3 …"``. As a context manager it is stopped at the end of the
    block, and ``report`` has what it saw.
    """

    def __init__(self, plan: Plan, reply: Callable[[bytes], bytes] | None = None) -> None:
        self._plan = plan
        self._report: SwarmReport | None = None
        self._engine: _Engine = _ChildProcess(plan) if reply is None else _Thread(plan, reply)
        try:
            self._engine.ask("start", self._patience_s)
        except BaseException:
            self._engine.end(1.0)
            raise

    @property
    def _patience_s(self) -> float:
        return 5 * self._plan.deadline_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_round(self) -> None:
        """Wait until each client that stays has sent a line after this call, and had its reply."""
        self._engine.ask("round", self._patience_s)

    def stop(self) -> SwarmReport:
        """End all connections once their replies have come, and return what was seen."""
        if self._report is None:
            try:
                self._report = SwarmReport(**self._engine.ask("stop", self._patience_s))
            finally:
                self._engine.end(10.0)
        return self._report

    @property
    def report(self) -> SwarmReport:
        """What was seen; stops the swarm if it still runs."""
        return self.stop()


class _Thread:
    def __init__(self, plan: Plan, reply: Callable[[bytes], bytes]) -> None:
        self._loop = asyncio.new_event_loop()
        self._pack = Pack(plan, reply)
        self._thread = threading.Thread(target=self._run, name="copyover-swarm", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def ask(self, what: str, timeout_s: float) -> dict[str, Any]:
        asked = asyncio.run_coroutine_threadsafe(_obey(self._pack, what), self._loop)
        return asked.result(timeout_s)

    def end(self, timeout_s: float) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)


class _ChildProcess:
    def __init__(self, plan: Plan) -> None:
        command = [sys.executable, "-P", "-m", "copyover.swarm", json.dumps(attrs.asdict(plan))]
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def ask(self, what: str, timeout_s: float) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both are pipes")
        with contextlib.suppress(BrokenPipeError):  # the read says it better
            self._process.stdin.write(what.encode() + b"\n")
        line = _read_line(self._process.stdout.fileno(), timeout_s)
        if not line.endswith(b"\n"):
            raise RuntimeError(f"the swarm (pid {self._process.pid}) went away; its stderr says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self, timeout_s: float) -> None:
        """Close its input, which ends it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if not wait_ended(self._process, timeout_s):
            self._process.kill()
        self._process.wait()


def _read_line(descriptor: int, timeout_s: float) -> bytes:
    """
    Return the next line; without its newline where the end came first.

    Raises:
        TimeoutError: it did not come.

    """
    deadline_s = time.monotonic() + timeout_s
    line = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(deadline_s - time.monotonic(), 0) * 1000):
            raise TimeoutError(f"the swarm did not answer within {timeout_s:g} s")
        data = os.read(descriptor, 64 << 10)
        if not data:
            return line
        line += data
    return line


def wait_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait until *process* is dead, and reap it; False if it still lives after *timeout_s*."""
    if process.poll() is not None:
        return True
    pidfd = os.pidfd_open(process.pid)  # ours and not reaped: the number is still its own
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        has_ended = bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)
    if has_ended:
        process.wait()
    return has_ended


async def _obey(pack: Pack, what: str) -> dict[str, Any]:
    if what == "stop":
        return attrs.asdict(await pack.stop())
    await {"start": pack.start, "round": pack.round}[what]()
    return {}


async def _obey_stdin(plan: Plan) -> None:
    """Follow the orders on stdin until it ends; the answers go to stdout."""
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    pack = Pack(plan, echo)
    async for order in orders:
        print(json.dumps(await _obey(pack, order.decode().strip())), flush=True)  # noqa: T201  # to the parent


def main(text: str) -> None:
    """Run the clients of a plan in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    told = json.loads(text)
    if isinstance(told["address"], list):
        told["address"] = tuple(told["address"])
    asyncio.run(_obey_stdin(Plan(**told)))


if __name__ == "__main__":
    main(sys.argv[1])
