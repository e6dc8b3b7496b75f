"""
How a holder takes over from one that died: it hears all workers that live, and becomes theirs.

What their reports mean together is decided in reunion. Nothing is bound that they have bound already.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import select
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

import attrs

from copyover import directory as directories
from copyover import events, messages, process, reunion, wire
from copyover.channel import Channel
from copyover.errors import ChannelClosed, WireError
from copyover.holder.hand import Hand, check_cookies
from copyover.holder.recovery import SlotFile, is_current
from copyover.release import Release
from copyover.sockets import connect_unix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from copyover.channel import Packet
    from copyover.directory import Directory
    from copyover.users import User

log = logging.getLogger("copyover.holder")

PATIENCE_S = 10.0  # for workers to report; who has not by then is killed
REAP_S = 10.0


@attrs.define(eq=False)
class Arrival:
    """One worker of the dead holder, as far as it has come."""

    pid: int
    pidfd: int
    file: Path
    channel: Channel | None = None
    hello: messages.Hello | None = None
    attach: messages.Attach | None = None
    rows: list[events.Row] = attrs.field(factory=list)
    tombstones: Sequence[int] = ()
    listeners: dict[int, int] = attrs.field(factory=dict)  # descriptors, by number
    is_complete: bool = False
    is_dead: bool = False

    def fileno(self) -> int:
        return self.pidfd


class Gathering:
    """Waits until every registered worker has reported, or is dead."""

    def __init__(self, directory: Directory, workers: Mapping[Path, int], user: User | None) -> None:
        self._directory = directory
        self._key = directories.read_key(directory)
        self._expected = {pid: arrival for path, pid in workers.items() if (arrival := _expect(path, pid))}
        self._door = _open_door(directory, user)
        self._poll = select.poll()
        self._poll.register(self._door, select.POLLIN)
        for arrival in self._expected.values():
            self._poll.register(arrival, select.POLLIN)

    def wait(self) -> list[Arrival]:
        """Return those that have reported; the others are dead, some of them by our hand."""
        self._wait_until(time.monotonic() + PATIENCE_S)
        for late in self._missing():
            log.warning("event=stalled pid=%d problem=%r", late.pid, f"it did not report within {PATIENCE_S:g} s")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(late.pidfd, signal.SIGKILL)
        self._wait_until(time.monotonic() + REAP_S)
        for stuck in self._missing():
            log.error("event=unreapable pid=%d problem=%r", stuck.pid, "SIGKILL does not end it; its connections stay")
        self._door.close()
        self._directory.workers.unlink(missing_ok=True)
        return [arrival for arrival in self._expected.values() if arrival.is_complete]

    def _missing(self) -> list[Arrival]:
        return [arrival for arrival in self._expected.values() if not (arrival.is_complete or arrival.is_dead)]

    def _wait_until(self, deadline_s: float) -> None:
        while self._missing():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            for descriptor, _ in self._poll.poll(left_s * 1000):
                self._look_at(descriptor)

    def _look_at(self, descriptor: int) -> None:
        if descriptor == self._door.fileno():
            self._let_in()
            return
        for arrival in self._expected.values():
            if descriptor == arrival.pidfd:
                self._poll.unregister(descriptor)
                arrival.is_dead = not arrival.is_complete  # else its death is the crew's business
                if arrival.is_dead and arrival.channel is not None:
                    self._turn_away(arrival, arrival.channel)
                return
            if arrival.channel is not None and descriptor == arrival.channel.fileno():
                self._hear(arrival, arrival.channel)
                return

    def _let_in(self) -> None:
        """Only the workers that are registered here are let in, each once."""
        try:
            sock, _ = self._door.accept()
        except OSError:  # it has gone again
            return
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        arrival = self._expected.get(pid)
        if arrival is None or arrival.channel is not None or arrival.is_dead:
            log.warning("event=refused pid=%d uid=%d problem=%r", pid, uid, "it is no worker that is waited for")
            sock.close()
            return
        arrival.channel = Channel(sock)
        self._poll.register(sock, select.POLLIN)

    def _hear(self, arrival: Arrival, channel: Channel) -> None:
        try:
            while not arrival.is_complete:
                with channel.receive() as packet:
                    self._take(arrival, channel, packet)
        except BlockingIOError:
            return
        except WireError as problem:
            if not isinstance(problem, ChannelClosed):
                log.error("event=refused pid=%d problem=%r", arrival.pid, str(problem))  # noqa: TRY400  # a sentence
            self._turn_away(arrival, channel)
        else:
            self._poll.unregister(channel)

    def _turn_away(self, arrival: Arrival, channel: Channel) -> None:
        """It may come again; what it has brought so far is of no use."""
        self._poll.unregister(channel)
        channel.close()
        for row in arrival.rows:
            os.close(row.descriptor)
        for descriptor in arrival.listeners.values():
            os.close(descriptor)
        arrival.channel = arrival.hello = arrival.attach = None
        arrival.rows, arrival.listeners = [], {}

    def _take(self, arrival: Arrival, channel: Channel, packet: Packet) -> None:
        """
        Take one message of a worker that comes.

        Raises:
            WireError: it is not the next of a report, or what came with it is not what it says.

        """
        message = packet.message
        if arrival.hello is None:
            arrival.hello = messages.expect(message, messages.Hello)
            version = wire.common_version(arrival.hello.wire)
            if version is None or wire.common_version(arrival.hello.record, wire.RECORD_VERSIONS) is None:
                raise WireError(f"copyover {arrival.hello.copyover} and this holder speak no common version")
            channel.version = version
            channel.send(messages.Recall(wire=version))
        elif arrival.attach is None:
            attach = messages.expect(message, messages.Attach)
            if not hmac.compare_digest(attach.key.encode(), self._key.encode()):
                raise WireError("it does not know the key of this name")
            if not all(number.isdecimal() and type(name) is str for number, name in attach.names.items()):
                raise WireError("its listeners are not named by their numbers")
            arrival.attach, arrival.listeners = attach, dict(zip(attach.listener, packet.take(), strict=True))
        elif isinstance(message, messages.View):
            arrival.rows += _rows(message, packet)
        else:
            arrival.tombstones = messages.expect(message, messages.Viewed).cookie
            arrival.is_complete = True


def _open_door(directory: Directory, user: User | None) -> socket.socket:
    directory.workers.unlink(missing_ok=True)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        door.bind(str(directory.workers))
    finally:
        os.umask(before)
    if user is not None:
        os.chown(directory.workers, user.uid, -1)
    door.listen(64)
    door.setblocking(False)
    return door


def _expect(path: Path, pid: int) -> Arrival | None:
    """Return the worker of a file; None if it has died meanwhile, and its number may be another's."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if directories.registered_pid(path) == pid:
        return Arrival(pid, pidfd, path)
    os.close(pidfd)
    return None


