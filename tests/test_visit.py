"""One entry of an application: what of its state travels, and which release can go on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import asgi
from copyover.adapters.visit import Visit, check_readable
from copyover.worker.application import json_bytes
from copyover.worker.served import CannotFreeze

if TYPE_CHECKING:
    from collections.abc import Iterator

STATES = st.dictionaries(
    st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers(), max_size=2)
)


@pytest.fixture
def _routes() -> Iterator[None]:
    before = dict(asgi.routes)
    asgi.routes.clear()
    asgi.routes["shop.chat"] = asgi.Route(3, frozenset({1, 3}))
    yield
    asgi.routes.clear()
    asgi.routes.update(before)


@given(st.lists(STATES, min_size=1, max_size=4))
def test_its_state_as_it_is_now(states: list[dict[str, Any]]) -> None:
    """Whether the dict is changed or replaced, each time anew."""
    visit = Visit()
    extension = visit.extension()
    for state in states:
        extension["state"] = state
        assert visit.state_bytes(extension) == json_bytes(state, "state")
        state["more"] = len(state)
        assert visit.state_bytes(extension) == json_bytes(state, "state")
        extension["state"].clear()
        assert visit.state_bytes(extension) == b"{}"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([1], "its state is of type list instead of dict"),
        (None, "its state is of type NoneType instead of dict"),
        (b"{}", "its state is of type bytes instead of dict"),
        ({1: 2}, "state has the key 1 of type int, which JSON would turn into a string"),
        ({"a": {"b": [1, {2}]}}, r"state\['a'\]\['b'\]\[1\] is of type set"),
        ({"a": (1,)}, r"state\['a'\] is of type tuple"),
        ({"a": float("nan")}, r"state\['a'\] is NaN"),
    ],
)
def test_a_state_that_would_come_back_as_another(state: object, words: str) -> None:
    """It is refused, with the place."""
    visit = Visit()
    extension = visit.extension()
    extension["state"] = state
    with pytest.raises(CannotFreeze, match=words):
        visit.state_bytes(extension)
    extension["state"] = {"a": 1}
    assert visit.state_bytes(extension) == b'{"a":1}'


def test_one_that_was_here_before_says_who_it_was() -> None:
    """Until its application says otherwise: it may move again before that."""
    visit, extension = Visit.again({"a": 1}, name="shop.chat", version=1)
    assert (visit.is_resumable, visit.name, visit.version) == (True, "shop.chat", 1)
    assert visit.state_bytes(extension) == b'{"a":1}'
    extension["resumable"]("shop.chat", 3)
    assert (visit.name, visit.version) == ("shop.chat", 3)


@pytest.mark.usefixtures("_routes")
@pytest.mark.parametrize(("name", "version"), [("shop.chat", 1), ("shop.chat", 3), ("", 0), ("", 9)])
def test_what_this_release_can_go_on_from(name: str, version: int) -> None:
    """A version that the route reads; or no route: the connection or the operator said so, and reads on its own."""
    check_readable(name, version)


@pytest.mark.usefixtures("_routes")
def test_what_this_release_cannot_go_on_from() -> None:
    """In words that name the route and both sides' versions."""
    with pytest.raises(CannotFreeze, match=r"^this release has no resumable route shop\.gone$"):
        check_readable("shop.gone", 1)
    with pytest.raises(CannotFreeze, match=r"^the state of shop\.chat is of version 2, this release reads 1, 3$"):
        check_readable("shop.chat", 2)
