"""Packets with descriptors over real socket pairs: what arrives, what is refused, and that nothing leaks."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import others
from copyover import channel, messages, wire
from copyover.channel import MAX_PACKET_BYTES, Backlog, Channel
from copyover.errors import ChannelClosed, WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
BIG = messages.Gathered(shared=(bytes(range(256)) * 1024,))


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every test here ends with the descriptors that it began with."""
    before = len(open_descriptors())
    yield
    assert len(open_descriptors()) == before


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = channel.pair()
    near, far = Channel(ours), Channel(theirs)
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A peer that sends what it likes."""
    ours, theirs = channel.pair()
    with ours:
        far = Channel(theirs)
        yield ours, far
        far.close()


def staged(*cookies: int) -> messages.Stage:
    return messages.Stage(cookie=cookies, listener=(0,) * len(cookies))


def pipes(count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found += os.pipe2(os.O_CLOEXEC)
    return found


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def send_raw(sock: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    sock.sendmsg([payload], rights if descriptors else [])


def memfd_packet(message: messages.Message) -> tuple[bytes, bytes]:
    """Return the header of a packet whose body is said to be in a memfd, and that body."""
    header, body = wire.encode(message)
    fields = (wire.MAGIC, 1, header.kind, header.rows, header.rare_bytes, 0, wire.FLAG_MEMFD)
    return wire.HEADER.pack(*fields), body


def memfd(body: bytes, *, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, body)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


# ---- what arrives


def test_a_message_arrives_with_its_descriptors(ends: tuple[Channel, Channel]) -> None:
    """In their order, the same open files, close-on-exec from the first moment on."""
    near, far = ends
    sent = pipes(2)
    near.send(staged(1, 2, 3, 4), sent)
    with far.receive() as packet:
        assert packet.message == staged(1, 2, 3, 4)
        assert [os.fstat(fd).st_ino for fd in packet.descriptors] == [os.fstat(fd).st_ino for fd in sent]
        assert not any(os.get_inheritable(descriptor) for descriptor in packet.descriptors)
        assert not set(packet.descriptors) & set(sent)
    close_all(sent)


def test_as_many_descriptors_as_a_message_carries(ends: tuple[Channel, Channel]) -> None:
    """SCM_MAX_FD of them in one packet, and one memfd more where the body is large is never needed with so many."""
    near, far = ends
    (read, write) = pipes(1)
    cookies = tuple(range(messages.MAX_DESCRIPTORS))
    near.send(staged(*cookies), [read] * len(cookies))
    with far.receive() as packet:
        assert len(packet.descriptors) == messages.MAX_DESCRIPTORS
    close_all([read, write])


def test_what_is_taken_is_the_taker_s(ends: tuple[Channel, Channel]) -> None:
    """Descriptors that nobody takes are closed at the end of the with block, taken ones are not."""
    near, far = ends
    sent = pipes(1)
    near.send(staged(1, 2), sent)
    with far.receive() as packet:
        taken = packet.take()
    assert packet.descriptors == []
    assert all(os.fstat(descriptor) for descriptor in taken)
    close_all([*sent, *taken])


def test_nothing_has_come(ends: tuple[Channel, Channel]) -> None:
    """A channel never blocks."""
    with pytest.raises(BlockingIOError):
        ends[0].receive()


def test_both_ends_are_close_on_exec() -> None:
    """A forked child of the application must not hold a channel of its worker by accident."""
    ours, theirs = channel.pair()
    with ours, theirs:
        assert not ours.get_inheritable()
        assert not theirs.get_inheritable()


# ---- large bodies


def test_a_large_body_goes_by_a_sealed_memfd(raw: tuple[socket.socket, Channel]) -> None:
    """Over the packet size the body is in a memfd that nobody can change, shrink or grow any more."""
    sock, near = raw
    near.send(BIG)
    payload, ancillary, _, _ = sock.recvmsg(1 << 20, 1 << 10)
    assert len(payload) == wire.HEADER.size
    assert wire.decode_header(payload).has_memfd
    (descriptor,) = array.array("i", ancillary[0][2])
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 1)
    os.close(descriptor)


def test_a_large_body_arrives(ends: tuple[Channel, Channel]) -> None:
    """The receiver sees no difference, and no descriptor more."""
    near, far = ends
    near.send(BIG)
    with far.receive() as packet:
        assert packet.message == BIG
        assert packet.descriptors == []


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_packet_size_is_a_limit_of_the_body(ends: tuple[Channel, Channel], more: int) -> None:
    """To the byte: a body of the packet size still travels in its packet."""
    near, far = ends
    _, body = wire.encode(messages.Gathered(shared=(b"",)))
    message = messages.Gathered(shared=(bytes(MAX_PACKET_BYTES - len(body) + more),))
    near.send(message)
    with far.receive() as packet:
        assert packet.message == message


# ---- what is refused


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_an_unsealed_memfd_is_refused(raw: tuple[socket.socket, Channel], seals: int) -> None:
    """Its sender could change or shrink it while it is read."""
    sock, far = raw
    head, body = memfd_packet(BIG)
    descriptor = memfd(body, seals=seals)
    send_raw(sock, head, [descriptor])
    os.close(descriptor)
    with pytest.raises(WireError, match="not sealed"):
        far.receive()


def test_what_is_no_memfd_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    """A pipe has no seals."""
    sock, far = raw
    head, _ = memfd_packet(BIG)
    sent = pipes(1)
    send_raw(sock, head, sent[:1])
    close_all(sent)
    with pytest.raises(WireError, match=r"no memfd|not sealed"):
        far.receive()


def test_a_plain_file_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    """Nor has a file of a disk."""
    sock, far = raw
    head, _ = memfd_packet(BIG)
    with Path(__file__).open("rb") as file:
        send_raw(sock, head, [file.fileno()])
    with pytest.raises(WireError, match=r"no memfd|not sealed"):
        far.receive()


def test_an_empty_memfd_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    """There is no body of no bytes that would need one."""
    sock, far = raw
    head, _ = memfd_packet(BIG)
    descriptor = memfd(b"")
    send_raw(sock, head, [descriptor])
    os.close(descriptor)
    with pytest.raises(WireError, match="0 bytes"):
        far.receive()


def test_a_memfd_without_end_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    """Its size is looked at before a byte is read: a peer cannot make us take all memory."""
    sock, far = raw
    head, _ = memfd_packet(BIG)
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, wire.MAX_BODY_BYTES + 1)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    send_raw(sock, head, [descriptor])
    os.close(descriptor)
    with pytest.raises(WireError, match="between 1 and"):
        far.receive()


def test_a_memfd_with_a_wrong_body_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    """What a memfd holds is checked as what a packet holds."""
    sock, far = raw
    head, body = memfd_packet(BIG)
    descriptor = memfd(body[:-1])
    send_raw(sock, head, [descriptor])
    os.close(descriptor)
    with pytest.raises(WireError, match="bytes long"):
        far.receive()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_count_of_descriptors_than_claimed_is_refused(raw: tuple[socket.socket, Channel], count: int) -> None:
    """Whatever came is closed again; no connection is mistaken for another."""
    sock, far = raw
    header, body = wire.encode(staged(1, 2), descriptors=2)
    sent = pipes(2)
    send_raw(sock, header.pack() + body, sent[:count])
    close_all(sent)
    with pytest.raises(WireError, match=f"claims 2 descriptors and came with {count}"):
        far.receive()


@pytest.mark.parametrize("payload", [b"x", b"nonsense" * 20, wire.Header(1, 99, 0, 0, 2, 0).pack()])
def test_nonsense_with_descriptors_is_refused(raw: tuple[socket.socket, Channel], payload: bytes) -> None:
    """No descriptor stays open because the bytes beside it could not be read."""
    sock, far = raw
    sent = pipes(1)
    send_raw(sock, payload, sent)
    close_all(sent)
    with pytest.raises(WireError):
        far.receive()


def test_a_packet_that_is_too_long_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    """The kernel cuts it (MSG_TRUNC), and half a packet is none."""
    sock, far = raw
    sent = pipes(1)
    send_raw(sock, bytes(wire.HEADER.size + MAX_PACKET_BYTES + 1), sent)
    close_all(sent)
    with pytest.raises(WireError, match="longer than"):
        far.receive()


def test_the_channel_goes_on_after_a_refusal(raw: tuple[socket.socket, Channel]) -> None:
    """Packets are whole: the next one is read as if the bad one had not been."""
    sock, far = raw
    send_raw(sock, b"nonsense")
    header, body = wire.encode(messages.MoveOver())
    send_raw(sock, header.pack() + body)
    with pytest.raises(WireError):
        far.receive()
    assert far.receive().message == messages.MoveOver()


def test_descriptors_that_the_kernel_dropped_are_noticed() -> None:
    """At the limit of open files MSG_CTRUNC is an error of its own, and those that did arrive are closed."""
    program = textwrap.dedent(
        """
        import os, resource
        from copyover import channel, messages
        from copyover.errors import TruncatedPacket

        ours, theirs = channel.pair()
        near, far = channel.Channel(ours), channel.Channel(theirs)
        read, write = os.pipe()
        near.send(messages.Stage(cookie=tuple(range(8)), listener=(0,) * 8), [read] * 8)
        before = os.listdir("/proc/self/fd")
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 3, hard))
        try:
            far.receive()
        except TruncatedPacket as problem:
            print(problem)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert os.listdir("/proc/self/fd") == before
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the kernel dropped descriptors of a packet" in done.stdout


