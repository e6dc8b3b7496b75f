"""
How a worker whose holder is dead finds the next holder of its name.

It connects, greets and waits to be asked; what is told then is decided in the agent.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import attrs

from copyover import messages
from copyover.channel import Channel
from copyover.errors import ChannelClosed, WireError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

log = logging.getLogger("copyover.worker")

AGAIN_S = 0.1


@attrs.frozen
class Identity:
    """What a worker tells a new holder of itself, and the path at which that one listens; empty, none is sought."""

    path: str
    hello: messages.Hello
    attach: messages.Attach


class Seeker:
    """*found* is called with the channel and the request of a holder that came."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        identity: Identity,
        found: Callable[[Channel, messages.Recall], None],
    ) -> None:
        self._loop = loop
        self._path = identity.path
        self._hello = identity.hello
        self._found = found

    def seek(self) -> None:
        """Connect to the holder as soon as there is one."""
        if not self._path:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
            channel = Channel(sock)
            channel.send(self._hello)
        except (OSError, ChannelClosed):  # there is none yet, or it is busy with others
            sock.close()
            self._loop.call_later(AGAIN_S, self.seek)
            return
        self._loop.add_reader(channel.fileno(), self._asked, channel)

    def _asked(self, channel: Channel) -> None:
        try:
            with channel.receive() as packet:
                recall = messages.expect(packet.message, messages.Recall)
        except BlockingIOError:
            return
        except WireError as refused:  # a closed channel too: it knows us not, or died in its turn
            log.warning("the holder at %s does not take this worker: %s", self._path, refused)
            self._loop.remove_reader(channel.fileno())
            channel.close()
            self._loop.call_later(AGAIN_S, self.seek)
            return
        self._loop.remove_reader(channel.fileno())
        channel.version = recall.wire
        self._found(channel, recall)
