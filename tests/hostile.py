"""
A worker that breaks the protocol, in one way of many; run as a release's interpreter, with the way's name.

It speaks the wire by itself, and does nothing else: it waits to be killed for what it did.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import attrs

from copyover import messages, wire
from copyover.channel import Channel, Packet, sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MANY = 20_000


READY = messages.Ready(application="x", loop="x", writes=1, reads=[1], shares=False, interface="handler")


class Impostor:
    """The channel of a worker, and how far it has come."""

    def __init__(self) -> None:
        self.socket = socket.socket(fileno=int(os.environ["COPYOVER_CHANNEL"]))
        self.channel = Channel(self.socket)

    def receive(self) -> Packet:
        select.select([self.socket], [], [])
        return self.channel.receive()

    def hello(self) -> None:
        self.channel.send(
            messages.Hello(
                wire=list(wire.WIRE_VERSIONS),
                record=list(wire.RECORD_VERSIONS),
                copyover="0",
                python="3",
                pid=os.getpid(),
                worker=int(os.environ["COPYOVER_WORKER"]),
                instance=os.environ["COPYOVER_INSTANCE"],
            )
        )

    def be_ready(self) -> messages.Stage:
        """Be a worker until connections are staged here."""
        self.hello()
        self.receive()
        self.channel.send(READY)
        return messages.expect(self.receive().message, messages.Stage)

    def be_told_to_enter(self) -> messages.Thaw:
        """Be a worker until it is to serve, and serve nothing."""
        stage = self.be_ready()
        self.channel.send(messages.Staged(total=len(stage.cookie)))
        while not isinstance(message := self.receive().message, messages.Thaw):
            continue
        return message

    def raw(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes as they are."""
        self.socket.setblocking(True)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self.socket.sendmsg([payload], rights if descriptors else [])


def packet_of(message: messages.Message, **header: int) -> bytes:
    """Return the bytes of *message* with another header than it should have."""
    proper, body = wire.encode(message, descriptors=message.rows if message.CARRIES_DESCRIPTORS else 0)
    return attrs.evolve(proper, **header).pack() + body


def lend(*cookies: int) -> messages.Lend:
    return messages.Lend(cookie=cookies, listener=(0,) * len(cookies), kind=(0,) * len(cookies))


def connection() -> tuple[socket.socket, int]:
    """Return a socket that could be a connection, and its cookie."""
    ours, _ = socket.socketpair()
    return ours, int.from_bytes(ours.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)  # SO_COOKIE


def a_file() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def memfd(body: bytes, *, is_sealed: bool = False) -> int:
    if is_sealed:
        return sealed_memfd(body)
    made = os.memfd_create("x")
    os.write(made, body)
    return made


# ---- the ways; each before it is greeted, once staged, or once it is to serve


def random_bytes(worker: Impostor) -> None:
    worker.raw(os.urandom(200))


def one_byte(worker: Impostor) -> None:
    worker.raw(b"c")


def huge_packet(worker: Impostor) -> None:
    worker.hello()
    worker.raw(packet_of(messages.Staged(total=0)) + bytes(200_000))


def truncated_packet(worker: Impostor) -> None:
    worker.be_ready()
    worker.raw(packet_of(messages.Staged(total=1))[:-1])


def huge_claims(worker: Impostor) -> None:
    worker.be_ready()
    worker.raw(wire.Header(1, messages.Release.KIND, 0xFFFFFFFF, 0, 0, 0).pack())


def random_bytes_once_staged(worker: Impostor) -> None:
    worker.be_ready()
    worker.raw(os.urandom(2000), [a_file()] * 100)


def descriptors_where_none_belong(worker: Impostor) -> None:
    worker.be_ready()
    worker.raw(packet_of(messages.Staged(total=1)), [a_file(), a_file()])


def claimed_descriptors_where_none_belong(worker: Impostor) -> None:
    worker.be_ready()
    worker.raw(packet_of(messages.Staged(total=1), descriptors=1), [a_file()])


def fewer_descriptors_than_claimed(worker: Impostor) -> None:
    worker.be_ready()
    sock, cookie = connection()
    worker.raw(packet_of(lend(cookie, cookie + 1)), [sock.fileno()])


def more_descriptors_than_claimed(worker: Impostor) -> None:
    worker.be_ready()
    sock, cookie = connection()
    worker.raw(packet_of(lend(cookie)), [sock.fileno()] * 250)


def lent_file(worker: Impostor) -> None:
    worker.be_ready()
    worker.channel.send(lend(1), [a_file()])


def lent_channel(worker: Impostor) -> None:
    worker.be_ready()
    worker.channel.send(lend(1), [worker.socket.fileno()])


def cookie_of_another(worker: Impostor) -> None:
    stage = worker.be_ready()
    sock, _ = connection()
    worker.channel.send(lend(stage.cookie[0]), [sock.fileno()])


def connection_of_another(worker: Impostor) -> None:
    worker.hello()
    worker.receive()
    worker.channel.send(READY)
    staged = worker.receive()
    cookies = messages.expect(staged.message, messages.Stage).cookie
    worker.channel.send(lend(cookies[0]), staged.descriptors[:1])


def same_connection_twice(worker: Impostor) -> None:
    worker.be_ready()
    sock, cookie = connection()
    worker.channel.send(lend(cookie, cookie), [sock.fileno()] * 2)


def same_connection_again(worker: Impostor) -> None:
    worker.be_ready()
    sock, cookie = connection()
    for _ in range(2):
        worker.channel.send(lend(cookie), [sock.fileno()])


def unknown_listener(worker: Impostor) -> None:
    worker.be_ready()
    sock, cookie = connection()
    worker.channel.send(messages.Lend(cookie=(cookie,), listener=(7,), kind=(0,)), [sock.fileno()])


