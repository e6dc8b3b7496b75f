"""Real workers without a holder: forked from the test, fed over their channel, killed, and recovered from."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from typing import TYPE_CHECKING, ClassVar, TypeVar

import attrs

from clients import DEADLINE_S
from copyover import channel, messages, slots
from copyover.errors import ChannelClosed
from copyover.holder.recovery import Orphan, Recovered, SlotFile, recover
from copyover.sockets import cookie_of_descriptor
from copyover.worker.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

M = TypeVar("M", bound=messages.Message)
INSTANCE = "0" * 32


@attrs.define
class Held:
    """What a holder has of a connection: its copy, and its epoch."""

    descriptor: int
    epoch: int = 0

    @property
    def peer(self) -> object:
        with socket.socket(fileno=os.dup(self.descriptor)) as copy:
            return copy.getpeername()


class Worker:
    """One worker process; *held* is the ledger of its connections."""

    alive: ClassVar[set[Worker]] = set()

    def __init__(
        self, directory: Path, listener: socket.socket, application: str, *, number: int = 1, **shape: int
    ) -> None:
        self.held: dict[int, Held] = {}
        self._lends = 0
        header = slots.shape(shape.get("slot_bytes", 1024), shape.get("slots", 64), worker=number, generation=1)
        self.file = SlotFile.make(directory, INSTANCE, header)
        ours, theirs = channel.pair()
        self.pid = os.fork()
        if self.pid == 0:
            self._serve(ours, theirs, number)
        theirs.close()
        self._pidfd = os.pidfd_open(self.pid)
        Worker.alive.add(self)
        self._channel = channel.Channel(ours)
        self.expect(messages.Hello)
        options = {"loop": "asyncio"}
        welcome = messages.Welcome(
            wire=1, generation=1, names=["web"], application=application, app_dir="tests/apps", options=options,
            listener=(0,),
        )  # fmt: skip
        self._channel.send(welcome, [listener.fileno()])
        self.expect(messages.Ready)

    def _serve(self, ours: socket.socket, theirs: socket.socket, number: int) -> None:
        try:
            ours.close()
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (1, 2):
                os.dup2(null, standard)
            os.environ |= {
                "COPYOVER_CHANNEL": str(theirs.detach()),
                "COPYOVER_STDERR": str(null),
                "COPYOVER_WORKER": str(number),
                "COPYOVER_INSTANCE": INSTANCE,
                "COPYOVER_SLOTS": str(self.file.fileno()),
            }
            main()
        finally:
            os._exit(70)

    # ---- the channel

    def expect(self, kind: type[M]) -> M:
        """Take packets until one of *kind* has come."""
        while True:
            message = self.take_packet()
            if isinstance(message, kind):
                return message

    def wait_for(self, count: int) -> None:
        """Wait until so many connections were lent, or came with the thaw."""
        while len(self.held) < count:
            self.take_packet()

    def take_packet(self) -> messages.Message:
        waiting = select.poll()
        waiting.register(self._channel.fileno(), select.POLLIN)
        assert waiting.poll(DEADLINE_S * 1000), "the worker says nothing"
        with self._channel.receive() as packet:
            if isinstance(packet.message, messages.Lend):
                self._lent(packet.message, packet.take())
            elif isinstance(packet.message, messages.Release):
                for cookie in packet.message.cookie:
                    os.close(self.held.pop(cookie).descriptor)
            return packet.message

    def _lent(self, message: messages.Lend, descriptors: list[int]) -> None:
        self.held |= {cookie: Held(descriptor) for cookie, descriptor in zip(message.cookie, descriptors, strict=True)}
        self._lends += message.rows
        with contextlib.suppress(ChannelClosed):  # it is dead: what it had sent counts all the same
            self._channel.send(messages.LendAck(total=self._lends))

    def accept(self) -> None:
        self._channel.send(messages.AcceptOn(moving=False))

    def resume(self, held: dict[int, Held], recovered: Recovered) -> None:
        """Give it the connections that another worker left."""
        if not recovered.records:
            return
        cookies = tuple(recovered.records)
        descriptors = [held[cookie].descriptor for cookie in cookies]
        self._channel.send(messages.Stage(cookie=cookies, listener=(0,) * len(cookies)), descriptors)
        self.expect(messages.Staged)
        epochs = tuple([held[cookie].epoch + 1 for cookie in cookies])
        columns = messages.record_columns(list(recovered.records.values()))
        self._channel.send(messages.Thaw(cookie=cookies, epoch=epochs, **columns))
        self._channel.send(messages.Enter(cut=False))
        adopted = self.expect(messages.Adopted)
        assert set(adopted.cookie) == set(cookies)
        for cookie, epoch in zip(cookies, epochs, strict=True):
            self.held[cookie] = Held(held[cookie].descriptor, epoch)

    # ---- its end

    def kill(self) -> None:
        """SIGKILL it, reap it, read its channel to the end."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        Worker.alive.remove(self)
        with contextlib.suppress(BlockingIOError, ChannelClosed):
            while True:
                poll = select.poll()
                poll.register(self._channel.fileno(), select.POLLIN)
                if not poll.poll(0):
                    break
                self.take_packet()
        self._channel.close()

    def recover(self, on_crash: str = "reset") -> Recovered:
        """Say how its connections go on; the file is gone after it."""
        try:
            return recover(
                self.file.fileno(),
                [Orphan(cookie, held.epoch, held.descriptor, on_crash) for cookie, held in self.held.items()],
            )
        finally:
            self.file.remove()

    def close(self) -> None:
        for held in self.held.values():
            os.close(held.descriptor)
        self.held.clear()

    def cookie_of(self, client: socket.socket) -> int:
        """Return which of its TCP connections is that of *client*."""
        (cookie,) = [cookie for cookie, held in self.held.items() if held.peer == client.getsockname()]
        assert cookie_of_descriptor(self.held[cookie].descriptor) == cookie
        return cookie