# ---- back-pressure


def fill(near: Channel) -> int:
    """Send numbered messages until one has to wait; return how many are sent or waiting."""
    total = 0
    while not near.has_backlog:
        near.send(messages.LendAck(total=total))
        total += 1
    return total


def test_a_full_channel_queues_in_order_and_says_so_once(ends: tuple[Channel, Channel]) -> None:
    """FULL when the first has to wait, NONE when none does; every packet arrives, in order, told once each."""
    near, far = ends
    heard: list[Backlog] = []
    sent: list[int] = []
    near.on_backlog = heard.append
    total = fill(near)
    for more in range(5):
        near.send(messages.LendAck(total=total + more), on_sent=lambda more=more: sent.append(more))  # type: ignore[misc]
    assert heard == [Backlog.FULL]
    assert sent == []
    received: list[messages.Message] = []
    while len(received) < total + 5:
        try:
            received.append(far.receive().message)
        except BlockingIOError:
            near.flush()
    assert received == [messages.LendAck(total=number) for number in range(total + 5)]
    assert heard == [Backlog.FULL, Backlog.NONE]
    assert sent == [0, 1, 2, 3, 4]
    assert not near.has_backlog


def test_what_waits_holds_its_own_descriptors(ends: tuple[Channel, Channel]) -> None:
    """A connection may end meanwhile and its number be another's: the peer gets what was meant."""
    near, far = ends
    total = fill(near)
    sent = pipes(2)
    meant = [os.fstat(descriptor).st_ino for descriptor in sent]
    near.send(staged(1, 2, 3, 4), sent)
    close_all(sent)
    others = pipes(2)
    assert set(others) == set(sent), "the numbers are used again"
    for _ in range(total):
        near.flush()
        far.receive()
    near.flush()
    with far.receive() as packet:
        assert [os.fstat(descriptor).st_ino for descriptor in packet.descriptors] == meant
    close_all(others)


