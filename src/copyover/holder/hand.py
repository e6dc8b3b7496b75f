"""
One worker process as the holder sees it: its channel, its pidfd and its stderr.

It starts, greets and quotes it; when it is read and buried is decided in crew.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import platform
import select
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import copyover
from copyover import directory as directories
from copyover import messages, process, succession, wire
from copyover.channel import Channel, pair
from copyover.errors import ChangeRefused, ChannelClosed, WireError
from copyover.holder.recovery import SlotFile
from copyover.sockets import cookies_of

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from copyover.channel import Packet
    from copyover.directory import Directory
    from copyover.listeners import Listener
    from copyover.release import Release
    from copyover.users import User

log = logging.getLogger("copyover.holder")

TAIL_LINES = 50
_LONGEST_LINE = 2000


class Tail:
    """What a child writes to stderr, a worker until it is ready: passed on, and the last lines kept."""

    def __init__(self, descriptor: int, partial: bytes = b"") -> None:
        self._descriptor = descriptor
        self._partial = partial
        self.lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> bool:
        """Read what is there; False once the worker has closed it."""
        try:
            data = os.read(self._descriptor, 64 << 10)
        except BlockingIOError:
            return True
        with contextlib.suppress(OSError):  # our own stderr may be gone; the tail is kept all the same
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data and self._partial:
            lines, self._partial = [self._partial], b""
        self.lines.extend(line[:_LONGEST_LINE].decode(errors="replace") for line in lines)
        return bool(data)

    def left(self) -> succession.Tail:
        return succession.Tail(descriptor=self._descriptor, partial=self._partial)

    def drain(self) -> None:
        """Read what the pipe holds now; a forked child may keep it open."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while poll.poll(0) and self.read():
            continue

    def close(self) -> None:
        os.close(self._descriptor)


