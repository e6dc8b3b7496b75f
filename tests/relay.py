"""
A relay between a holder and its worker: forwards their packets, and commits one fault at the packet it is told to.

It takes the place of the release's interpreter: the holder starts it, it starts the real worker, and everything that
they say goes through it, descriptors included. It never reads what a packet means, and it has no hook in either.

For the holder the relay is the worker. That holds because of how it ends:

- The worker dies, or the relay kills it: it is reaped first, then all that it had sent is forwarded, as the kernel
  would have delivered it, and only then the relay dies in the same way.
- The relay is killed: the worker has PR_SET_PDEATHSIG. The kernel sends that signal while the relay exits, before
  its pidfd becomes readable, so that the holder cannot learn of a death before the worker's own is under way. What
  the relay had read and not yet forwarded, one packet, is as if the worker had died before it sent it. prctl(2)
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

LARGEST_BYTES = 1 << 18  # more than any packet: what is too long arrives as it was sent
_RIGHTS_BYTES = socket.CMSG_SPACE(1024)
_PR_SET_PDEATHSIG = 1
BRIEFLY_S = 0.05  # how long something is stopped that goes on again, and how long a packet waits to be overtaken

FAULTS = ("kill", "stall", "pause", "truncate", "repeat", "reorder", "kill-holder", "pause-holder")
PROCESSES = ("incumbent", "replacement")
DIRECTIONS = ("up", "down")  # from the worker; from the holder


class Fault(NamedTuple):
    """What happens where: at packet *n*, from 1, of *direction*; of a worker that runs already, or of the next one."""

    fault: str
    process: str
    direction: str
    n: int


# ---- for tests: where a relay finds what it is to do


def install(directory: Path, python: str = sys.executable) -> str:
    """Make an interpreter for releases that puts a relay in front of each worker; return its path."""
    (directory / "bin").mkdir(parents=True)
    wrapper = directory / "bin" / "python"
    command = f'exec {sys.executable} -I -S {Path(__file__).resolve()} {directory} {python} "$@"'
    wrapper.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
    wrapper.chmod(0o755)
    return str(wrapper)


def arm(directory: Path, fault: Fault) -> None:
    """Let the relay that it concerns commit *fault*, once."""
    disarm(directory)
    _write(directory / fault.process, {"armed_s": time.monotonic(), "fault": fault._asdict()})


def disarm(directory: Path) -> bool:
    """Call the fault off; True if it has been committed."""
    for process in PROCESSES:
        for told in directory.glob(f"{process}*"):
            told.unlink(missing_ok=True)
    committed = directory / "committed"
    was_committed = committed.exists()
    committed.unlink(missing_ok=True)
    return was_committed


def _write(path: Path, told: dict[str, Any]) -> None:
    new = path.with_name(f"new.{os.getpid()}")
    new.write_text(json.dumps(told), encoding="utf-8")
    new.rename(path)


class _Orders:
    """The fault that this relay is to commit; it has it for as long as its file is there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started_s = time.monotonic()
        self._mine = Path()
        self.fault: Fault | None = None

    def take(self, process: str) -> bool:
        """Take the fault for *process*, if there is one: whoever renames its file has it, of several relays one."""
        theirs, mine = self._directory / process, self._directory / f"{process}.{os.getpid()}"
        try:
            told = json.loads(theirs.read_text(encoding="utf-8"))
            if process == "incumbent" and told["armed_s"] < self._started_s:
                return False  # we are the replacement
            theirs.rename(mine)
        except FileNotFoundError:
            return False
        self._mine, self.fault = mine, Fault(**told["fault"])
        return True

    def see(self) -> bool:
        """See what is ordered now; True when it is a new fault, for one that runs."""
        if self.fault is not None and self._mine.exists():
            return False
        self.fault = None
        return self.take("incumbent")

    def claim(self) -> bool:
        """Say that the fault is committed; False if it is called off. Both are one rename, so that none gets lost."""
        try:
            self._mine.rename(self._directory / "committed")
        except FileNotFoundError:
            return False
        return True


# ---- the process


