"""
How packets with descriptors cross a unix socket: the only sendmsg and recvmsg of the project.

It decides nothing about what they mean, and it never blocks.

SEQPACKET, not STREAM: a stream may merge a plain message with the next one, whose descriptors then arrive with the
wrong bytes. unix(7), BUGS.
"""

from __future__ import annotations

import array
import collections
import enum
import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Self

import attrs

from copyover import messages, wire
from copyover.errors import ChannelClosed, TruncatedPacket, WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

MAX_PACKET_BYTES = 64 << 10  # larger bodies travel in a memfd
_BUFFER_BYTES = 4 << 20  # the default queues 13 packets of 16 KiB
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MFD_NOEXEC_SEAL = 8  # Linux 6.3; older kernels answer EINVAL. memfd_create(2)
_ANCILLARY_BYTES = socket.CMSG_SPACE((messages.MAX_DESCRIPTORS + 1) * array.array("i").itemsize)
# ETOOMANYREFS: more descriptors of this user are in flight than its soft NOFILE. unix(7)
_SCARCITY = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_CTRUNC, _TRUNC = int(socket.MSG_CTRUNC), int(socket.MSG_TRUNC)  # an enum's & takes longer than the recvmsg
RETRY_S = 0.02


class Backlog(enum.Enum):
    """Whether packets wait, and for what."""

    NONE = enum.auto()
    FULL = enum.auto()  # the peer has to read: writability tells
    SCARCE = enum.auto()  # the kernel is out of something else: it calls the socket writable all the while


