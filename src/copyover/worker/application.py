"""
What the user's program is: its handler, its start and end, and how its state becomes bytes.

It finds and checks the application; it runs nothing of it but factories.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic

import attrs
from attrs.validators import ge, le

from copyover.errors import ApplicationNotFound, NotAHandler, StartupFailed
from copyover.worker.connection import Connection, S
from copyover.worker.served import CannotFreeze

if TYPE_CHECKING:
    from types import ModuleType

Hook = Callable[[], Awaitable[None]]
_JSON, _BYTES = b"j", b"b"  # how a shared state is written, its first byte
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_DECODER = json.JSONDecoder()
_JSON_LEAVES = frozenset({str, int, float, bool, type(None)})


def _frozen(schemas: Iterable[int]) -> frozenset[int]:
    return frozenset(schemas)


@attrs.frozen(kw_only=True)
class Application(Generic[S]):
    """
    A handler, and what belongs to it.

    Args:
        handler: ``async def handler(connection)``; entered once per connection, and again after each move.
        state: makes the state of a fresh connection: ``dict``, an attrs class of JSON types, or anything with a codec.
        schema: the number of the state's form, at most 65535; a release that changes the form changes the number.
        reads: the schemas that *decode* can read; only *schema* if not given.
        encode: the state as bytes; JSON if not given.
        decode: bytes and the schema that they were written with, as a state.
        startup: awaited before the worker says that it is ready; if it raises, the reload is refused.
        shutdown: awaited before a worker goes.
        export_shared: the state that the whole application shares, as JSON types or bytes, for a ``together`` move.
        import_shared: takes what *export_shared* of the incumbent gave, before any handler is entered.

    """

    handler: Callable[[Connection[S]], Awaitable[None]]
    state: Callable[[], S] = attrs.field(default=dict)  # type: ignore[assignment]  # S is dict then
    schema: int = attrs.field(default=1, validator=[ge(0), le(0xFFFF)])
    reads: frozenset[int] = attrs.field(converter=_frozen, default=frozenset[int]())
    encode: Callable[[S], bytes] | None = None
    decode: Callable[[bytes, int], S] | None = None
    startup: Hook | None = None
    shutdown: Hook | None = None
    export_shared: Callable[[], Any] | None = None
    import_shared: Callable[[Any], None] | None = None

    @property
    def readable(self) -> list[int]:
        return sorted(self.reads | {self.schema})

    def encode_state(self, state: S) -> bytes:
        """
        Return *state* as bytes.

        Raises:
            CannotFreeze: it would not come out as it went in.

        """
        if self.encode is not None:
            encoded = self.encode(state)
            if not isinstance(encoded, bytes):
                raise CannotFreeze(f"encode gave {type(encoded).__name__} instead of bytes")
            return encoded
        value: object = state
        kind: type = type(state)
        if attrs.has(kind):
            value = self._attrs_values(kind, state)
        return json_bytes(value, "state")

    def encode_shared(self) -> bytes | None:
        """Return what the application shares as bytes, None if it has none; what its code raises passes."""
        if self.export_shared is None:
            return None
        shared = self.export_shared()
        return _BYTES + shared if isinstance(shared, bytes) else _JSON + json_bytes(shared, "shared")

    def decode_shared(self, encoded: bytes) -> None:
        """
        Give the application what an incumbent shared; what its code raises passes.

        Raises:
            CannotFreeze: it takes none.

        """
        if self.import_shared is None:
            raise CannotFreeze("the incumbent shares state and this release has no import_shared")
        self.import_shared(json.loads(encoded[1:]) if encoded[:1] == _JSON else encoded[1:])

    def _attrs_values(self, kind: type, state: object) -> dict[str, Any]:
        if kind is not self.state:
            advice = f"give the Application state={kind.__name__}, or encode and decode"
            raise CannotFreeze(f"the state is of type {kind.__name__} and would come back as another: {advice}")
        fields = attrs.fields(kind)
        uninitialised = [field.name for field in fields if not field.init]
        if uninitialised:
            raise CannotFreeze(f"{kind.__name__}.{uninitialised[0]} has init=False: give encode and decode")
        return {field.alias or field.name: getattr(state, field.name) for field in fields}

    def decode_state(self, encoded: bytes, schema: int) -> S:
        """Return the state that *encoded* is, written with *schema*; whatever the application's code raises passes."""
        if self.decode is not None:
            return self.decode(encoded, schema)
        # Empty ones are many, and come thousands at a time.
        value = {} if encoded == b"{}" else _DECODER.decode(encoded.decode("utf-8", "surrogatepass"))
        is_attrs = self.state is not dict and isinstance(self.state, type) and attrs.has(self.state)
        made: Any = self.state(**value) if is_attrs else value
        return made  # type: ignore[no-any-return]  # it is what such an application declared


