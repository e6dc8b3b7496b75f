"""
What the kernel knows and does about one socket: its identity, how it fares, its true reset, who may still connect.

It keeps nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import socket
import struct
from typing import TYPE_CHECKING

from copyover import slots

if TYPE_CHECKING:
    from collections.abc import Iterable

    from copyover.slots import Counters

_SO_COOKIE = 57  # asm-generic/socket.h; socket(7) does not have it yet
_COOKIE, _INT = struct.Struct("Q"), struct.Struct("i")
# As plain numbers: these are asked of thousands of sockets, and an enum costs more than the system call.
_AF_INET, _SOCK_STREAM = int(socket.AF_INET), int(socket.SOCK_STREAM)
_SOL_SOCKET, _SO_PROTOCOL, _IPPROTO_TCP = socket.SOL_SOCKET, socket.SO_PROTOCOL, int(socket.IPPROTO_TCP)
_TCP_INFO = struct.Struct("=B119xQQ")  # state, bytes_acked, bytes_received; linux/tcp.h
_SIOCINQ, _SIOCOUTQ = 0x541B, 0x5411  # tcp(7), Ioctls
_READINGS = 1000  # a client that sends all the time changes the counts between two of them
_SO_NETNS_COOKIE = 71  # Linux 5.14
_TCP_CLOSE = 7
_TCPI_SEGS_IN = 140  # struct tcp_info, linux/tcp.h
_AF_UNSPEC_ADDRESS = struct.pack("=H14x", socket.AF_UNSPEC)
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h. socket(7)
# Classic BPF sees a packet from its TCP header on, for IPv4 and IPv6 alike; byte 13 has the flags.
_DROP_PURE_SYNS = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load byte 13
        (0x54, 0, 0, 0x12),  # keep SYN and ACK of it
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # then drop the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # else take all of it
    )
)


def cookie_of(sock: socket.SocketType) -> int:
    """Return SO_COOKIE: the connection's identity for this boot, equal in every process that holds it."""
    value: int = _COOKIE.unpack(sock.getsockopt(_SOL_SOCKET, _SO_COOKIE, 8))[0]
    return value


def cookie_of_descriptor(descriptor: int) -> int:
    """
    Return the cookie of a borrowed descriptor.

    Raises:
        OSError: it is no socket (ENOTSOCK).

    """
    return cookies_of([descriptor])[0]


def cookies_of(descriptors: Iterable[int]) -> list[int]:
    """
    Return the cookies of borrowed descriptors.

    Raises:
        OSError: one is no socket (ENOTSOCK).

    """
    packed = []
    for descriptor in descriptors:
        borrowed = _borrow(descriptor)
        try:
            packed.append(borrowed.getsockopt(_SOL_SOCKET, _SO_COOKIE, 8))
        finally:
            borrowed.detach()
    return memoryview(b"".join(packed)).cast("Q").tolist()


def _borrow(descriptor: int) -> socket.SocketType:
    """Return an object for a getsockopt or two, to be detached; of socket.socket, half the time is spent on enums."""
    # Family and type given: nothing is asked of the kernel to make this object, and getsockopt needs neither.
    return socket.SocketType(_AF_INET, _SOCK_STREAM, 0, descriptor)


