"""
Hot upgrades for servers: live connections survive a reload.

The names that application authors import; the worker's half only, so that importing it costs little.
"""

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