def json_bytes(value: object, name: str) -> bytes:
    """
    Return *value* as JSON.

    Raises:
        CannotFreeze: something in it is not a JSON type and would come back as another; names where.

    """
    wrong = _not_json(value, name)
    if wrong is not None:
        raise CannotFreeze(wrong)
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _not_json(value: object, path: str) -> str | None:
    kind = type(value)
    if kind in _JSON_LEAVES:
        return f"{path} is NaN, which equals nothing" if value != value else None  # noqa: PLR0124  # that is NaN
    if isinstance(value, list) and kind is list:
        return next(filter(None, (_not_json(item, f"{path}[{place}]") for place, item in enumerate(value))), None)
    if isinstance(value, dict) and kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                return f"{path} has the key {key!r} of type {type(key).__name__}, which JSON would turn into a string"
            wrong = _not_json(item, f"{path}[{key!r}]")
            if wrong is not None:
                return wrong
        return None
    return (
        f"{path} is of type {kind.__name__}, which does not serialise as JSON: give the Application encode and decode"
    )


@attrs.frozen
class Asgi:
    """An ASGI application (or WSGI, where *interface* says so): what a server is given instead of a handler."""

    app: Any
    interface: str


def load(spec: str, app_dir: str, *, interface: str = "auto", is_factory: bool = False) -> Application[Any] | Asgi:
    """
    Return the application that ``module:attribute`` names, factories included.

    *interface* is what it is taken for: ``handler``, ``asgi``, ``asgi2``, ``asgi3`` or ``wsgi``; ``auto`` looks.

    Raises:
        ApplicationNotFound: no such module or attribute.
        NotAHandler: what is there cannot serve connections.
        StartupFailed: importing it, or its factory, raised.

    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ApplicationNotFound(f"{spec!r} does not name an application: write module:attribute")
    if app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    module = _import(module_name, app_dir)
    found: object = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as missing:
            raise ApplicationNotFound(f"module {module_name} ({module.__file__}) has no {attribute}") from missing
    is_made = _is_factory(found) or (is_factory and callable(found))
    if is_made:
        assert callable(found)
        found, spec = _make(found, spec), f"what {spec}() made"
    if interface == "handler" or (interface == "auto" and not is_asgi(found)):
        return _application(found, spec, module)
    if not callable(found):
        raise NotAHandler(f"{spec} is of type {type(found).__name__}; an ASGI application is callable")
    return Asgi(found, interface)


def is_asgi(found: object) -> bool:
    """Whether it can be called as ``await app(scope, receive, send)``."""
    if isinstance(found, Application) or not callable(found) or inspect.isclass(found):
        return False
    return _required_parameters(found) == 3


def _is_factory(found: object) -> bool:
    if isinstance(found, Application) or not callable(found) or _is_coroutine_function(found):
        return False
    return _required_parameters(found) == 0


def _make(factory: Callable[[], object], spec: str) -> object:
    try:
        return factory()
    except Exception as problem:
        raise StartupFailed(f"the factory {spec} raised {type(problem).__name__}: {problem}") from problem


def _is_coroutine_function(found: object) -> bool:
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(getattr(found, "__call__", None))  # noqa: B004


def _import(name: str, app_dir: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not (name == missing.name or name.startswith(missing.name + ".")):
            raise StartupFailed(f"importing {name} failed: {missing}") from missing
        raise ApplicationNotFound(f"there is no module {name} in {app_dir}; say --app-dir or --chdir") from missing
    except Exception as problem:
        raise StartupFailed(f"importing {name} raised {type(problem).__name__}: {problem}") from problem


def _application(found: object, spec: str, module: ModuleType) -> Application[Any]:
    if isinstance(found, Application):
        return found
    needed = "an async def handler(connection), or an ASGI application, is needed"
    if not callable(found):
        raise NotAHandler(f"{spec} is of type {type(found).__name__}; {needed}")
    count = _required_parameters(found)
    if not _is_coroutine_function(found):
        hint = " (a WSGI application is served with --interface wsgi)" if count == 2 else ""
        raise NotAHandler(f"{spec} is no coroutine function; {needed}{hint}")
    if count != 1:
        raise NotAHandler(
            f"{spec} takes {count} arguments; a handler takes one, the connection, an ASGI application three"
        )
    return _with_siblings(found, module)


def _required_parameters(found: Callable[..., object]) -> int:
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return -1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)


def _with_siblings(handler: Callable[..., Any], module: ModuleType) -> Application[Any]:
    """A bare handler's startup, shutdown and shared state are the functions of these names beside it."""
    names = ("startup", "shutdown", "export_shared", "import_shared")
    siblings: dict[str, Any] = {name: getattr(module, name, None) for name in names}
    for name in ("startup", "shutdown"):
        if siblings[name] is not None and not inspect.iscoroutinefunction(siblings[name]):
            raise NotAHandler(f"{module.__name__}.{name} stands beside the handler and is no async def")
    return Application(handler=handler, **siblings)