@attrs.define
class Packet:
    """
    One message with the descriptors that came with it.

    The receiver owns the descriptors until it takes them: use the packet in a ``with`` block.
    """

    message: messages.Message
    descriptors: list[int]

    def take(self) -> list[int]:
        """Hand the descriptors over to the caller."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_all(self.descriptors)
        self.descriptors = []


@attrs.define(eq=False)
class _Outgoing:
    payload: bytes
    descriptors: Sequence[int]
    owned: list[int]  # those among them that are closed once the packet is sent
    on_sent: Callable[[], None] | None

    def own(self) -> None:
        """Wait with dups: what was borrowed may be closed meanwhile."""
        if len(self.owned) < len(self.descriptors):
            dups = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0) for descriptor in self.descriptors]
            close_all(self.owned)
            self.descriptors = self.owned = dups


class Channel:
    """
    One end of a SEQPACKET socket.

    Packets leave in the order in which they were sent; those that the kernel does not take at once wait here.
    *on_backlog* is called when that begins, changes and ends: its owner flushes once the socket is writable while the
    backlog is FULL, and after RETRY_S each time that it is said to be SCARCE.
    """

    def __init__(self, sock: socket.socket, on_backlog: Callable[[Backlog], None] = lambda _: None) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._socket = sock
        self._queue: collections.deque[_Outgoing] = collections.deque()
        self._backlog = Backlog.NONE
        self.on_backlog = on_backlog
        self.version = wire.WIRE_VERSIONS[1]

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_backlog(self) -> bool:
        return bool(self._queue)

    def send(
        self,
        message: messages.Message,
        descriptors: Sequence[int] = (),
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """
        Send *message*, or queue it; *on_sent* is called once the kernel has it, or the channel is closed.

        The descriptors are borrowed for the call only: a packet that has to wait gets dups of its own, because a
        connection may end meanwhile and its number may become another's.

        Raises:
            ChannelClosed: the peer is gone.

        """
        header, body = wire.encode(message, descriptors=len(descriptors), version=self.version)
        if len(body) <= MAX_PACKET_BYTES:
            outgoing = _Outgoing(header.pack() + body, descriptors, [], on_sent)
        else:
            memfd = sealed_memfd(body)
            payload = attrs.evolve(header, flags=header.flags | wire.FLAG_MEMFD).pack()
            outgoing = _Outgoing(payload, [*descriptors, memfd], [memfd], on_sent)
        self._queue.append(outgoing)
        if self._backlog is Backlog.NONE:
            self.flush()
        else:
            outgoing.own()

    def flush(self) -> None:
        """
        Send what waits, as far as the kernel takes it.

        Raises:
            ChannelClosed: the peer is gone.

        """
        while self._queue:
            outgoing = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", outgoing.descriptors))]
            try:
                self._socket.sendmsg([outgoing.payload], rights if outgoing.descriptors else [], socket.MSG_NOSIGNAL)
            except OSError as problem:
                if problem.errno != errno.EAGAIN and problem.errno not in _SCARCITY:
                    raise ChannelClosed(f"the peer of the channel is gone: {problem}") from problem
                self._wait(Backlog.FULL if problem.errno == errno.EAGAIN else Backlog.SCARCE)
                return
            self._queue.popleft()
            close_all(outgoing.owned)
            if outgoing.on_sent is not None:
                outgoing.on_sent()
        if self._backlog is not Backlog.NONE:
            self._backlog = Backlog.NONE
            self.on_backlog(self._backlog)

    def _wait(self, backlog: Backlog) -> None:
        for waiting in self._queue:
            waiting.own()
        is_news = backlog is not self._backlog or backlog is Backlog.SCARCE
        self._backlog = backlog
        if is_news:
            self.on_backlog(backlog)

    def receive(self) -> Packet:
        """
        Return the next packet.

        Raises:
            BlockingIOError: none has come.
            ChannelClosed: the peer closed its end, and all that it had sent is read.
            TruncatedPacket: the kernel dropped descriptors; those that did arrive are closed.
            WireError: the packet is not one of the protocol; its descriptors are closed.

        See unix(7), SCM_RIGHTS; recvmsg(2), MSG_CMSG_CLOEXEC.
        """
        size = wire.HEADER.size + MAX_PACKET_BYTES
        try:
            payload, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as problem:
            raise ChannelClosed(f"the peer of the channel is gone: {problem}") from problem
        descriptors = _descriptors_of(ancillary)
        try:
            _check_flags(flags, len(descriptors))
            return _open_packet(payload, descriptors)
        except WireError:
            close_all(descriptors)
            raise

    def close(self) -> None:
        """Close our end. Nobody takes what is queued any more: what waited for its *on_sent* goes on."""
        self._socket.close()
        queue, self._queue = self._queue, collections.deque()
        for outgoing in queue:
            close_all(outgoing.owned)
            if outgoing.on_sent is not None:
                outgoing.on_sent()


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new channel, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _check_flags(flags: int, arrived: int) -> None:
    if flags & _CTRUNC:
        raise TruncatedPacket(f"the kernel dropped descriptors of a packet; {arrived} arrived")
    if flags & _TRUNC:
        raise WireError(f"a packet is longer than {MAX_PACKET_BYTES} bytes and its header")


def _open_packet(payload: bytes, descriptors: list[int]) -> Packet:
    if not payload:
        raise ChannelClosed("the peer closed the channel")
    header = wire.decode_header(payload)
    claimed = header.descriptors + header.has_memfd
    if len(descriptors) != claimed:
        raise WireError(f"a packet claims {claimed} descriptors and came with {len(descriptors)}")
    if not header.has_memfd:
        return Packet(wire.decode(header, memoryview(payload)[wire.HEADER.size :]), descriptors)
    if len(payload) != wire.HEADER.size:
        raise WireError(f"a packet has {len(payload)} bytes and its body in a memfd")
    message = wire.decode(header, read_memfd(descriptors[-1]))
    os.close(descriptors.pop())
    return Packet(message, descriptors)


def sealed_memfd(body: bytes) -> int:
    """Return a new memfd with *body*, which nobody can change any more."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        memfd = os.memfd_create("copyover", flags | _MFD_NOEXEC_SEAL)
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
        memfd = os.memfd_create("copyover", flags)
    with memoryview(body) as view:
        written = 0
        while written < len(view):
            written += os.write(memfd, view[written:])
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    return memfd


def read_memfd(memfd: int) -> bytes:
    """
    Return what a borrowed memfd holds.

    Raises:
        WireError: it is none, it is not sealed, it is empty or too large.

    """
    try:
        seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    except OSError as problem:
        raise WireError("the descriptor that should hold a packet's body is no memfd") from problem
    # Unsealed, the sender could change or shrink it while it is read. memfd_create(2), file sealing
    if seals & _SEALS != _SEALS:
        raise WireError("the memfd that holds a packet's body is not sealed")
    size = os.fstat(memfd).st_size
    if not 0 < size <= wire.MAX_BODY_BYTES:
        raise WireError(f"a packet's body of {size} bytes is not between 1 and {wire.MAX_BODY_BYTES}")
    return os.pread(memfd, size, 0)  # mapped, each of its pages would be a fault


def _descriptors_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return descriptors.tolist()


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
