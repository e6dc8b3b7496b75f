"""What the user's program is: how it is found, what is refused of it, and how its state becomes bytes."""

from __future__ import annotations

import collections
import enum
import itertools
import math
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copyover import errors
from copyover.errors import ApplicationNotFound, CopyoverError, NotAHandler, StartupFailed
from copyover.worker.application import Application, json_bytes
from copyover.worker.application import load as load_any
from copyover.worker.served import CannotFreeze

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from copyover.worker.connection import Connection


def load(spec: str, app_dir: str) -> Application[Any]:
    found = load_any(spec, app_dir)
    assert isinstance(found, Application)
    return found


_numbers = itertools.count()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


async def handler(connection: Connection[Any]) -> None:
    del connection


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of a name that no other test has; return that name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    made: list[str] = []

    def write(text: str) -> str:
        made.append(f"application_under_test_{next(_numbers)}")
        (tmp_path / f"{made[-1]}.py").write_text(textwrap.dedent(text))
        return made[-1]

    yield write
    for name in made:
        sys.modules.pop(name, None)


# ---- state


@given(json_values)
def test_a_state_comes_out_as_it_went_in(value: object) -> None:
    """What passes as JSON is equal and of the same types afterwards, whatever is in it."""
    application: Application[Any] = Application(handler=handler)
    back = application.decode_state(application.encode_state(value), 1)
    assert back == value
    assert repr(back) == repr(value)


@attrs.define
class Player:
    name: str = "?"
    seen: list[int] = attrs.field(factory=list)


@attrs.define
class Secretive:
    _secret: int = 1


@attrs.define
class Pair:
    left: object = None


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {1: 2}}, "state['a'] has the key 1 of type int"),
        ({"a": [0, (1, 2)]}, "state['a'][1] is of type tuple"),
        ({"a": b"x"}, "state['a'] is of type bytes"),
        ({"a": {1, 2}}, "state['a'] is of type set"),
        ({"a": [{"b": math.nan}]}, "state['a'][0]['b'] is NaN"),
        ({"a": Colour.RED}, "state['a'] is of type Colour"),
        ({"a": Text("x")}, "state['a'] is of type Text"),
        ({Text("x"): 1}, "has the key 'x' of type Text"),
        (collections.OrderedDict(), "state is of type OrderedDict"),
        ({"a": collections.Counter()}, "state['a'] is of type Counter"),
        (object(), "state is of type object"),
    ],
)
def test_what_would_come_out_as_something_else_is_refused(state: object, path: str) -> None:
    """The sentence says where in the state it is."""
    application: Application[Any] = Application(handler=handler)
    with pytest.raises(CannotFreeze) as caught:
        application.encode_state(state)
    assert path in str(caught.value)


def test_the_remedy_is_said() -> None:
    """A codec of the application's own takes anything."""
    with pytest.raises(CannotFreeze, match="give the Application encode and decode"):
        json_bytes(set(), "shared")


def test_a_state_of_an_attrs_class() -> None:
    """Its fields travel, and it is the same class again."""
    application = Application(handler=handler, state=Player)
    player = Player("zed", [1, 2])
    assert application.decode_state(application.encode_state(player), 1) == player


def test_a_state_of_an_attrs_class_with_private_fields() -> None:
    """Their names differ from those of its arguments."""
    application = Application(handler=handler, state=Secretive)
    assert application.decode_state(application.encode_state(Secretive(7)), 1) == Secretive(7)


def test_a_field_that_is_no_json_is_refused_by_its_name() -> None:
    """As a key of a dict is."""
    application = Application(handler=handler, state=Pair)
    with pytest.raises(CannotFreeze, match=r"state\['left'\] is of type frozenset"):
        application.encode_state(Pair(frozenset()))


def test_a_state_of_another_class_than_declared_is_refused() -> None:
    """It would come out as the declared one, or as a dict: neither went in."""
    application: Application[Any] = Application(handler=handler, state=Player)
    with pytest.raises(CannotFreeze):
        application.encode_state(Pair(1))
    undeclared: Application[Any] = Application(handler=handler, state=lambda: Player("made by a function"))
    with pytest.raises(CannotFreeze):
        undeclared.encode_state(undeclared.state())


def test_a_codec_of_the_application() -> None:
    """It gets the schema that the bytes were written with, and must give bytes."""
    reads: Any = {1}
    application: Application[Any] = Application(
        handler=handler,
        schema=2,
        reads=reads,
        encode=lambda state: state,
        decode=lambda data, schema: (data, schema),
    )
    assert application.readable == [1, 2]
    assert application.decode_state(application.encode_state(b"\x00"), 1) == (b"\x00", 1)
    with pytest.raises(CannotFreeze, match="encode gave str instead of bytes"):
        application.encode_state("text")


def test_one_schema_is_read_unless_more_are_said() -> None:
    """A release reads at least what it writes."""
    assert Application(handler=handler).readable == [1]
    assert Application(handler=handler, schema=5).readable == [5]


# ---- finding it


def test_a_handler_is_found(module: Callable[[str], str], tmp_path: Path) -> None:
    """A bare coroutine function is an application."""
    name = module("async def main(connection): pass")
    application = load(f"{name}:main", str(tmp_path))
    assert application.handler.__name__ == "main"
    assert application.startup is application.shutdown is application.export_shared is None


