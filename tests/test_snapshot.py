"""A state as bytes at each boundary: what has not changed is not encoded again, what has is never missed."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover.worker.application import Application
from copyover.worker.snapshot import Snapshot

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(), LEAVES, max_size=2)
STATES = st.dictionaries(st.sampled_from("abcde") | st.text(max_size=3), VALUES, max_size=5)


async def handler(_: object) -> None:
    """Nothing is served here."""


def json_snapshot(application: Application[Any] | None = None) -> tuple[Snapshot, Application[Any]]:
    application = application or Application(handler=handler)
    return Snapshot(application.encode_state, is_json=application.encode is None), application


@given(st.lists(STATES, min_size=1, max_size=6))
def test_it_is_what_the_application_encodes(states: list[dict[str, Any]]) -> None:
    """One dict through all its changes: keys, order, types, values."""
    snapshot, application = json_snapshot()
    state: dict[str, Any] = {}
    for wanted in states:
        state.clear()
        state.update(wanted)
        assert snapshot.take(state) == application.encode_state(state)
        assert snapshot.take(state) == application.encode_state(state)


@given(st.lists(st.tuples(st.sampled_from("abc"), LEAVES), max_size=12))
def test_a_value_at_a_time(changes: list[tuple[str, Any]]) -> None:
    """Only the changed value is encoded, and the whole is the same."""
    snapshot, application = json_snapshot()
    state: dict[str, Any] = {"a": 1, "b": "x", "c": None}
    for key, value in changes:
        state[key] = value
        assert snapshot.take(state) == application.encode_state(state)


@pytest.mark.parametrize(("before", "after"), [(1, True), (0, False), (1, 1.0), (0.0, -0.0)])
def test_what_is_equal_and_not_the_same_is_a_change(before: object, after: object) -> None:
    """1 equals True; a client that went on with it would not."""
    snapshot, application = json_snapshot()
    state = {"a": before}
    snapshot.take(state)
    state["a"] = after
    assert snapshot.take(state) == application.encode_state(state)


def test_an_unchanged_state_is_the_very_same_object() -> None:
    """By that its slot knows that it need not be written again."""
    snapshot, _ = json_snapshot()
    state = {"a": 1000, "b": "text", "c": None, "d": 1.5}
    first = snapshot.take(state)
    assert snapshot.take(state) is first
    assert snapshot.take(dict(state)) is first
    state["a"] = 1001
    assert snapshot.take(state) is not first


@given(STATES, st.none() | st.tuples(st.sampled_from("abc"), VALUES))
def test_what_a_state_was_made_from_are_its_bytes_until_it_changes(
    brought: dict[str, Any], change: tuple[str, Any] | None
) -> None:
    """What comes out is what the application would encode: the bytes that came are taken for as long as nothing did."""
    snapshot, application = json_snapshot()
    came = application.encode_state(brought)
    state = application.decode_state(came, application.schema)
    snapshot.begin(state, came)
    assert snapshot.encoded(state) in {None, came}
    if change is not None:
        state[change[0]] = change[1]
    known = snapshot.encoded(state)
    assert known is None or known == application.encode_state(state)
    assert snapshot.take(state) == application.encode_state(state)


def test_bytes_are_known_only_while_nothing_has_changed() -> None:
    """Another value, another key, another order, another type, or what can change in itself: nobody knows."""
    snapshot, _ = json_snapshot()
    state: dict[str, Any] = {"a": 1000, "b": "text"}
    assert snapshot.encoded(state) is None
    snapshot.begin(state, b"{...}")
    assert snapshot.encoded(state) == b"{...}"
    assert snapshot.take(state) == b"{...}"
    for other in ({"a": 1001, "b": "text"}, {"b": "text", "a": 1000}, {"a": 1000}, {}, None, [1000, "text"]):
        assert snapshot.encoded(other) is None
    snapshot.begin({"log": []}, b"{...}")
    assert snapshot.encoded({"log": []}) is None


@attrs.define
class Counted:
    """What its class makes of what was brought is not what was brought."""

    name: str = "x"
    made: int = 0
    added: int = 7

    def __attrs_post_init__(self) -> None:
        self.made += 1


def test_what_a_class_made_of_its_bytes_is_encoded() -> None:
    """Defaults, converters and hooks run when a state is read: the bytes that it came from say less."""
    snapshot, application = json_snapshot(Application(handler=handler, state=Counted))
    came = b'{"name":"y","made":1}'
    state = application.decode_state(came, application.schema)
    snapshot.begin(state, came)
    assert snapshot.encoded(state) is None
    assert snapshot.take(state) == b'{"name":"y","made":2,"added":7}'


def test_what_can_change_in_itself_is_encoded_each_time() -> None:
    """Nobody tells when a list grows."""
    snapshot, _ = json_snapshot()
    state: dict[str, Any] = {"log": []}
    assert snapshot.take(state) == b'{"log":[]}'
    state["log"].append(1)
    assert snapshot.take(state) == b'{"log":[1]}'


def test_an_error_is_passed_on_and_forgotten() -> None:
    """What could not be encoded is neither taken for the last state nor for unchanged."""
    snapshot, _ = json_snapshot()
    state: dict[str, Any] = {"a": 1, "b": 2}
    snapshot.take(state)
    state.update(a=3, b=10**5000)
    for _ in range(2):
        with pytest.raises(ValueError, match="4300"):
            snapshot.take(state)
    state["b"] = {1}
    with pytest.raises(Exception, match="does not serialise"):
        snapshot.take(state)
    state["b"] = 4
    assert snapshot.take(state) == b'{"a":3,"b":4}'


@attrs.define
class Player:
    name: str = "x"
    seen: int = 1000


def test_attrs_states_are_compared_by_their_fields() -> None:
    """The same object while no field is another object."""
    snapshot, _ = json_snapshot(Application(handler=handler, state=Player))
    state = Player()
    first = snapshot.take(state)
    assert snapshot.take(state) is first
    state.seen += 1
    assert snapshot.take(state) == b'{"name":"x","seen":1001}'


def test_a_codec_of_its_own_is_asked_unless_nothing_can_have_changed() -> None:
    """A dict of leaves and immutable values are compared; of anything else the codec may write what we cannot see."""
    asked: list[object] = []

    def encode(state: object) -> bytes:
        asked.append(state)
        return repr(state).encode()

    application: Application[Any] = Application(handler=handler, encode=encode, decode=lambda *_: None)
    for state, times in (({"a": 1}, 1), (b"bytes", 1), ("text", 1), (Player(), 3), ([1], 3), ({"a": [1]}, 3)):
        snapshot, _ = json_snapshot(application)
        asked.clear()
        assert [snapshot.take(state) for _ in range(3)] == [repr(state).encode()] * 3
        assert len(asked) == times, state