class Hand:
    """One worker process. *tail* is None once it is ready."""

    def __init__(
        self,
        worker: int,
        generation: int,
        release: Release,
        *,
        child: process.Child,
        channel: Channel,
        slots: SlotFile,
        tail: Tail | None,
        started_s: float,
    ) -> None:
        """*slots* is this object's from here on, and removed with it."""
        self.worker = worker
        self.generation = generation
        self.release = release
        self.child = child
        self.channel = channel
        self.slots = slots
        self.tail = tail
        self.lines = tail.lines if tail is not None else collections.deque[str](maxlen=TAIL_LINES)
        self.started_s = started_s
        self.hello: messages.Hello | None = None
        self.ready: messages.Ready | None = None
        self.is_unreapable = False  # it was killed, and does not die
        self.heard_s = 0.0  # when something last came from it

    @classmethod
    def start(
        cls,
        worker: int,
        generation: int,
        release: Release,
        environment: dict[str, str],
        *,
        slots: SlotFile,
        user: User | None,
    ) -> Hand:
        """
        Start the process, as *user* if one is given.

        Raises:
            PythonNotFound: the release's interpreter or directory is gone.
            PermissionRefused: this user may not.

        """
        ours, theirs = pair()
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write_end, True)
        real_stderr = os.dup(2)
        own = {
            "COPYOVER_CHANNEL": str(theirs.fileno()),
            "COPYOVER_STDERR": str(real_stderr),
            "COPYOVER_WORKER": str(worker),
            "COPYOVER_SLOTS": str(slots.fileno()),
        }
        try:
            child = process.spawn(
                release.command,
                cwd=release.directory,
                env=environment | own | ({} if user is None else user.environment),
                inherit=(theirs.fileno(), real_stderr, slots.fileno()),
                stderr=write_end,
                user=user,
            )
        except BaseException:
            ours.close()
            os.close(read_end)
            slots.remove()
            raise
        finally:
            theirs.close()
            os.close(real_stderr)
            os.close(write_end)
        return cls(
            worker,
            generation,
            release,
            child=child,
            channel=Channel(ours),
            slots=slots,
            tail=Tail(read_end),
            started_s=time.monotonic(),
        )

    # ---- succession

    def left(self) -> succession.Hand:
        """Return what the successor needs to know of it."""
        return succession.Hand(
            worker=self.worker,
            generation=self.generation,
            pid=self.pid,
            pidfd=self.child.fileno(),
            channel=self.channel.fileno(),
            slots=self.slots.fileno(),
            slots_path=str(self.slots.path),
            wire=self.channel.version,
            started_s=self.started_s,
            hello=self.hello,
            tail=None if self.tail is None else self.tail.left(),
            lines=list(self.lines),
        )

    @classmethod
    def inherit(cls, left: succession.Hand, release: Release, ready: messages.Ready | None) -> Hand:
        """Take the worker of a predecessor over; *ready* is what it said of itself."""
        hand = cls(
            left.worker,
            left.generation,
            release,
            child=process.Child(left.pid, left.pidfd),
            channel=Channel(socket.socket(fileno=left.channel)),
            slots=SlotFile(Path(left.slots_path), left.slots),
            tail=None if left.tail is None else Tail(left.tail.descriptor, left.tail.partial),
            started_s=left.started_s,
        )
        hand.hello, hand.ready = left.hello, ready
        hand.lines.extend(left.lines)
        if hand.hello is not None:
            hand.channel.version = left.wire
        return hand

    # ---- what it is told, and what is told of it

    @property
    def pid(self) -> int:
        return self.child.pid

    def welcome(
        self,
        hello: messages.Hello,
        listeners: Mapping[int, Listener],
        names: Mapping[int, str],
        options: dict[str, Any],
    ) -> None:
        """
        Answer its hello with what it is to run, the *listeners* to accept from, and the *names* of these and others.

        Raises:
            ChangeRefused: it speaks no wire or record version of ours.

        """
        version = wire.common_version(hello.wire)
        if version is None or wire.common_version(hello.record, wire.RECORD_VERSIONS) is None:
            raise ChangeRefused(
                f"{self.release.python} has copyover {hello.copyover}, which speaks wire {hello.wire} and record "
                f"{hello.record}; this holder has copyover {copyover.__version__} with wire {list(wire.WIRE_VERSIONS)} "
                f"and record {list(wire.RECORD_VERSIONS)}; install a version that both speak: {self._pip_command()}"
            )
        self.hello = hello
        self.channel.version = version
        self.channel.send(
            messages.Welcome(
                wire=version,
                generation=self.generation,
                names={str(number): name for number, name in names.items()},
                application=self.release.application,
                app_dir=self.release.app_dir,
                options=options,
                listener=tuple(listeners),
            ),
            [listener.socket.fileno() for listener in listeners.values()],
        )

    def _pip_command(self) -> str:
        return f"{self.release.python} -m pip install copyover=={copyover.__version__}"

    def in_words(self, how: str) -> str:
        """Say what its end means: for the log and for whoever waits for a reload."""
        who = f"worker {self.worker} (pid {self.pid}, generation {self.generation})"
        if self.hello is None and any("No module named" in line and "copyover" in line for line in self.lines):
            return (
                f"{self.release.python} does not have copyover; this holder has {copyover.__version__} on Python "
                f"{platform.python_version()}: {self._pip_command()}"
            )
        if self.hello is None:
            return f"{who} {how} before it said hello; its interpreter is {self.release.python}"
        if self.ready is None:
            return f"{who} {how} before it was ready"
        return f"{who} {how}"

    def remaining(self) -> list[Packet]:
        """Read the channel of a dead worker to its end: what it had sent still counts."""
        packets = []
        while True:
            try:
                packets.append(self.channel.receive())
            except (BlockingIOError, ChannelClosed):
                # A forked child may hold the other end open: an empty channel of a dead worker is its end.
                return packets
            except WireError:
                continue  # the packet that it died in the middle of; nothing of it was used

    def close(self) -> None:
        self.channel.close()
        self.drop_tail()
        self.slots.remove()

    def drop_tail(self) -> None:
        if self.tail is not None:
            self.tail.close()
            self.tail = None


def check_lend(message: messages.Lend, descriptors: Sequence[int], *, listeners: Container[int]) -> None:
    """
    See that each lent descriptor is the connection that it is said to be, of a listener that there is.

    Raises:
        WireError: it is another, or no socket at all.

    """
    for number in set(message.listener):
        if number not in listeners:
            raise WireError(f"a lent connection is of listener {number}, which there never was")
    check_cookies(message.cookie, descriptors)


def check_cookies(cookies: Sequence[int], descriptors: Sequence[int]) -> None:
    """
    See that each descriptor is the connection that it is said to be.

    Raises:
        WireError: it is another, or no socket at all.

    """
    try:
        found = cookies_of(descriptors)
    except OSError as problem:
        raise WireError("a lent descriptor is no socket") from problem
    for cookie, truth in zip(cookies, found, strict=True):
        if truth != cookie:
            raise WireError(f"a lent descriptor is connection {truth}, not {cookie}")


def environment(directory: Directory, instance: str) -> dict[str, str]:
    """Return the environment of workers: ours, without what the service manager meant for us alone."""
    own = {
        "COPYOVER_INSTANCE": instance,
        "COPYOVER_WORKERS": str(directory.workers),
        "COPYOVER_KEY": directories.read_key(directory),
    }
    private = {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
    return {name: value for name, value in os.environ.items() if name not in private} | own


def notify(state: str) -> None:
    """Tell the service manager, where there is one. sd_notify(3)"""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)
        try:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(state.encode())
        except OSError as problem:  # it is told for its own sake; we serve all the same
            log.warning("event=not-notified address=%s problem=%r", address, str(problem))
