"""
Hot upgrades for servers: live connections survive a reload.

The names that application authors import. They are loaded at their first use: the holder imports this package too, and
stays free of asyncio and of the worker's library.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from copyover.errors import ConnectionClosed, CopyoverError, LimitExceeded, Moved
    from copyover.worker.application import Application
    from copyover.worker.connection import Connection

__version__ = "0.1.0"

__all__ = [
    "Application",
    "Connection",
    "ConnectionClosed",
    "CopyoverError",
    "LimitExceeded",
    "Moved",
    "__version__",
]

_HOMES = {
    "Application": "copyover.worker.application",
    "Connection": "copyover.worker.connection",
    "ConnectionClosed": "copyover.errors",
    "CopyoverError": "copyover.errors",
    "LimitExceeded": "copyover.errors",
    "Moved": "copyover.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
