"""
A connection's state as bytes, at each boundary anew: what has not changed is not encoded again.

It decides what counts as unchanged; what a state may be and how it is written is the application's business.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAVES = frozenset({str, int, float, bool, type(None), bytes})
_CONSTANTS = {None: "null", True: "true", False: "false"}
_EMPTY = b"{}"
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Snapshot:
    """
    The last bytes of one state.

    A state of leaves (a dict or an attrs object whose values cannot change in themselves) is compared by identity: 1
    equals True, and would come back as it. Any other state is encoded each time.
    """

    __slots__ = ("_encode", "_encoded", "_is_json", "_keys", "_kind", "_names", "_pieces", "_values")

    def __init__(self, encode: Callable[[Any], bytes], *, is_json: bool) -> None:
        self._encode = encode
        self._is_json = is_json
        self._kind: type | None = None  # of the state that was a state of leaves
        self._keys: list[str] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._pieces: list[str] = []
        self._encoded = b""

    def encoded(self, state: object) -> bytes | None:
        """Return the bytes of last time if nothing has changed since, None if it has, or if nobody knows."""
        kind = type(state)
        if kind is not self._kind or (isinstance(state, dict) and list(state) != self._keys):
            return None
        return self._encoded if _is_same(self._values_of(state, kind), self._values) else None

    def take(self, state: object) -> bytes:
        """Return *state* as bytes, the very object of last time if nothing has changed; what encode raises passes."""
        kind = type(state)
        if kind is not self._kind:
            return self._take_anew(state, kind)
        if isinstance(state, dict):
            if not (state or self._keys):
                return self._encoded
            if list(state) == self._keys:
                if all(map(operator.is_, state.values(), self._values)):
                    return self._encoded
                if self._pieces:
                    return self._mend(state)
        elif _is_same(self._values_of(state, kind), self._values):
            return self._encoded
        return self._take_anew(state, kind)

    def begin(self, state: object, encoded: bytes) -> None:
        """
        Take *encoded* for the bytes of *state*, which was just made from them.

        Of a class of the application's that is not certain: its defaults, converters and hooks have had their say.
        """
        kind = type(state)
        values = self._values_of(state, kind) if kind is dict or kind in _LEAVES else None
        if values is not None and _LEAVES.issuperset(map(type, values)):
            self._kind, self._values, self._encoded = kind, values, encoded
            self._keys = list(state) if isinstance(state, dict) else []
            self._pieces = []

    def _mend(self, state: dict[str, object]) -> bytes:
        """Encode what has changed in a dict whose keys have not."""
        values = list(state.values())
        same = list(map(operator.is_, values, self._values))
        self._kind = None  # until all is whole again: str() of a number of 5000 digits raises
        while False in same:
            place = same.index(False)
            same[place] = True
            piece = _as_json(values[place])
            if piece is None:
                return self._take_anew(state, dict)
            self._pieces[place] = self._names[place] + piece
        self._values = values
        self._kind = dict
        self._encoded = _join(self._pieces)
        return self._encoded

    def forget(self) -> None:
        """The next state is another connection's."""
        self._kind = None
        self._values = []

    def _take_anew(self, state: object, kind: type) -> bytes:
        if kind is dict and not state and self._is_json:  # as that of each connection begins
            self._kind, self._keys, self._values, self._names, self._pieces = dict, [], [], [], []
            self._encoded = _EMPTY
            return _EMPTY
        self._kind = None
        self._encoded = self._encode(state)
        values = self._values_of(state, kind)
        if values is not None and _LEAVES.issuperset(map(type, values)):
            self._keys = list(state) if isinstance(state, dict) else []
            self._values = values
            self._names = list(map(_name, self._keys)) if self._is_json else []
            self._pieces = [name + str(_as_json(value)) for name, value in zip(self._names, values, strict=False)]
            # Infinity has no piece; a state that holds it is encoded as a whole each time.
            is_whole = not self._is_json or kind is not dict or _join(self._pieces) == self._encoded
            self._kind = kind if is_whole else None
        return self._encoded

    def _values_of(self, state: object, kind: type) -> list[object] | None:
        """Return what a state of leaves consists of; None if it cannot be one."""
        if kind is dict:
            return list(state.values())  # type: ignore[attr-defined]  # it is one
        if kind in _LEAVES:
            return [state]
        # A codec of the application's own may write what is no field.
        return _getter(kind)(state) if self._is_json else None


@functools.lru_cache(64)
def _getter(kind: type) -> Callable[[object], list[object] | None]:
    if not attrs.has(kind):
        return _nothing
    names = [field.name for field in attrs.fields(kind)]
    return lambda state: [getattr(state, name) for name in names]


def _nothing(_: object) -> None:
    return None


def _is_same(values: list[object] | None, before: list[object]) -> bool:
    return values is not None and len(values) == len(before) and all(map(operator.is_, values, before))


@functools.lru_cache(1024)
def _name(key: str) -> str:
    return _ENCODER.encode(key) + ":"


def _join(pieces: list[str]) -> bytes:
    return ("{" + ",".join(pieces) + "}").encode("utf-8", "surrogatepass")


def _as_json(value: object) -> str | None:
    kind = type(value)
    if kind is int:
        return str(value)
    if kind is str:
        return _ENCODER.encode(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else None  # type: ignore[arg-type]  # it is one
    return _CONSTANTS[value] if kind is bool or value is None else None  # type: ignore[index]  # one of the three