class Packet(NamedTuple):
    payload: bytes
    descriptors: array.array[int]

    def send(self, sock: socket.socket) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, self.descriptors)] if self.descriptors else []
        try:
            sock.sendmsg([self.payload], rights, socket.MSG_NOSIGNAL)
        except OSError:
            return  # the receiver has gone: so it would have been without us

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def receive(sock: socket.socket) -> Packet | None:
    """Return the next packet, None at the end."""
    try:
        payload, ancillary, _, _ = sock.recvmsg(LARGEST_BYTES, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return Packet(payload, descriptors) if payload else None


class Relay:
    """One worker's relay; *up* is the holder's channel, *down* the worker's."""

    def __init__(self, directory: Path, command: list[str]) -> None:
        self._holder = _Holder()
        self._ends = {"up": _inherited("COPYOVER_CHANNEL")}
        self._ends["down"], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._ends["down"].setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        # The worker has our end too: our death is no EOF to it, which would come before its own death.
        for end in (theirs, self._ends["down"]):
            os.set_inheritable(end.fileno(), True)
        environment = os.environ | {"COPYOVER_CHANNEL": str(theirs.fileno())}
        us = os.getpid()
        self._worker = subprocess.Popen(
            command,
            env=environment,
            close_fds=False,
            preexec_fn=lambda: _die_with(us),  # noqa: PLW1509  # there are no threads here
        )
        self._pidfd = os.pidfd_open(self._worker.pid)
        theirs.close()
        self._orders = _Orders(directory)
        self._orders.take("replacement")
        self._packets = dict.fromkeys(DIRECTIONS, 0)
        self._held: dict[str, Packet] = {}
        self._alarm_s: float | None = None

    def run(self) -> NoReturn:
        """Forward until the worker is dead."""
        while True:
            for descriptor in self._wait():
                if descriptor == self._pidfd:
                    self._end()
                for direction, source in (("up", "down"), ("down", "up")):
                    if source in self._ends and self._ends[source].fileno() == descriptor:
                        self._forward(direction, source)
            if self._alarm_s is not None and time.monotonic() >= self._alarm_s:
                self._go_on()

    def _wait(self) -> list[int]:
        poll = select.poll()
        for descriptor in (self._pidfd, *(end.fileno() for end in self._ends.values())):
            poll.register(descriptor, select.POLLIN)
        left_s = None if self._alarm_s is None else max(self._alarm_s - time.monotonic(), 0.0)
        return [descriptor for descriptor, _ in poll.poll(None if left_s is None else left_s * 1000 + 1)]

    def _forward(self, direction: str, source: str) -> None:
        packet = receive(self._ends[source])
        if packet is None:  # its end reaches the other side as it would have, and the worker may live on
            self._release_held()
            for end in self._ends.values():
                with contextlib.suppress(OSError):  # it is shut down
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._ends.clear()
            return
        fault = self._due(direction)
        if fault is not None:
            self._commit(fault, direction, packet)
            return
        self._pass(direction, packet)
        if direction in self._held:
            self._pass(direction, self._held.pop(direction))

    def _due(self, direction: str) -> Fault | None:
        """Count the packet; return the fault if this is the one."""
        if self._orders.see():
            self._packets = dict.fromkeys(DIRECTIONS, 0)
        self._packets[direction] += 1
        fault = self._orders.fault
        if fault is None or (fault.direction, fault.n) != (direction, self._packets[direction]):
            return None
        return fault if self._orders.claim() else None

    def _pass(self, direction: str, packet: Packet) -> None:
        if direction in self._ends:
            packet.send(self._ends[direction])
        packet.close()

    # ---- the faults

    def _commit(self, fault: Fault, direction: str, packet: Packet) -> None:
        match fault.fault:
            case "kill":
                if direction == "up":  # sent is sent; what it did not read before it died it never had
                    self._pass(direction, packet)
                self._worker.kill()
                self._end()
            case "stall" | "pause":
                self._worker.send_signal(signal.SIGSTOP)
                self._pass(direction, packet)
                if fault.fault == "pause":
                    self._alarm_s = time.monotonic() + BRIEFLY_S
            case "truncate":
                self._pass(direction, packet._replace(payload=packet.payload[: len(packet.payload) // 2]))
            case "repeat":
                packet.send(self._ends[direction])
                self._pass(direction, packet)
            case "reorder":
                self._held[direction] = packet
                self._alarm_s = time.monotonic() + BRIEFLY_S
            case "kill-holder":
                self._pass(direction, packet)
                self._holder.signal(signal.SIGKILL)
            case "pause-holder":
                self._holder.signal(signal.SIGSTOP)
                self._pass(direction, packet)
                self._alarm_s = time.monotonic() + BRIEFLY_S
            case _:
                raise ValueError(fault)

    def _go_on(self) -> None:
        """What was stopped for a moment goes on; what was to be overtaken, and was not, follows."""
        self._alarm_s = None
        self._release_held()
        if self._worker.poll() is None:
            self._worker.send_signal(signal.SIGCONT)
        self._holder.signal(signal.SIGCONT)

    def _release_held(self) -> None:
        for direction in list(self._held):
            self._pass(direction, self._held.pop(direction))

    def _end(self) -> NoReturn:
        """Reap the worker, forward all that it had sent, and end as it did."""
        status = self._worker.wait()
        self._go_on()
        while "down" in self._ends and select.select([self._ends["down"]], [], [], 0)[0]:
            packet = receive(self._ends["down"])
            if packet is None:
                break
            self._pass("up", packet)
        if status < 0:
            signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
            os.kill(os.getpid(), -status)
        os._exit(status)


class _Holder:
    """Our parent, known by more than its number, which may become another's."""

    def __init__(self) -> None:
        pid = os.getppid()
        self._pidfd = os.pidfd_open(pid)
        if os.getppid() != pid:
            sys.exit("the holder is gone")

    def signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return  # it is dead


def _inherited(name: str) -> socket.socket:
    descriptor = int(os.environ[name])
    os.set_inheritable(descriptor, False)  # else the worker would hold the holder's channel open
    return socket.socket(fileno=descriptor)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def main() -> None:
    directory, *command = sys.argv[1:]
    relay = Relay(Path(directory), command)
    # The worker has its stderr; ours would keep the pipe open that ends when the worker is ready.
    with (Path(directory) / "relay.log").open("ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    relay.run()


if __name__ == "__main__":
    main()
