"""Compression that goes on elsewhere: what the client sends next refers to what it sent before the move."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from copyover.adapters.deflate import Deflate

SETTINGS = {"memLevel": 5}
WORDS = [b"copyover ", b"moves ", b"a ", b"connection ", bytes(range(256)), b"\0" * 300]
MESSAGES = st.lists(st.lists(st.sampled_from(WORDS) | st.binary(max_size=20), max_size=30).map(b"".join), max_size=4)


def negotiated(*, remote: bool = False, local: bool = False, remote_bits: int = 12, local_bits: int = 12) -> Deflate:
    return Deflate.of(PerMessageDeflate(remote, local, remote_bits, local_bits, SETTINGS))


def client_of(server: PerMessageDeflate) -> PerMessageDeflate:
    """Return the client's half: its compressor is the server's decompressor's, and may use as much of a window."""
    return PerMessageDeflate(
        server.local_no_context_takeover,
        server.remote_no_context_takeover,
        server.local_max_window_bits,
        max(server.remote_max_window_bits, 9),  # zlib's compressor knows no 8
        SETTINGS,
    )


def sent(client: PerMessageDeflate, message: bytes, *, fragments: int = 1) -> list[Frame]:
    size = -(-len(message) // fragments) or 1
    pieces = [message[at : at + size] for at in range(0, len(message), size)] or [b""]
    return [
        client.encode(Frame(Opcode.CONT if place else Opcode.BINARY, piece, fin=place == len(pieces) - 1))
        for place, piece in enumerate(pieces)
    ]


def heard(server: PerMessageDeflate, frames: list[Frame]) -> bytes:
    return b"".join(bytes(server.decode(frame).data) for frame in frames)


def moved(server: Deflate) -> Deflate:
    """Return what goes on in the replacement, from what travels."""
    again = Deflate.again(list(server.parameters()), bytes(server.window))
    assert again.parameters() == server.parameters()
    return again


@pytest.mark.parametrize(("remote", "local"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("bits", range(9, 16))
@settings(max_examples=20)
@given(messages=MESSAGES, fragments=st.integers(1, 3))
def test_each_side_understands_the_other_after_each_move(
    messages: list[bytes], bits: int, fragments: int, *, remote: bool, local: bool
) -> None:
    """With every window size, with and without context takeover, moved after each message."""
    server = negotiated(remote=remote, local=local, remote_bits=bits, local_bits=bits)
    client = client_of(server)
    for message in messages:
        assert heard(server, sent(client, message, fragments=fragments)) == message
        assert len(server.window) <= 1 << bits
        server = moved(server)
        answer = server.encode(Frame(Opcode.BINARY, message))
        assert bytes(client.decode(answer).data) == message
        server = moved(server)


@pytest.mark.parametrize("bits", range(9, 16))
def test_it_remembers_as_far_back_as_a_client_may_point(bits: int) -> None:
    """A message at the far end of the window is found again; noise between them does not compress."""
    noise = random.Random(bits)
    server = negotiated(remote_bits=bits)
    client = client_of(server)
    first = noise.randbytes(64)
    # zlib points back at most a window less its longest match and some.
    between = noise.randbytes((1 << bits) - 64 - 280)
    for message in (first, between):
        assert heard(server, sent(client, message)) == message
    server = moved(server)
    frames = sent(client, first)
    assert sum(len(frame.data) for frame in frames) < len(first)  # it does point back
    assert heard(server, frames) == first


def test_the_window_is_what_was_last_heard() -> None:
    """No longer than the client may point back, whatever came: it travels with each move."""
    server = negotiated(remote_bits=9)
    client = client_of(server)
    whole = b""
    for size in (100, 500, 511, 512, 513, 5000, 0, 1):
        message = random.Random(size).randbytes(size)
        whole += message
        assert heard(server, sent(client, message)) == message
        assert server.window == whole[-512:]


def test_the_smallest_window() -> None:
    """A client may say 8, though zlib's compressor knows no less than 9: what it points back to is near enough."""
    server = negotiated(remote_bits=8)
    client = client_of(server)
    for message in (b"near " * 40, b"near " * 40, b"far" * 100):
        assert heard(server, sent(client, message)) == message
        assert len(server.window) <= 256
        server = moved(server)


def test_what_is_not_compressed_is_not_remembered() -> None:
    """A decompressor does not see it: neither plain messages, with their fragments, nor control frames."""
    server = negotiated()
    client = client_of(server)
    heard(server, sent(client, b"compressed"))
    plain = [Frame(Opcode.TEXT, b"pla", fin=False), Frame(Opcode.PING, b"ping"), Frame(Opcode.CONT, b"in")]
    assert heard(server, plain) == b"plapingin"
    assert server.window == b"compressed"
    assert heard(moved(server), sent(client, b"compressed")) == b"compressed"


def test_without_context_takeover_nothing_travels() -> None:
    """Each message begins anew: a window would only cost."""
    server = negotiated(remote=True)
    assert heard(server, sent(client_of(server), b"message")) == b"message"
    assert server.window == b""
    assert server.parameters() == [1, 0, 12, 12]


def test_control_frames_among_fragments_leave_the_window_alone() -> None:
    """A ping between two compressed fragments is no part of their message."""
    server = negotiated()
    client = client_of(server)
    first, second = sent(client, b"copyover moves", fragments=2)
    server.decode(first)
    server.decode(Frame(Opcode.PING, b"ping"))
    server.decode(second)
    assert server.window == b"copyover moves"
