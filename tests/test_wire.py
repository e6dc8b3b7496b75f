"""Which bytes each message is: round trips, refusals, and the golden bytes of each released version."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import messages, wire
from copyover.errors import WireError

KINDS = [pytest.param(kind, id=kind.__name__) for kind in messages.BY_KIND.values()]
BITS = {"B": 8, "H": 16, "I": 32, "Q": 64}

# Python's json writes a lone surrogate that UTF-8 cannot; nothing that is sent has one.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
RARE: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(),
    str: texts,
    bool: st.booleans(),
    list: st.lists(json_values, max_size=4),
    dict: st.dictionaries(texts, json_values, max_size=4),
}


def messages_of(kind: type[messages.Message]) -> st.SearchStrategy[messages.Message]:
    """Make any message of *kind* from what its fields say of themselves."""

    def with_rows(rows: int) -> st.SearchStrategy[messages.Message]:
        fields: dict[str, st.SearchStrategy[Any]] = {}
        for field in attrs.fields(kind):
            if "rare" in field.metadata:
                fields[field.name] = RARE[field.metadata["rare"]]
                continue
            value: st.SearchStrategy[Any] = st.binary(max_size=40)
            if "column" in field.metadata:
                value = st.integers(0, (1 << BITS[field.metadata["column"]]) - 1)
            fields[field.name] = st.lists(value, min_size=rows, max_size=rows).map(tuple)
        return st.builds(kind, **fields)

    return st.integers(0, 5).flatmap(with_rows)


any_message = st.sampled_from(list(messages.BY_KIND.values())).flatmap(messages_of)


def encoded(message: messages.Message, *, version: int = 1) -> tuple[wire.Header, bytes]:
    descriptors = message.rows if message.CARRIES_DESCRIPTORS else 0
    return wire.encode(message, descriptors=descriptors, version=version)


def packet_of(message: messages.Message) -> bytes:
    header, body = encoded(message)
    return header.pack() + body


def decoded(packet: bytes) -> messages.Message:
    return wire.decode(wire.decode_header(packet), packet[wire.HEADER.size :])


# ---- round trips


@given(any_message)
def test_what_is_encoded_comes_out_as_it_went_in(message: messages.Message) -> None:
    """Every message of every kind survives its bytes."""
    assert decoded(packet_of(message)) == message


@given(any_message)
def test_bodies_may_be_views(message: messages.Message) -> None:
    """A body is decoded without a copy of the packet, and what comes out holds no view of it."""
    header, body = encoded(message)
    buffer = bytearray(body)
    result = wire.decode(header, memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert result == message


@given(st.lists(st.builds(messages.Record, state=st.binary(max_size=9), received=st.integers(0, 1 << 63)), max_size=4))
def test_records_come_back_row_by_row(records: list[messages.Record]) -> None:
    """The columns of frozen and thaw are the records that they were made of, in order."""
    numbers = tuple(range(len(records)))
    message = messages.Thaw(cookie=numbers, epoch=numbers, **messages.record_columns(records))
    result = messages.expect(decoded(packet_of(message)), messages.Thaw)
    assert list(result.records()) == records


def test_the_largest_batches_fit() -> None:
    """A message may have MAX_ROWS rows; columns alone of that many stay below the size of a memfd."""
    many = tuple(range(messages.MAX_ROWS))
    message = messages.Adopted(cookie=many, epoch=many, pause_us=many)
    assert decoded(packet_of(message)) == message


# ---- refusals


@given(any_message, st.data())
def test_every_prefix_of_a_body_is_refused(message: messages.Message, data: st.DataObject) -> None:
    """A body that is cut short is an error, never another message."""
    header, body = encoded(message)
    if body:
        end = data.draw(st.integers(0, len(body) - 1))
        with pytest.raises(WireError):
            wire.decode(header, body[:end])


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_every_golden_packet_is_refused(kind: type[messages.Message]) -> None:
    """The same, exhaustively: no packet of any kind is the beginning of another's."""
    packet = bytes.fromhex(next(golden for message, golden in GOLDEN_1 if type(message) is kind))
    for end in range(len(packet)):
        with pytest.raises(WireError):
            decoded(packet[:end])