def test_a_large_body_that_waits_leaks_nothing(ends: tuple[Channel, Channel]) -> None:
    """Neither when it is sent in the end, nor when the channel is closed before."""
    near, far = ends
    total = fill(near)
    near.send(BIG)
    for _ in range(total):
        near.flush()
        far.receive()
    near.flush()
    assert far.receive().message == BIG
    fill(near)
    near.send(BIG)
    descriptors = pipes(1)
    near.send(staged(1, 2), descriptors)
    close_all(descriptors)


@others.needs_root
def test_too_many_descriptors_in_flight_are_waited_for() -> None:
    """ETOOMANYREFS: said anew at each attempt, the order is kept, nothing is lost, and it goes on when it is over."""
    program = textwrap.dedent(
        f"""
        import os, resource
        from copyover import channel, messages
        from copyover.channel import Backlog

        ours, theirs = channel.pair()
        heard, sent, received = [], [], []
        near, far = channel.Channel(ours, heard.append), channel.Channel(theirs)
        read, write = os.pipe()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        os.setgroups([])
        os.setresuid({others.STRANGER}, {others.STRANGER}, {others.STRANGER})

        def send(number):
            near.send(messages.Stage(cookie=(number, 0), listener=(0, 0)), [read, write], lambda: sent.append(number))

        total = 0
        while not near.has_backlog:
            send(total)
            total += 1
        for _ in range(3):
            send(total)
            total += 1
        assert heard == [Backlog.SCARCE], heard
        near.flush()
        assert heard == [Backlog.SCARCE] * 2, heard
        assert sent == list(range(total - 4)), sent
        while len(received) < total:
            with far.receive() as packet:
                received.append(packet.message.cookie[0])
            near.flush()
        assert received == sent == list(range(total))
        assert set(heard[:-1]) == {{Backlog.SCARCE}} and heard[-1] is Backlog.NONE, heard
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_lets_go_on_what_waited(ends: tuple[Channel, Channel]) -> None:
    """A connection that waits for its lend to be sent is not left waiting for ever."""
    near, _ = ends
    fill(near)
    sent: list[int] = []
    near.send(messages.MoveOver(), on_sent=lambda: sent.append(1))
    near.close()
    assert sent == [1]
    assert not near.has_backlog


# ---- the peer is gone


def test_a_closed_peer_is_noticed_when_sending(ends: tuple[Channel, Channel]) -> None:
    """No signal, no OSError: ChannelClosed."""
    near, far = ends
    far.close()
    with pytest.raises(ChannelClosed):
        near.send(messages.MoveOver())


def test_a_closed_peer_is_noticed_when_receiving(ends: tuple[Channel, Channel]) -> None:
    """All that it had sent is read first."""
    near, far = ends
    near.send(messages.MoveOver())
    near.close()
    assert far.receive().message == messages.MoveOver()
    with pytest.raises(ChannelClosed):
        far.receive()


def test_a_peer_that_did_not_read_is_noticed(ends: tuple[Channel, Channel]) -> None:
    """Its death with our packets unread resets the channel: that is an end as well."""
    near, far = ends
    near.send(messages.MoveOver())
    far.close()
    with pytest.raises(ChannelClosed):
        near.receive()


def test_a_peer_that_goes_while_packets_wait_is_noticed_by_flush(ends: tuple[Channel, Channel]) -> None:
    """What waits can never be sent; the owner of the channel hears of it."""
    near, far = ends
    fill(near)
    far.close()
    with pytest.raises(ChannelClosed):
        near.flush()


def test_a_version_that_was_agreed_on_is_sent(ends: tuple[Channel, Channel]) -> None:
    """After hello both ends speak the version that they have in common."""
    near, far = ends
    near.version = 1
    near.send(messages.MoveOver())
    assert far.receive().message == messages.MoveOver()