def test_siblings_of_a_handler_belong_to_it(module: Callable[[str], str], tmp_path: Path) -> None:
    """Startup, shutdown and shared state are the functions of these names beside it."""
    name = module(
        """
        async def main(connection): pass
        async def startup(): pass
        async def shutdown(): pass
        def export_shared(): return 5
        def import_shared(shared): pass
        """
    )
    application = load(f"{name}:main", str(tmp_path))
    assert application.startup is not None
    assert application.shutdown is not None
    assert application.import_shared is not None
    assert application.export_shared is not None
    assert application.export_shared() == 5


@pytest.mark.parametrize("sibling", ["startup", "shutdown"])
def test_a_sibling_that_is_no_coroutine_is_refused(module: Callable[[str], str], tmp_path: Path, sibling: str) -> None:
    """It would be called and never awaited."""
    name = module(f"async def main(connection): pass\ndef {sibling}(): pass\n")
    with pytest.raises(NotAHandler, match=rf"{name}\.{sibling} stands beside the handler and is no async def"):
        load(f"{name}:main", str(tmp_path))


def test_an_application_is_taken_as_it_is(module: Callable[[str], str], tmp_path: Path) -> None:
    """Its siblings are its own affair."""
    name = module(
        """
        from copyover.worker.application import Application
        async def main(connection): pass
        def startup(): pass
        class inner:
            app = Application(handler=main, schema=3)
        """
    )
    assert load(f"{name}:inner.app", str(tmp_path)).schema == 3


def test_a_factory_is_called(module: Callable[[str], str], tmp_path: Path) -> None:
    """A function without arguments gives the application, or the handler."""
    name = module(
        """
        from copyover.worker.application import Application
        async def main(connection): pass
        def application(): return Application(handler=main, schema=4)
        def bare(): return main
        """
    )
    assert load(f"{name}:application", str(tmp_path)).schema == 4
    assert load(f"{name}:bare", str(tmp_path)).handler.__name__ == "main"


def test_an_object_with_an_async_call_is_a_handler(module: Callable[[str], str], tmp_path: Path) -> None:
    """A handler need not be a function."""
    name = module(
        """
        class Room:
            async def __call__(self, connection): pass
        room = Room()
        """
    )
    assert type(load(f"{name}:room", str(tmp_path)).handler).__name__ == "Room"


@pytest.mark.parametrize(
    ("text", "attribute", "kind", "says"),
    [
        ("x = 5", "x", NotAHandler, "is of type int"),
        ("def main(connection): pass", "main", NotAHandler, "is no coroutine function"),
        ("async def main(): pass", "main", NotAHandler, "takes 0 arguments; a handler takes one"),
        ("async def main(a, b): pass", "main", NotAHandler, "takes 2 arguments"),
        ("def make(): return 5", "make", NotAHandler, r"what .*:make\(\) made is of type int"),
        ("def make(): return make", "make", NotAHandler, "is no coroutine function"),
        (
            "def make(): raise ValueError('no config')",
            "make",
            StartupFailed,
            "the factory .* raised ValueError: no config",
        ),
        ("x = 5", "y", ApplicationNotFound, r"has no y"),
        ("x = 5", "x.y", ApplicationNotFound, r"has no x\.y"),
        ("1 / 0", "x", StartupFailed, "raised ZeroDivisionError"),
        ("def broken(:", "x", StartupFailed, "raised SyntaxError"),
        ("import no_such_module_at_all", "x", StartupFailed, "No module named 'no_such_module_at_all'"),
    ],
)
def test_what_is_no_application_is_said(  # noqa: PLR0917  # a table
    module: Callable[[str], str], tmp_path: Path, text: str, attribute: str, kind: type[CopyoverError], says: str
) -> None:
    """Absent, of another kind, or failing: three errors with three exit codes."""
    name = module(text)
    with pytest.raises(kind, match=says):
        load(f"{name}:{attribute}", str(tmp_path))


@pytest.mark.parametrize("spec", ["", "module", ":main", "module:"])
def test_a_spec_names_module_and_attribute(spec: str, tmp_path: Path) -> None:
    """Both of them."""
    with pytest.raises(ApplicationNotFound, match="write module:attribute"):
        load(spec, str(tmp_path))


def test_a_module_that_is_absent_is_told_apart_from_its_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user looks in the right place: the directory is named, and how to say another."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ApplicationNotFound, match=rf"no module no_such_app in {tmp_path}; say --app-dir"):
        load("no_such_app:main", str(tmp_path))
    with pytest.raises(ApplicationNotFound, match=r"no module no_such_app\.inner"):
        load("no_such_app.inner:main", str(tmp_path))


# ---- exit codes


def all_errors(kind: type[CopyoverError] = CopyoverError) -> Iterator[type[CopyoverError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from all_errors(narrower)


def test_exit_codes_are_as_documented() -> None:
    """One number an error, and none of two; the tree in errors.py is complete."""
    codes = {
        kind.__name__: kind.exit_code
        for kind in all_errors()
        if kind.__module__ == errors.__name__ and "exit_code" in vars(kind) and kind is not CopyoverError
    }
    assert codes == {
        "UsageError": 2,
        "ChangeRefused": 3,
        "HolderAbsent": 6,
        "ApplicationNotFound": 10,
        "NotAHandler": 11,
        "AddressInUse": 12,
        "PermissionRefused": 13,
        "BadAddress": 14,
        "HolderExists": 15,
        "UnsafeRuntimeDirectory": 16,
        "PythonNotFound": 17,
        "StartupFailed": 18,
    }
    assert errors.__doc__ is not None
    for kind in all_errors():
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in errors.__doc__