def unknown_kind(worker: Impostor) -> None:
    worker.be_ready()
    sock, cookie = connection()
    worker.channel.send(messages.Lend(cookie=(cookie,), listener=(0,), kind=(4,)), [sock.fileno()])


def unsealed_body(worker: Impostor) -> None:
    worker.be_ready()
    body = json.dumps({"total": 1}).encode()
    header = wire.Header(1, messages.Staged.KIND, 0, len(body), 0, wire.FLAG_MEMFD)
    worker.raw(header.pack(), [memfd(body)])


def body_that_is_no_memfd(worker: Impostor) -> None:
    worker.be_ready()
    worker.raw(wire.Header(1, messages.Staged.KIND, 0, 11, 0, wire.FLAG_MEMFD).pack(), [a_file()])


def empty_body(worker: Impostor) -> None:
    worker.be_ready()
    header = wire.Header(1, messages.Staged.KIND, 0, 11, 0, wire.FLAG_MEMFD)
    worker.raw(header.pack(), [memfd(b"", is_sealed=True)])


def sparse_body(worker: Impostor) -> None:
    """Send a body of a terabyte that nobody ever wrote."""
    worker.be_ready()
    made = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(made, 1 << 40)
    fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    worker.raw(wire.Header(1, messages.Staged.KIND, 0, 11, 0, wire.FLAG_MEMFD).pack(), [made])


def ready_twice(worker: Impostor) -> None:
    worker.be_ready()
    worker.channel.send(READY)


def hello_twice(worker: Impostor) -> None:
    worker.hello()
    worker.hello()


def odd_schemas(worker: Impostor) -> None:
    worker.hello()
    worker.receive()
    worker.channel.send(attrs.evolve(READY, reads=["1"]))  # type: ignore[list-item]  # that is the way


def too_many_staged(worker: Impostor) -> None:
    worker.be_ready()
    worker.channel.send(messages.Staged(total=MANY))


def adopts_what_is_not_thawed(worker: Impostor) -> None:
    stage = worker.be_ready()
    worker.channel.send(messages.Adopted(cookie=stage.cookie[:1], epoch=(1,), pause_us=(0,)))


def ends_what_is_anothers(worker: Impostor) -> None:
    stage = worker.be_ready()
    worker.channel.send(messages.Release(cookie=stage.cookie[:1], epoch=(0,), how=(0,)))


def freezes_what_is_anothers(worker: Impostor) -> None:
    stage = worker.be_ready()
    columns = messages.record_columns([messages.Record()])
    worker.channel.send(messages.Frozen(batch=0, cookie=stage.cookie[:1], epoch=(0,), **columns))


def acknowledges_what_was_not_asked(worker: Impostor) -> None:
    worker.be_ready()
    worker.channel.send(messages.AcceptOffAck(number=1))


def adopts_at_another_epoch(worker: Impostor) -> None:
    thaw = worker.be_told_to_enter()
    epochs = tuple(epoch + 1 for epoch in thaw.epoch)
    worker.channel.send(messages.Adopted(cookie=thaw.cookie, epoch=epochs, pause_us=(0,) * thaw.rows))


def adopts_one_twice(worker: Impostor) -> None:
    thaw = worker.be_told_to_enter()
    cookie, epoch = thaw.cookie[0], thaw.epoch[0]
    worker.channel.send(messages.Adopted(cookie=(cookie, cookie), epoch=(epoch, epoch), pause_us=(0, 0)))


def random_bytes_once_thawed(worker: Impostor) -> None:
    worker.be_told_to_enter()
    worker.raw(os.urandom(500))


def speaks_as_the_holder(worker: Impostor) -> None:
    stage = worker.be_ready()
    worker.channel.send(messages.Drop(cookie=stage.cookie))


def flood(worker: Impostor) -> None:
    """Say something legal very often; then something that is not."""
    worker.be_ready()
    packet = packet_of(messages.Staged(total=0))
    for _ in range(MANY):
        worker.raw(packet)
    worker.raw(b"x")


def deaf(worker: Impostor) -> None:
    """Never read, never answer."""
    worker.hello()


def deaf_once_staged(worker: Impostor) -> None:
    worker.be_ready()


def deaf_once_thawed(worker: Impostor) -> None:
    worker.be_told_to_enter()


WAYS: dict[str, Callable[[Impostor], None]] = {
    name: way
    for name, way in list(globals().items())
    if getattr(way, "__annotations__", {}).get("worker") == "Impostor"
}
LENDS_ITS_OWN = ("same_connection_again",)  # which is lost with it
SILENT = ("deaf", "deaf_once_staged", "deaf_once_thawed")  # these break no rule but the deadline


def every_kind_before_hello() -> dict[str, Callable[[Impostor], None]]:
    """Return, for each kind but hello, a way that begins with it."""

    def way(kind: type[messages.Message]) -> Callable[[Impostor], None]:
        return lambda worker: worker.raw(packet_of(_any_of(kind)), _descriptors(kind))

    return {f"begins_with_{kind.__name__}": way(kind) for kind in messages.BY_KIND.values() if kind.KIND != 1}


def _any_of(kind: type[messages.Message]) -> messages.Message:
    values: dict[str, Any] = {}
    for field in attrs.fields(kind):
        if "rare" in field.metadata:
            values[field.name] = field.metadata["rare"]()
        else:
            values[field.name] = (b"",) if "blob" in field.metadata else (1,)
    return kind(**values)


def _descriptors(kind: type[messages.Message]) -> list[int]:
    return [a_file()] if kind.CARRIES_DESCRIPTORS else []


WAYS |= every_kind_before_hello()

if __name__ == "__main__":
    impostor = Impostor()  # its channel stays open
    WAYS[sys.argv[1]](impostor)
    signal.pause()