def _rows(view: messages.View, packet: Packet) -> list[events.Row]:
    """
    Return what a view says, with its descriptors.

    Raises:
        WireError: a descriptor is another connection, or a worker does what there is no number for.

    """
    check_cookies(view.cookie, packet.descriptors)
    if not set(view.standing) <= set(messages.Doing):
        raise WireError(f"it does {max(view.standing)} with a connection")
    if not set(view.kind) <= set(messages.Kind):
        raise WireError(f"it serves a connection as {max(view.kind)}")
    columns = zip(view.cookie, view.epoch, view.listener, view.standing, view.records(), packet.take(), strict=True)
    return [
        events.Row(cookie, epoch, listener, messages.Doing(doing), record, _is_current(doing, record, fd), fd)
        for cookie, epoch, listener, doing, record, fd in columns
    ]


def _is_current(doing: int, record: messages.Record, descriptor: int) -> bool:
    return doing == messages.Doing.SERVES or is_current(descriptor, record)


# ---- what comes of it


@attrs.frozen
class Inheritance:
    """
    What the workers of the dead holder brought: themselves, their reports, and the listeners.

    *names* has all listeners that any of them knows, *serving* the numbers of those that the serving generation has.
    """

    instance: str
    hands: list[Hand]
    releases: dict[int, Release]  # by generation
    reports: list[events.Report]
    listeners: dict[int, socket.socket]
    names: dict[int, str]
    serving: set[int]