@given(any_message, st.binary(min_size=1, max_size=9))
def test_trailing_bytes_are_refused(message: messages.Message, more: bytes) -> None:
    """Bytes behind the body are an error: two peers that disagree about a length must notice."""
    header, body = encoded(message)
    with pytest.raises(WireError):
        wire.decode(header, body + more)


@given(any_message, st.integers(0, 300))
def test_a_wrong_count_of_descriptors_is_refused(message: messages.Message, claimed: int) -> None:
    """One descriptor a row, or none: any other claim is an error on both sides."""
    header, body = encoded(message)
    if claimed == header.descriptors:
        return
    with pytest.raises(WireError, match="descriptors"):
        wire.decode(attrs.evolve(header, descriptors=claimed), body)
    with pytest.raises(WireError, match="descriptors"):
        wire.encode(message, descriptors=claimed)


@pytest.mark.parametrize("kind", [kind for kind in messages.BY_KIND.values() if wire._LAYOUTS[kind].rare])
def test_a_wrong_json_type_is_refused(kind: type[messages.Message]) -> None:
    """Each value of the JSON part has exactly the type of its field: no bool for an int, no null, none missing."""
    message = next(message for message, _ in GOLDEN_1 if type(message) is kind)
    header, body = encoded(message)
    values = json.loads(body[: header.rare_bytes])
    for name, wanted in wire._LAYOUTS[kind].rare:
        wrongs: tuple[object, ...] = (None, True, 1, 1.5, "text", [], {})
        for wrong in wrongs:
            if type(wrong) is not wanted:
                assert_json_refused(header, body, values | {name: wrong}, match=f"{kind.__name__}.{name}")
        without = {key: value for key, value in values.items() if key != name}
        assert_json_refused(header, body, without, match=f"{kind.__name__}.{name}")


def assert_json_refused(header: wire.Header, body: bytes, value: object, match: str) -> None:
    text = json.dumps(value).encode()
    with pytest.raises(WireError, match=match):
        wire.decode(attrs.evolve(header, rare_bytes=len(text)), text + body[header.rare_bytes :])


@pytest.mark.parametrize(
    "text", [b"[]", b"1", b"{", b'{"total":}', b"\xff\xfe", b"[" * 100_000, b'{"total":' + b"9" * 9999 + b"}"]
)
def test_json_that_cannot_be_read_is_refused(text: bytes) -> None:
    """Broken JSON, JSON of another shape, nesting and numbers without end: all are WireError."""
    header = wire.Header(1, messages.Staged.KIND, 0, len(text), 0, 0)
    with pytest.raises(WireError):
        wire.decode(header, text)


def test_a_key_that_is_unknown_is_ignored() -> None:
    """A later release may add keys to the JSON part of a message; this one reads past them."""
    text = b'{"total":3,"later":true}'
    header = wire.Header(1, messages.Staged.KIND, 0, len(text), 0, 0)
    assert wire.decode(header, text) == messages.Staged(total=3)


@pytest.mark.parametrize("text", ['{"reason":"caf\\u00e9","status":1}', '{"reason":"caf\u00e9","status":1}'])
def test_text_is_read_escaped_or_not(text: str) -> None:
    """How a peer writes its JSON is its own affair."""
    header = wire.Header(1, messages.Failed.KIND, 0, len(text.encode()), 0, 0)
    assert wire.decode(header, text.encode()) == messages.Failed(reason="caf\u00e9", status=1)


def test_a_path_that_is_no_utf_8_travels() -> None:
    """A directory whose name is not UTF-8 arrives as os.fsdecode gave it, surrogates and all."""
    message = messages.Failed(reason="/srv/\udcff", status=1)
    assert decoded(packet_of(message)) == message


def test_a_json_part_where_none_belongs_is_refused() -> None:
    """A kind without rare values has no JSON part."""
    header = wire.Header(1, messages.MoveOver.KIND, 0, 2, 0, 0)
    with pytest.raises(WireError, match="JSON"):
        wire.decode(header, b"{}")


def test_rows_where_none_belong_are_refused() -> None:
    """A kind without columns has no rows."""
    header = wire.Header(1, messages.MoveOver.KIND, 3, 0, 0, 0)
    with pytest.raises(WireError, match="no rows"):
        wire.decode(header, b"")


