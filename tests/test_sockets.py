"""What the kernel knows of one socket: how far applications came on it, in every state that it can be in."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from copyover.slots import Counters, TcpState
from copyover.sockets import counters_of, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A client and the accepted socket of its connection."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname(), timeout=30)
        accepted, _ = listener.accept()
    accepted.settimeout(30)
    with client, accepted:
        yield client, accepted


def fill(sender: socket.socket) -> int:
    """Send until the kernel takes no more."""
    sender.setblocking(False)
    sent = 0
    try:
        while True:
            sent += sender.send(bytes(65536))
    except BlockingIOError:
        return sent


def arrived(sock: socket.socket, count: int) -> None:
    """Wait until so many bytes lie there."""
    while len(sock.recv(count, socket.MSG_PEEK)) < count:
        pass


def test_established(pair: Pair) -> None:
    """What was read and written, not what came and left; an urgent byte hides nothing."""
    client, ours = pair
    assert counters_of(ours.fileno()) == Counters(0, 0, TcpState.ESTABLISHED)
    client.send(bytes(100))
    arrived(ours, 100)
    ours.recv(30)
    ours.send(bytes(50))
    assert counters_of(ours.fileno()) == Counters(30, 50, TcpState.ESTABLISHED)
    client.send(b"!", socket.MSG_OOB)
    client.send(bytes(9))
    arrived(ours, 70)  # reading stops at the urgent byte
    assert counters_of(ours.fileno()) == Counters(30, 50, TcpState.ESTABLISHED)


def test_unsent_bytes_are_written(pair: Pair) -> None:
    """The kernel has taken them: they are its business."""
    client, ours = pair
    sent = fill(ours)
    assert counters_of(ours.fileno()) == Counters(0, sent, TcpState.ESTABLISHED)
    client.recv(1000)
    assert counters_of(ours.fileno()) == Counters(0, sent, TcpState.ESTABLISHED)


def test_the_peers_fin_is_no_byte(pair: Pair) -> None:
    """Neither before the bytes in front of it are read, nor after, nor when the end itself is."""
    client, ours = pair
    client.send(bytes(10))
    client.shutdown(socket.SHUT_WR)
    ours.recv(4)
    wait_for(ours, TcpState.CLOSE_WAIT)
    assert counters_of(ours.fileno()) == Counters(4, 0, TcpState.CLOSE_WAIT)
    assert len(ours.recv(100)) == 6
    assert counters_of(ours.fileno()) == Counters(10, 0, TcpState.CLOSE_WAIT)
    assert ours.recv(100) == b""
    ours.send(bytes(3))
    assert counters_of(ours.fileno()) == Counters(10, 3, TcpState.CLOSE_WAIT)


def test_our_fin_is_no_byte(pair: Pair) -> None:
    """Neither while it waits behind what is unsent, nor when it has arrived."""
    client, ours = pair
    client.send(bytes(5))
    arrived(ours, 5)
    ours.recv(2)
    ours.send(bytes(7))
    ours.shutdown(socket.SHUT_WR)
    assert len(client.recv(100)) == 7
    assert client.recv(100) == b""
    wait_for(ours, TcpState.FIN_WAIT2)
    assert counters_of(ours.fileno()) == Counters(2, 7, TcpState.FIN_WAIT2)


@pytest.mark.parametrize("is_first", [True, False])
def test_both_fins_are_no_bytes(pair: Pair, *, is_first: bool) -> None:
    """Ours unsent behind other bytes; the peer's before it or after it."""
    client, ours = pair
    sent = fill(ours)
    if is_first:
        ours.shutdown(socket.SHUT_WR)
        assert counters_of(ours.fileno()) == Counters(0, sent, TcpState.FIN_WAIT1)
    client.shutdown(socket.SHUT_WR)
    wait_for(ours, TcpState.CLOSING if is_first else TcpState.CLOSE_WAIT)
    ours.shutdown(socket.SHUT_WR)
    state = TcpState.CLOSING if is_first else TcpState.LAST_ACK
    assert counters_of(ours.fileno()) == Counters(0, sent, state)


def test_after_a_reset_the_counts_prove_nothing(pair: Pair) -> None:
    """It is closed, by whomever."""
    client, ours = pair
    client.send(b"hello")
    reset(client)
    wait_for(ours, TcpState.CLOSE)
    found = counters_of(ours.fileno())
    assert found is not None
    assert found.is_closed


def test_nobody_counts_the_bytes_of_a_unix_socket() -> None:
    """None, and not zero."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert counters_of(ours.fileno()) is None


def test_what_is_no_tcp_socket_has_no_counts() -> None:
    """A pipe, a datagram socket: an error that names it, and no guess."""
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="non-socket"):
            counters_of(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, pytest.raises(OSError, match="no TCP"):
        counters_of(datagrams.fileno())


def wait_for(sock: socket.socket, state: TcpState) -> None:
    """Loopback is quick; the test's own time-out is the deadline."""
    while True:
        found = counters_of(sock.fileno())
        assert found is not None
        if found.state == state:
            return
