"""The bytes of one connection: when it begins, and what it watches."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import pytest

from copyover.messages import Record
from copyover.worker.poller import IN, Loop
from copyover.worker.transport import Phase, Transport

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pair() -> Iterator[tuple[Transport, socket.socket]]:
    """One that is not started, and its client."""
    loop = Loop()
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    with near, far:
        yield Transport(loop, near), far
    loop.close()


def test_who_is_halted_by_his_own_input_sends_nothing(pair: tuple[Transport, socket.socket]) -> None:
    """What is unsent travels on with its record; sent here as well, the client would have it twice."""
    transport, client = pair
    transport.restore(Record(unread=b"input", unsent=b"output"), Phase.OPEN)
    transport.on_change = transport.pause
    transport.start()
    with pytest.raises(BlockingIOError):
        client.recv(100)
    assert transport.output == b"output"


def test_a_socket_that_cannot_be_watched_now_is_watched_later(
    pair: tuple[Transport, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have no room for another; what was refused is not taken for done."""
    transport, _ = pair
    watcher = transport._watcher
    watched: list[int] = []

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as full:
        full.setattr(watcher, "watch", refuse)
        with pytest.raises(OSError, match="no room"):
            transport.start()
    monkeypatch.setattr(watcher, "watch", lambda _, before, wanted: watched.extend((before, wanted)))
    transport.consumed()
    assert watched == [0, IN]