def test_columns_of_different_lengths_are_refused() -> None:
    """A message whose columns disagree is never sent."""
    with pytest.raises(WireError, match="epoch"):
        wire.encode(messages.Release(cookie=(1, 2), epoch=(0,), how=(0, 0)))


def test_blobs_of_another_count_than_the_rows_are_refused() -> None:
    """The same for blobs: one a row."""
    for reasons in ((), (b"a", b"b")):
        with pytest.raises(WireError, match="reason"):
            wire.encode(messages.Refused(cookie=(1,), epoch=(0,), reason=reasons))


def test_a_value_that_its_column_cannot_hold_is_refused() -> None:
    """A number out of range is WireError, which the sender can name, not an error of struct."""
    with pytest.raises(WireError, match="epoch"):
        wire.encode(messages.Release(cookie=(1,), epoch=(1 << 32,), how=(0,)))


@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_but_wire_error(packet: bytes) -> None:
    """Whatever a peer sends, the answer is a message or WireError."""
    try:
        decoded(packet)
    except WireError:
        return


@given(
    st.sampled_from([*messages.BY_KIND, 0, 99, 255]),
    st.integers(0, 0xFFFFFFFF) | st.integers(0, 3),
    st.integers(0, 0xFFFFFFFF) | st.integers(0, 40),
    st.integers(0, 3),
    st.integers(0, 0xFFFF),
    st.binary(max_size=80),
)
def test_a_random_header_raises_nothing_but_wire_error(  # noqa: PLR0917  # the fields of a header
    kind: int, rows: int, rare_bytes: int, descriptors: int, flags: int, body: bytes
) -> None:
    """A header may claim four thousand million rows; no memory is taken for them."""
    header = wire.Header(1, kind, rows, rare_bytes, descriptors, flags)
    try:
        wire.decode(header, body)
    except WireError:
        return


def test_an_unknown_kind_is_refused() -> None:
    """A kind that this release does not know is named in the error."""
    with pytest.raises(WireError, match="99"):
        wire.decode(wire.Header(1, 99, 0, 0, 0, 0), b"")


# ---- versions


def test_another_magic_is_refused() -> None:
    """What does not begin as a packet is none."""
    with pytest.raises(WireError, match="starts with"):
        wire.decode_header(b"xx" + bytes(14))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_refused_except_in_a_hello(version: int) -> None:
    """Only hello is read at any version: it is what the versions are agreed on with."""
    header, _ = encoded(messages.AcceptOn(moving=False), version=version)
    with pytest.raises(WireError, match=f"wire version {version}"):
        wire.decode_header(header.pack())
    hello = GOLDEN_1[0][0]
    header, body = encoded(hello, version=version)
    assert wire.decode(wire.decode_header(header.pack()), body) == hello


@pytest.mark.parametrize(
    ("theirs", "ours", "common"),
    [
        ([1, 1], (1, 1), 1),
        ([1, 3], (2, 5), 3),
        ([2, 5], (1, 3), 3),
        ([4, 5], (1, 3), None),
        ([1, 2], (3, 4), None),
        ([1, 9], (2, 2), 2),
        ([3, 2], (1, 9), None),
        ([1], (1, 1), None),
        ([1, 1, 1], (1, 1), None),
        ([True, True], (1, 1), None),
        (["1", "1"], (1, 1), None),
        ([1.0, 1.0], (1, 1), None),
    ],
)
def test_the_common_version_is_the_newest_of_both(theirs: list[Any], ours: tuple[int, int], common: int | None) -> None:
    """Two ranges agree on the newest version that both hold; what is no range agrees on none."""
    assert wire.common_version(theirs, ours) == common


def test_kinds_are_unique() -> None:
    """No two messages have one number, and the two directions never share one."""
    kinds = [kind.KIND for kind in (*messages.FROM_WORKER, *messages.FROM_HOLDER)]
    assert len(set(kinds)) == len(kinds) == len(messages.BY_KIND)
    assert max(kind.KIND for kind in messages.FROM_WORKER) < 32 <= min(kind.KIND for kind in messages.FROM_HOLDER)