def gather(directory: Directory, user: User | None) -> Inheritance | None:
    """
    Hear the workers that the last holder of the name has left; None if none of them lives.

    Their files tell who is to be waited for. The lock of the name must be held.
    """
    registered = directories.registered(directory)
    living = {path: pid for path, pid in registered.items() if pid}
    arrivals = Gathering(directory, living, user).wait() if living else []
    for path in set(registered) - {arrival.file for arrival in arrivals}:
        path.unlink(missing_ok=True)
    if not arrivals:
        return None
    found: dict[int, socket.socket] = {}
    names: dict[int, str] = {}
    hands, reports = [], []
    releases: dict[int, Release] = {}
    for arrival in arrivals:
        hand, report = _made_of(arrival)
        hands.append(hand)
        reports.append(report)
        releases[hand.generation] = hand.release
        names |= _names(arrival)
        for number, descriptor in arrival.listeners.items():
            if number in found:
                os.close(descriptor)
            else:
                found[number] = socket.socket(fileno=descriptor)
    instance = hands[0].hello.instance if hands[0].hello else ""
    generation = reunion.find(reports).serving
    serving = {
        number
        for hand, arrival in zip(hands, arrivals, strict=True)
        if hand.generation == generation
        for number in arrival.listeners
    }
    return Inheritance(instance, hands, releases, reports, found, names, serving)


def _names(arrival: Arrival) -> dict[int, str]:
    return {} if arrival.attach is None else {int(number): name for number, name in arrival.attach.names.items()}


def _made_of(arrival: Arrival) -> tuple[Hand, events.Report]:
    hello, attach, channel = arrival.hello, arrival.attach, arrival.channel
    if hello is None or attach is None or channel is None:
        raise AssertionError("an arrival is complete")
    ready = messages.Ready(
        application=attach.application,
        loop=attach.loop,
        writes=attach.writes,
        reads=attach.reads,
        shares=attach.shares,
        interface=attach.interface,
    )
    hand = Hand(
        hello.worker,
        attach.generation,
        Release(attach.directory, attach.python, attach.application, attach.app_dir),
        child=process.Child(arrival.pid, arrival.pidfd),
        channel=channel,
        slots=SlotFile(arrival.file, os.open(arrival.file, os.O_RDWR | os.O_CLOEXEC)),
        tail=None,
        started_s=time.monotonic(),
    )
    hand.hello, hand.ready = hello, ready
    report = events.Report(
        hello.worker,
        attach.generation,
        ready,
        attach.is_committed,
        attach.is_leaving,
        arrival.rows,
        arrival.tombstones,
        frozenset(_names(arrival)),
    )
    return hand, report


# ---- a holder that lives and does nothing


def end_stalled(directory: Directory, pid: int) -> bool:
    """
    Kill the holder of the name if it answers nothing, and wait for its end; True if it is gone.

    It is never bypassed: while it lives it may wake up, and both would serve.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        try:
            connect_unix(asked, str(directory.control), patience_s=PATIENCE_S)
            credentials = struct.unpack("3i", asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            asked.sendall(b'{"do": "ping"}\n')
            if credentials[0] != pid or asked.recv(1):
                return False
        except TimeoutError:
            pass  # it is stalled
        except OSError:
            return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, pidfd)
        log.warning("event=stalled pid=%d problem=%r", pid, f"the holder answered nothing for {PATIENCE_S:g} s; killed")
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(REAP_S * 1000))
