"""
Which bytes each message between holder and worker is.

It knows no socket: descriptors travel beside the bytes and are only counted here.

A packet is a header of 16 bytes, a JSON object for what is rare, packed columns for what is hot, and opaque blobs
last. ``docs/protocol.md`` is the reference; the golden bytes in ``tests/test_wire.py`` hold each released version.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import attrs

from copyover.columns import Blobs, Column
from copyover.errors import WireError
from copyover.messages import BY_KIND, Hello, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

WIRE_VERSIONS = (1, 1)  # the oldest and the newest that this release speaks
RECORD_VERSIONS = (1, 1)  # of the columns of a record
MAX_BODY_BYTES = 1 << 30  # what a peer may make us read out of a memfd

HEADER = struct.Struct("<2sBBIIHH")  # magic, version, kind, rows, bytes of JSON, descriptors, flags
MAGIC = b"co"
_encode_json = json.JSONEncoder(separators=(",", ":")).encode  # dumps would make such an object for each message
_BYTES = {code: struct.calcsize(f"<{code}") for code in "BHIQ"}
FLAG_MEMFD = 1  # the body is in a sealed memfd, the last descriptor of the packet


@attrs.frozen
class _Layout:
    rare: tuple[tuple[str, type], ...]
    columns: tuple[tuple[str, str], ...]
    blobs: tuple[str, ...]
    row_fields: tuple[str, ...]
    row_bytes: int  # of one row, its blobs aside
    is_plain: bool  # columns alone


def _read_layout(kind: type[Message]) -> _Layout:
    fields = attrs.fields(kind)
    columns = tuple((field.name, field.metadata["column"]) for field in fields if "column" in field.metadata)
    blobs = tuple(field.name for field in fields if "blob" in field.metadata)
    rare = tuple((field.name, field.metadata["rare"]) for field in fields if "rare" in field.metadata)
    return _Layout(
        rare=rare,
        columns=columns,
        blobs=blobs,
        row_fields=(*[name for name, _ in columns], *blobs),
        row_bytes=sum(_BYTES[code] for _, code in columns) + _BYTES["I"] * len(blobs),
        is_plain=not (rare or blobs),
    )


_LAYOUTS = {kind: _read_layout(kind) for kind in BY_KIND.values()}


@attrs.frozen
class Header:
    """The first 16 bytes of a packet."""

    version: int
    kind: int
    rows: int
    rare_bytes: int
    descriptors: int
    flags: int

    @property
    def has_memfd(self) -> bool:
        return bool(self.flags & FLAG_MEMFD)

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, self.version, self.kind, self.rows, self.rare_bytes, self.descriptors, self.flags)


def encode(message: Message, *, descriptors: int = 0, version: int = WIRE_VERSIONS[1]) -> tuple[Header, bytes]:
    """
    Return the header and the body of *message*, which travels with *descriptors* descriptors.

    Raises:
        WireError: columns of different lengths, a value that its column cannot hold, or another number of
            descriptors than the message carries.

    """
    layout = _LAYOUTS[type(message)]
    rows = len(getattr(message, layout.row_fields[0])) if layout.row_fields else 0
    if descriptors != (rows if message.CARRIES_DESCRIPTORS else 0):
        raise WireError(f"{type(message).__name__} of {rows} rows cannot travel with {descriptors} descriptors")
    rare = b""
    if layout.rare:
        values = {name: getattr(message, name) for name, _ in layout.rare}
        rare = _encode_json(values).encode()
    columns = [_column(message, name, code) for name, code in layout.columns]
    blobs = [Blobs.of(getattr(message, name)) for name in layout.blobs]
    for name, column in zip(layout.row_fields, [*columns, *blobs], strict=True):
        if len(column) != rows:
            raise WireError(f"{type(message).__name__}.{name} has {len(column)} values, not {rows}")
    header = Header(version, message.KIND, rows, len(rare), descriptors, 0)
    packed = [column.packed() for column in (*columns, *[blob.sizes for blob in blobs])]
    return header, b"".join([rare, *packed, *[blob.joined for blob in blobs]])


def _column(message: Message, name: str, code: str) -> Column:
    values = getattr(message, name)
    if type(values) is Column and values.typecode == code:
        return values
    try:
        return Column(code, values)
    except (OverflowError, TypeError) as problem:
        raise WireError(f"{type(message).__name__}.{name} does not fit its column: {problem}") from problem


def decode_header(packet: bytes) -> Header:
    """
    Read the header of a packet.

    Raises:
        WireError: too short, another magic, or a version that this release does not speak.

    """
    if len(packet) < HEADER.size:
        raise WireError(f"a packet of {len(packet)} bytes is shorter than its header of {HEADER.size}")
    magic, *fields = HEADER.unpack_from(packet)
    header = Header(*fields)
    if magic != MAGIC:
        raise WireError(f"a packet starts with {magic!r} instead of {MAGIC!r}")
    oldest, newest = WIRE_VERSIONS
    if not oldest <= header.version <= newest and header.kind != Hello.KIND:
        raise WireError(f"wire version {header.version} is none of {oldest} to {newest}")
    return header


def decode(header: Header, body: bytes | memoryview) -> Message:
    """
    Return the message that *header* and *body* are.

    Raises:
        WireError: an unknown kind, a wrong length, a JSON part that is not what the kind takes.

    """
    kind = BY_KIND.get(header.kind)
    if kind is None:
        raise WireError(f"message kind {header.kind} is unknown")
    layout = _LAYOUTS[kind]
    name = kind.__name__
    if header.descriptors != (header.rows if kind.CARRIES_DESCRIPTORS else 0):
        raise WireError(f"{name} of {header.rows} rows claims {header.descriptors} descriptors")
    if header.rows and not layout.row_fields:
        raise WireError(f"{name} has no rows, this one claims {header.rows}")
    if layout.is_plain and not header.rare_bytes:
        return kind(**_decode_plain(name, layout, header, body))
    view = memoryview(body)
    fields: dict[str, Any] = _decode_rare(name, layout, bytes(view[: header.rare_bytes]), header.rare_bytes)
    start, rows = header.rare_bytes, header.rows
    if start + rows * layout.row_bytes > len(view):
        raise WireError(f"{name} of {rows} rows is cut short at {len(view)} bytes")
    sizes: list[Column] = []
    for field, code in (*layout.columns, *[("", "I")] * len(layout.blobs)):
        end = start + rows * _BYTES[code]
        column = Column.read(code, view[start:end])
        start = end
        if field:
            fields[field] = column
        else:
            sizes.append(column)
    lengths = [sum(column) for column in sizes]
    if start + sum(lengths) != len(view):
        raise WireError(f"{name} is {len(view)} bytes long, its rows say {start + sum(lengths)}")
    for field, column, length in zip(layout.blobs, sizes, lengths, strict=True):
        fields[field] = Blobs(column, bytes(view[start : start + length]))
        start += length
    return kind(**fields)


def _decode_plain(name: str, layout: _Layout, header: Header, body: bytes | memoryview) -> dict[str, Any]:
    """Return the columns of a message that is nothing else: these come one a connection."""
    rows, start = header.rows, 0
    if len(body) != rows * layout.row_bytes:
        raise WireError(f"{name} of {rows} rows is {len(body)} bytes long, its rows say {rows * layout.row_bytes}")
    fields = {}
    for field, code in layout.columns:
        end = start + rows * _BYTES[code]
        fields[field] = Column.read(code, body[start:end])
        start = end
    return fields


def _decode_rare(name: str, layout: _Layout, text: bytes, claimed: int) -> dict[str, Any]:
    if len(text) != claimed or bool(text) != bool(layout.rare):
        raise WireError(f"{name} has a JSON part of {len(text)} bytes, its header claims {claimed}")
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise WireError(f"the JSON part of {name} cannot be read: {problem}") from problem
    if type(values) is not dict:
        raise WireError(f"the JSON part of {name} is no object")
    for field, wanted in layout.rare:
        if type(values.get(field)) is not wanted:
            raise WireError(f"{name}.{field} should be of type {wanted.__name__}")
    return {field: values[field] for field, _ in layout.rare}


def common_version(theirs: Sequence[int], ours: tuple[int, int] = WIRE_VERSIONS) -> int | None:
    """Return the newest version that both ranges (oldest, newest) hold, or None."""
    if len(theirs) != 2 or not all(type(bound) is int for bound in theirs):
        return None
    newest = min(theirs[1], ours[1])
    return newest if newest >= max(theirs[0], ours[0]) else None