def counters_of(descriptor: int) -> Counters | None:
    """
    Return what applications have read from and written to a borrowed descriptor, by the kernel's account.

    None is a unix socket: nobody counts its bytes. Peers may send and acknowledge meanwhile, so a reading counts if
    what arrived and what was acknowledged is the same before and after the queues were looked at. SO_OOBINLINE has to
    be set: an urgent byte would stop SIOCINQ at its mark.

    Raises:
        OSError: it is no TCP socket, or it never stood still.

    """
    borrowed = _borrow(descriptor)
    try:
        if borrowed.getsockopt(_SOL_SOCKET, _SO_PROTOCOL) != _IPPROTO_TCP:
            if borrowed.getsockopt(_SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_UNIX:
                return None
            raise OSError(errno.EPROTONOSUPPORT, "it is no TCP socket")  # the counts of MPTCP are one subflow's
        before = _tcp_info(borrowed)
        for _ in range(_READINGS):
            unread, unacked = _queued(descriptor, _SIOCINQ), _queued(descriptor, _SIOCOUTQ)
            after = _tcp_info(borrowed)
            if after == before:
                state, acked, arrived = after
                return slots.count(state, acked=acked, arrived=arrived, unread=unread, unacked=unacked)
            before = after
    finally:
        borrowed.detach()
    raise OSError(errno.EAGAIN, "its counts never stood still")


def _tcp_info(sock: socket.SocketType) -> tuple[int, int, int]:
    info = sock.getsockopt(_IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    state, acked, arrived = _TCP_INFO.unpack(info)
    return state, acked, arrived


def _queued(descriptor: int, request: int) -> int:
    value: int = _INT.unpack(fcntl.ioctl(descriptor, request, b"\0\0\0\0"))[0]
    return value


def network_of(sock: socket.socket) -> int | None:
    """Return the cookie of the network namespace in which it was made; None before Linux 5.14."""
    try:
        value: int = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
    except OSError:
        return None
    return value


def plight_of_descriptor(descriptor: int, cookie: int) -> str:
    """
    Say how a borrowed descriptor fares that should be the connection *cookie*: open, closed, dissolved or foreign.

    What an RST, a time-out or both FINs have closed is in no dump of the kernel any more. What our own side has reset
    tells itself apart: dissolving an association forgets that any segment ever came in. tcp_disconnect
    """
    borrowed = socket.socket(fileno=descriptor)
    try:
        if cookie_of(borrowed) != cookie:
            return "foreign"
        if borrowed.family == socket.AF_UNIX:
            return "open"
        info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    finally:
        borrowed.detach()
    if info[0] != _TCP_CLOSE:
        return "open"
    return "closed" if any(info[_TCPI_SEGS_IN : _TCPI_SEGS_IN + 4]) else "dissolved"


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def reset(sock: socket.socket) -> None:
    """
    Send a true RST although others hold the connection too.

    SO_LINGER 0 and close say nothing while a dup lives; dissolving the association does. connect(2), AF_UNSPEC.
    """
    if sock.family == socket.AF_UNIX:
        sock.shutdown(socket.SHUT_RDWR)
    elif _libc().connect(sock.fileno(), _AF_UNSPEC_ADDRESS, len(_AF_UNSPEC_ADDRESS)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def reset_and_close(descriptor: int) -> None:
    """Tell the peer of a descriptor of ours with a true RST, and close it."""
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(OSError):
        reset(sock)  # it fails where the peer's own reset came first


def drop_new_clients(listener: socket.socket) -> None:
    """
    Let nobody begin a handshake with a TCP listener; whoever is in the backlog, or has begun, still comes to accept.

    It holds for all who have the socket. socket(7), SO_ATTACH_FILTER
    """
    program = ctypes.create_string_buffer(_DROP_PURE_SYNS, len(_DROP_PURE_SYNS))
    count = len(_DROP_PURE_SYNS) // 8
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", count, ctypes.addressof(program)))


def drops_new_clients(listener: socket.socket) -> bool:
    """Whether drop_new_clients was called, by anybody who has the socket. socket(7), SO_GET_FILTER"""
    return bool(listener.getsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, 1024))


def take_new_clients(listener: socket.socket) -> None:
    """Undo drop_new_clients."""
    listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def place_of_descriptor(descriptor: int) -> tuple[int, int]:
    """Return the family of a borrowed descriptor, and our port; 0 for a unix socket."""
    sock = socket.socket(fileno=descriptor)
    try:
        name = sock.getsockname()
        return int(sock.family), name[1] if isinstance(name, tuple) else 0
    finally:
        sock.detach()


def connect_unix(sock: socket.socket, path: str, *, patience_s: float | None) -> None:
    """
    Connect, waiting while the listener's backlog is full; then *sock* has that time-out for everything.

    A socket that does not block is refused at once instead. unix(7), EAGAIN; socket(7), SO_SNDTIMEO.

    Raises:
        TimeoutError: the backlog stayed full for *patience_s* seconds.

    """
    if patience_s is not None:
        limit = struct.pack("ll", int(patience_s), int(patience_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    try:
        sock.connect(path)
    except BlockingIOError as full:
        raise TimeoutError(f"{path} lets nobody in") from full
    sock.settimeout(patience_s)


def peer_of_descriptor(descriptor: int) -> str | None:
    """Return the peer's address of a borrowed descriptor in words; None when it has gone already."""
    sock = socket.socket(fileno=descriptor)
    try:
        peer = sock.getpeername()
    except OSError:
        return None
    finally:
        sock.detach()
    if isinstance(peer, tuple):
        return f"[{peer[0]}]:{peer[1]}" if ":" in str(peer[0]) else f"{peer[0]}:{peer[1]}"
    return str(peer) or "unix"
