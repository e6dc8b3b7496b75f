"""
What an ASGI application says to copyover; under any other server all of it changes nothing.

A coroutine cannot travel. An application that keeps what it must not lose in
``scope["extensions"]["copyover"]["state"]`` can be entered again from its top in another process, on the same
connection: it says so here.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeVar, overload

import attrs

from copyover.errors import CopyoverError

__all__ = ["Share", "resumable", "resumed", "share", "state"]

EXTENSION = "copyover"
F = TypeVar("F", bound=Callable[..., Any])
Scope = MutableMapping[str, Any]

# The extension of the scope that the running task serves.
entered: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("copyover.asgi", default=None)


@attrs.frozen
class Route:
    """A part of the application that can be entered again: the version of its states, and those that it reads."""

    version: int
    reads: frozenset[int]


@attrs.frozen
class Share:
    """What the whole application carries over, once a generation."""

    export: Callable[[], Any]
    import_: Callable[[Any], None]
    version: int
    reads: frozenset[int]


routes: dict[str, Route] = {}
shares: list[Share] = []


def extension(scope: object) -> dict[str, Any]:
    """
    Return ``scope["extensions"]["copyover"]``; under another server an empty one is put there.

    *scope* may be anything that has one: Starlette's ``Request`` and ``WebSocket`` do.
    """
    found: Any = scope if isinstance(scope, MutableMapping) else getattr(scope, "scope", None)
    if not isinstance(found, MutableMapping):
        raise TypeError(f"an ASGI scope is needed, or an object that has one; this is {type(scope).__name__}")
    made: dict[str, Any] = found.setdefault("extensions", {}).setdefault(EXTENSION, {"state": {}, "resumed": False})
    return made


def state(scope: object) -> dict[str, Any]:
    """Return the state of the connection: a dict of JSON types that travels with it."""
    found: dict[str, Any] = extension(scope)["state"]
    return found


def resumed(scope: object) -> bool:
    """Whether the application is entered again: its client knows nothing of that."""
    return bool(extension(scope)["resumed"])


@overload
def resumable(
    scope: None = None, /, *, version: int = ..., reads: Iterable[int] = ..., name: str = ...
) -> Callable[[F], F]: ...


@overload
def resumable(scope: object, /, *, version: int = ...) -> dict[str, Any]: ...


def resumable(
    scope: object = None, /, *, version: int = 1, reads: Iterable[int] = (), name: str = ""
) -> dict[str, Any] | Callable[[F], F]:
    """
    Say that the application can be entered again from its top, with its state restored.

    Called with a *scope* it says so of that connection, and returns its state. Called without, it decorates a route:
    a raw ASGI application, or an endpoint of Starlette or FastAPI.

    *version* is that of the state. A route whose replacement reads another version only (*reads*, and *version* itself)
    stays in the incumbent; of a single connection the version is told in the extension, as ``version``.
    *name* is how the replacement finds the route; module and name of the function if it is not given.
    """
    if scope is not None:
        found = extension(scope)
        _say(found, "", version)
        mine: dict[str, Any] = found["state"]
        return mine
    return functools.partial(_decorate, version=version, reads=frozenset({version, *reads}), name=name)


def share(
    export: Callable[[], Any], import_: Callable[[Any], None], *, version: int = 1, reads: Iterable[int] = ()
) -> None:
    """
    Carry over what the whole application knows, once a generation, before any connection of a cut is entered.

    *export* is called in the incumbent once its WebSockets and streams have stopped, and returns JSON types or bytes;
    *import_* is called with that in the replacement, once for each worker that it comes from. What either raises rolls
    the reload back, as does a version that the replacement does not read.
    """
    if shares:
        raise CopyoverError("copyover.asgi.share was called before: one pair of functions carries all of it")
    shares.append(Share(export, import_, version, frozenset({version, *reads})))


def _say(found: dict[str, Any], name: str, version: int) -> None:
    said = found.get("resumable")
    if said is not None:
        said(name, version)


def _decorate(route: F, *, version: int, reads: frozenset[int], name: str) -> F:
    called = route if hasattr(route, "__qualname__") else type(route)  # an object has no name of its own
    name = name or f"{called.__module__}.{called.__qualname__}"
    told = routes.setdefault(name, Route(version, reads))
    if told.version != version:
        raise CopyoverError(
            f"two resumable routes are called {name}, with states of versions {told.version} and {version}: give one "
            f"of them a name of its own, resumable(name=…)"
        )

    def say(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = entered.get()
        if found is None:  # another server: what the route looks for has to be there
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, MutableMapping) or hasattr(argument, "scope"):
                    extension(argument)
        else:
            _say(found, name, version)

    if inspect.isclass(route):
        return _decorate_class(route, say)  # type: ignore[return-value]  # a subclass of what was given
    if inspect.iscoroutinefunction(route) or inspect.iscoroutinefunction(getattr(route, "__call__", None)):  # noqa: B004  # an object's

        @functools.wraps(route, updated=())
        async def enter(*args: Any, **kwargs: Any) -> Any:
            say(args, kwargs)
            return await route(*args, **kwargs)

        return enter  # type: ignore[return-value]  # the same signature

    @functools.wraps(route, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        say(args, kwargs)
        return route(*args, **kwargs)

    return call  # type: ignore[return-value]  # the same signature


def _decorate_class(route: type, say: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> type:
    """Endpoints that are classes are made with the scope, and then awaited."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        say(args, kwargs)
        route.__init__(self, *args, **kwargs)  # type: ignore[misc]  # a class, found by inspect

    return type(route.__name__, (route,), {"__init__": make, "__module__": route.__module__, "__doc__": route.__doc__})