def test_expect_names_both_kinds() -> None:
    """A message out of turn is refused with what was expected and what came."""
    assert messages.expect(messages.AcceptOn(moving=False), messages.AcceptOn) == messages.AcceptOn(moving=False)
    with pytest.raises(WireError, match=r"Hello was expected, AcceptOn came"):
        messages.expect(messages.AcceptOn(moving=False), messages.Hello)


def test_the_header_is_sixteen_bytes() -> None:
    """Header and byte order are of every version: the first 16 bytes, little-endian."""
    header = wire.Header(1, 4, 2, 0, 2, wire.FLAG_MEMFD)
    assert header.pack() == struct.pack("<2sBBIIHH", b"co", 1, 4, 2, 0, 2, 1)
    assert wire.decode_header(header.pack()) == header
    assert header.has_memfd


# ---- golden bytes


# The literals are the promise: version 1 is these bytes, whatever the code says. They are never computed anew.
GOLDEN_1: list[tuple[messages.Message, str]] = [
    (
        messages.Hello(
            wire=[1, 1], record=[1, 1], copyover="0.1.0", python="3.11.7", pid=4211, worker=2, instance="ab12"
        ),
        (
            "636f0101000000006a000000000000007b2277697265223a5b312c315d2c227265636f7264223a5b312c315d2c22636f"
            "70796f766572223a22302e312e30222c22707974686f6e223a22332e31312e37222c22706964223a343231312c22776f"
            "726b6572223a322c22696e7374616e6365223a2261623132227d"
        ),
    ),
    (
        messages.Ready(application="app:chat", loop="asyncio", writes=1, reads=[1, 2], shares=True, interface="asgi"),
        (
            "636f01020000000065000000000000007b226170706c69636174696f6e223a226170703a63686174222c226c6f6f7022"
            "3a226173796e63696f222c22777269746573223a312c227265616473223a5b312c325d2c22736861726573223a747275"
            "652c22696e74657266616365223a2261736769227d"
        ),
    ),
    (
        messages.Failed(reason="no room", status=18),
        "636f01030000000020000000000000007b22726561736f6e223a226e6f20726f6f6d222c22737461747573223a31387d",
    ),
    (
        messages.Lend(cookie=(7, 18446744073709551615), listener=(0, 1), kind=(0, 3)),
        "636f01040200000000000000020000000700000000000000ffffffffffffffff000001000003",
    ),
    (
        messages.Release(cookie=(7, 8), epoch=(0, 2), how=(0, 3)),
        "636f01050200000000000000000000000700000000000000080000000000000000000000020000000003",
    ),
    (
        messages.AcceptOffAck(number=2),
        "636f0106000000000c000000000000007b226e756d626572223a327d",
    ),
    (
        messages.Staged(total=300),
        "636f0107000000000d000000000000007b22746f74616c223a3330307d",
    ),
    (
        messages.Frozen(
            kind=(1, 0),
            flags=(3, 0),
            schema=(2, 1),
            received=(10, 9223372036854775808),
            sent=(20, 0),
            halted_ns=(30, 5),
            unread=(b"un", b""),
            unsent=(b"out", b""),
            state=(b'{"n":1}', b"\x00"),
            batch=4,
            cookie=(7, 8),
            epoch=(1, 2),
        ),
        (
            "636f0108020000000b000000000000007b226261746368223a347d01000300020001000a000000000000000000000000"
            "000080140000000000000000000000000000001e00000000000000050000000000000007000000000000000800000000"
            "0000000100000002000000020000000000000003000000000000000700000001000000756e6f75747b226e223a317d00"
        ),
    ),
    (
        messages.Refused(cookie=(7, 8), epoch=(1, 2), reason=(b"pinned", b"")),
        (
            "636f01090200000000000000000000000700000000000000080000000000000001000000020000000600000000000000"
            "70696e6e6564"
        ),
    ),
    (
        messages.Gathered(shared=(b"j{}",)),
        "636f010a010000000000000000000000030000006a7b7d",
    ),
    (
        messages.Adopted(cookie=(7,), epoch=(3,), pause_us=(1500,)),
        "636f010b010000000000000000000000070000000000000003000000dc050000",
    ),
    (
        messages.Welcome(
            wire=1,
            generation=3,
            names={"0": "web", "2": "admin"},
            application="app:chat",
            app_dir="/srv",
            options={"loop": "auto"},
            listener=(2,),
        ),
        (
            "636f0120010000007d000000010000007b2277697265223a312c2267656e65726174696f6e223a332c226e616d657322"
            "3a7b2230223a22776562222c2232223a2261646d696e227d2c226170706c69636174696f6e223a226170703a63686174"
            "222c226170705f646972223a222f737276222c226f7074696f6e73223a7b226c6f6f70223a226175746f227d7d0200"
        ),
    ),
    (
        messages.LendAck(total=2),
        "636f0121000000000b000000000000007b22746f74616c223a327d",
    ),
    (
        messages.AcceptOn(moving=False),
        "636f01220000000010000000000000007b226d6f76696e67223a66616c73657d",
    ),
    (
        messages.AcceptOff(number=2, moving=True),
        "636f0123000000001a000000000000007b226e756d626572223a322c226d6f76696e67223a747275657d",
    ),
    (
        messages.Stage(cookie=(7, 8), listener=(0, 1)),
        "636f01240200000000000000020000000700000000000000080000000000000000000100",
    ),
    (
        messages.Freeze(batch=5, more=False, gather_ms=1000, wait_ms=5000, cookie=(7, 8), epoch=(0, 1)),
        (
            "636f01250200000038000000000000007b226261746368223a352c226d6f7265223a66616c73652c226761746865725f"
            "6d73223a313030302c22776169745f6d73223a353030307d070000000000000008000000000000000000000001000000"
        ),
    ),
    (
        messages.Thaw(
            kind=(1, 0),
            flags=(3, 0),
            schema=(2, 1),
            received=(10, 9223372036854775808),
            sent=(20, 0),
            halted_ns=(30, 5),
            unread=(b"un", b""),
            unsent=(b"out", b""),
            state=(b'{"n":1}', b"\x00"),
            cookie=(7, 8),
            epoch=(2, 3),
        ),
        (
            "636f012602000000000000000000000001000300020001000a0000000000000000000000000000801400000000000000"
            "00000000000000001e000000000000000500000000000000070000000000000008000000000000000200000003000000"
            "020000000000000003000000000000000700000001000000756e6f75747b226e223a317d00"
        ),
    ),
    (
        messages.Enter(cut=True, shared=(b"j{}", b"b\x00")),
        "636f0127020000000c000000000000007b22637574223a747275657d03000000020000006a7b7d6200",
    ),
    (
        messages.Drop(cookie=(7, 8)),
        "636f012802000000000000000000000007000000000000000800000000000000",
    ),
    (
        messages.Commit(drain_ms=3600000),
        "636f01290000000014000000000000007b22647261696e5f6d73223a333630303030307d",
    ),
    (
        messages.MoveOver(),
        "636f012a000000000000000000000000",
    ),
    (
        messages.Stop(drain_ms=10000),
        "636f012b0000000012000000000000007b22647261696e5f6d73223a31303030307d",
    ),
    (
        messages.Forward(cookie=(7, 8), act=(0, 1), pushed=(b"hi\n", b"")),
        "636f010c020000000000000000000000070000000000000008000000000000000001030000000000000068690a",
    ),
    (
        messages.Push(cookie=(7, 8), act=(0, 1), pushed=(b"hi\n", b"")),
        "636f012c020000000000000000000000070000000000000008000000000000000001030000000000000068690a",
    ),
    (
        messages.Attach(
            key="5ec2e7",
            generation=3,
            directory="/srv",
            python="/srv/.venv/bin/python",
            app_dir="/srv",
            application="app:chat",
            loop="asyncio",
            writes=1,
            reads=[1, 2],
            shares=True,
            interface="asgi",
            is_committed=True,
            is_leaving=False,
            names={"0": "web", "2": "admin"},
            listener=(2,),
        ),
        (
            "636f010d010000000f010000010000007b226b6579223a22356563326537222c2267656e65726174696f6e223a332c22"
            "6469726563746f7279223a222f737276222c22707974686f6e223a222f7372762f2e76656e762f62696e2f707974686f"
            "6e222c226170705f646972223a222f737276222c226170706c69636174696f6e223a226170703a63686174222c226c6f"
            "6f70223a226173796e63696f222c22777269746573223a312c227265616473223a5b312c325d2c22736861726573223a"
            "747275652c22696e74657266616365223a2261736769222c2269735f636f6d6d6974746564223a747275652c2269735f"
            "6c656176696e67223a66616c73652c226e616d6573223a7b2230223a22776562222c2232223a2261646d696e227d7d02"
            "00"
        ),
    ),
    (
        messages.View(
            cookie=(7, 8),
            epoch=(1, 2),
            listener=(0, 1),
            standing=(0, 1),
            kind=(1, 0),
            flags=(3, 0),
            schema=(2, 1),
            received=(10, 2**63),
            sent=(20, 0),
            halted_ns=(30, 5),
            unread=(b"un", b""),
            unsent=(b"out", b""),
            state=(b'{"n":1}', b"\x00"),
        ),
        (
            "636f010e02000000000000000200000001000300020001000a0000000000000000000000000000801400000000000000"
            "00000000000000001e000000000000000500000000000000070000000000000008000000000000000100000002000000"
            "000001000001020000000000000003000000000000000700000001000000756e6f75747b226e223a317d00"
        ),
    ),
    (
        messages.Viewed(cookie=(9, 10)),
        "636f010f02000000000000000000000009000000000000000a00000000000000",
    ),
    (
        messages.Became(cookie=(7, 8), epoch=(0, 2), kind=(1, 2)),
        "636f01100200000000000000000000000700000000000000080000000000000000000000020000000102",
    ),
    (
        messages.Cede(
            kind=(1, 0),
            flags=(0, 32),
            schema=(2, 1),
            received=(10, 9223372036854775808),
            sent=(20, 0),
            halted_ns=(30, 5),
            unread=(b"un", b""),
            unsent=(b"out", b""),
            state=(b'{"n":1}', b"\x00"),
            cookie=(7, 8),
            epoch=(1, 2),
        ),
        (
            "636f011102000000000000000000000001000020020001000a0000000000000000000000000000801400000000000000"
            "00000000000000001e000000000000000500000000000000070000000000000008000000000000000100000002000000"
            "020000000000000003000000000000000700000001000000756e6f75747b226e223a317d00"
        ),
    ),
    (
        messages.Recall(wire=1),
        "636f012d000000000a000000000000007b2277697265223a317d",
    ),
]


