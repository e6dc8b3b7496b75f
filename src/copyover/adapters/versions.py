"""
Which versions of uvicorn and of what it stands on the adapter knows, checked before anything is served.

It reads what is installed; it imports none of it.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import TYPE_CHECKING

from copyover.errors import StartupFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

# Tried with the tests: from the first, below the second. The extra copyover[uvicorn] says the same.
KNOWN: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "uvicorn": ((0, 52, 4), (0, 55)),
    "websockets": ((15,), (18,)),
}


def require() -> None:
    """
    See that uvicorn is installed.

    Raises:
        StartupFailed: it is not.

    """
    if _installed("uvicorn") is None:
        raise StartupFailed(
            f"this is an ASGI application, and {sys.executable} does not have uvicorn, which serves those: "
            f"pip install 'copyover[uvicorn]'"
        )


def check() -> None:
    """
    See that connections of the installed versions can move.

    Raises:
        StartupFailed: one is not known.

    """
    for name, (first, beyond) in KNOWN.items():
        version = _installed(name)
        if version is not None and not first <= _numbers(version) < beyond:
            raise StartupFailed(
                f"{name} {version} is not known to this copyover: {_words(first)} and later, below {_words(beyond)}, "
                f"are. Install one of those (pip install 'copyover[uvicorn]'), or say --handoff listeners: then the "
                f"listeners pass from release to release, and each connection ends in the release that accepted it"
            )


def check_parts(made: object, names: Iterable[str]) -> None:
    """
    See that a protocol object of uvicorn has what the adapter touches.

    Raises:
        StartupFailed: it lacks something.

    """
    missing = [name for name in names if not hasattr(made, name)]
    if missing:
        raise StartupFailed(
            f"uvicorn {_installed('uvicorn')} is not what it says, or was changed: its {type(made).__name__} has no "
            f"{', '.join(missing)}. Install it anew, or say --handoff listeners"
        )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _words(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
