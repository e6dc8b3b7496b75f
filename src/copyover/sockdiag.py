"""
The kernel's own account of sockets, by netlink: the only room that loads pyroute2.

It judges nothing. It belongs into short-lived processes: pyroute2 costs 110 ms and 24 MiB, and no running event loop
may be around it.

See sock_diag(7); linux/inet_diag.h, linux/unix_diag.h, linux/tcp.h.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import NETLINK_SOCK_DIAG, NLM_F_DUMP, NLM_F_MULTI, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, inet_diag_req, unix_diag_req
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nlsocket import Marshal, NetlinkSocket

from copyover.comparison import Socket, State
from copyover.errors import AuditImpossible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STATES = sum(1 << state for state in State)
_SHOW_NAME, _SHOW_QUEUE = 0x01, 0x10
_INFO, _NAME, _QUEUE, _SHUTDOWN = 2, 0, 4, 6  # INET_DIAG_INFO, UNIX_DIAG_NAME, _RQLEN, _SHUTDOWN
_RECEIVED_AND_ACKED = 120  # tcpi_bytes_acked, tcpi_bytes_received. struct tcp_info
# A unix socket stays ESTABLISHED until it is closed: which directions are shut tells what TCP's states tell.
_UNIX_STATES = {0: State.ESTABLISHED, 1: State.CLOSE_WAIT, 2: State.FIN_WAIT2, 3: State.CLOSING}

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=i")
_PAIR = struct.Struct("=II")
_COUNTERS = struct.Struct("=QQ")
_INET = struct.Struct("=BB2xH2x16s16x4xII4xII4xI")  # struct inet_diag_msg
_UNIX = struct.Struct("=BBBxIII")  # struct unix_diag_msg


def dump(places: Iterable[tuple[int, int]]) -> dict[int, Socket]:
    """
    Return the sockets of each family and local port of *places* by their cookies; port 0 is any.

    Raises:
        AuditImpossible: the kernel does not answer.

    """
    found: dict[int, Socket] = {}
    try:
        with NetlinkSocket(NETLINK_SOCK_DIAG) as netlink:
            netlink.set_marshal(Rows())
            for family, port in places:
                request = _unix_request() if family == socket.AF_UNIX else _inet_request(family, port)
                answer = netlink.nlm_request(request, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP)
                found |= {row.cookie: row for message in answer for row in message["rows"]}
    except (OSError, NetlinkError) as problem:
        raise AuditImpossible(
            f"the kernel does not tell its sockets (sock_diag): {problem}; is AF_NETLINK forbidden to this process, "
            f"or the kernel without tcp_diag and unix_diag?"
        ) from problem
    return found


def _inet_request(family: int, port: int) -> Any:
    request = inet_diag_req()
    request["sdiag_family"] = family
    request["sdiag_protocol"] = socket.IPPROTO_TCP
    request["idiag_ext"] = 1 << (_INFO - 1)
    request["idiag_states"] = _STATES
    request["idiag_sport"] = port
    return request


def _unix_request() -> Any:
    request = unix_diag_req()
    request["sdiag_family"] = socket.AF_UNIX
    request["udiag_states"] = _STATES
    request["udiag_show"] = _SHOW_NAME | _SHOW_QUEUE
    return request


class Rows(Marshal):  # type: ignore[misc]  # pyroute2 has no types
    """Unpacks a whole datagram at once, 3 µs a row; pyroute2's own makes an object of each field, 75 µs."""

    def parse(
        self,
        data: bytes,
        seq: int | None = None,  # noqa: ARG002  # the signature is pyroute2's
        callback: object = None,  # noqa: ARG002
        skip_alien_seq: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> Iterator[dict[str, Any]]:
        rows: list[Socket] = []
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
            end = offset + length
            if kind == SOCK_DIAG_BY_FAMILY:
                rows.append(_row(data, offset + _HEADER.size, end))
            elif kind in (NLMSG_DONE, NLMSG_ERROR):  # both carry an errno, negative, or 0
                yield _message(rows)
                yield _message([], kind=NLMSG_DONE, code=-_CODE.unpack_from(data, offset + _HEADER.size)[0])
                return
            offset = _aligned(max(end, offset + _HEADER.size))
        yield _message(rows)


def _message(rows: list[Socket], *, kind: int = SOCK_DIAG_BY_FAMILY, code: int = 0) -> dict[str, Any]:
    """Return what pyroute2 takes for a message."""
    header = {"type": kind, "flags": NLM_F_MULTI, "error": NetlinkError(code) if code > 0 else None}
    return {"header": header, "rows": rows}


def _row(data: bytes, start: int, end: int) -> Socket:
    return _unix_row(data, start, end) if data[start] == socket.AF_UNIX else _inet_row(data, start, end)


def _inet_row(data: bytes, start: int, end: int) -> Socket:
    family, state, port, local, low, high, queue, limit, inode = _INET.unpack_from(data, start)
    received = acked = 0
    offset = start + _INET.size
    while offset < end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if kind == _INFO:
            acked, received = _COUNTERS.unpack_from(data, offset + _ATTRIBUTE.size + _RECEIVED_AND_ACKED)
            break
        offset = _aligned(offset + length)
    return Socket(low | high << 32, family, state, inode, socket.ntohs(port), local, received, acked, queue, limit)


def _unix_row(data: bytes, start: int, end: int) -> Socket:
    family, _, state, inode, low, high = _UNIX.unpack_from(data, start)
    name = b""
    queue = limit = 0
    offset = start + _UNIX.size
    while offset < end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        value = offset + _ATTRIBUTE.size
        if kind == _NAME:
            name = data[value : offset + length]
        elif kind == _QUEUE:
            queue, limit = _PAIR.unpack_from(data, value)
        elif kind == _SHUTDOWN and state == State.ESTABLISHED:
            state = _UNIX_STATES[data[value] & 3]
        offset = _aligned(offset + length)
    return Socket(low | high << 32, family, state, inode, 0, name, 0, 0, queue, limit)


def _aligned(offset: int) -> int:
    return (offset + 3) & ~3