@pytest.mark.parametrize(("message", "golden"), [pytest.param(*row, id=type(row[0]).__name__) for row in GOLDEN_1])
def test_version_1_is_these_bytes(message: messages.Message, golden: str) -> None:
    """A holder and a worker of any two releases that speak version 1 understand each other."""
    assert packet_of(message).hex() == golden
    assert decoded(bytes.fromhex(golden)) == message


def test_every_kind_has_its_golden_bytes() -> None:
    """No message goes without."""
    assert {type(message) for message, _ in GOLDEN_1} == set(messages.BY_KIND.values())


# ---- what a hostile peer makes of them

golden_packets = st.sampled_from([bytes.fromhex(golden) for _, golden in GOLDEN_1])


@given(golden_packets, st.data())
def test_a_mutated_packet_is_a_message_or_a_wire_error(packet: bytes, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in: what still decodes is a message that encodes; nothing else is ever raised."""
    mutated = bytearray(packet)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated)))
        mutated[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    try:
        header = wire.decode_header(bytes(mutated))
        message = wire.decode(header, memoryview(mutated)[wire.HEADER.size :])
    except WireError:
        return
    again, body = wire.encode(message, descriptors=header.descriptors, version=header.version)
    assert wire.decode(again, body) == message


@given(golden_packets, st.sampled_from(["rows", "rare_bytes", "descriptors", "flags"]), st.integers(0, (1 << 32) - 1))
def test_a_claim_that_is_not_so_takes_no_memory(packet: bytes, field: str, claim: int) -> None:
    """A header that claims what its body has not is refused for what it has, whatever it claims."""
    header = wire.decode_header(packet)
    short = field in {"descriptors", "flags"}
    lying = attrs.evolve(header, **{field: claim & 0xFFFF if short else claim})
    tracemalloc.start()
    try:
        wire.decode(lying, memoryview(packet)[wire.HEADER.size :])
    except WireError:
        pass
    finally:
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most_bytes < 1 << 20
