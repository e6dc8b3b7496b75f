"""An application under uvicorn alone: what its clients live through without copyover. It never waits for readiness."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path


class Uvicorn:
    """
    One uvicorn after the other on the same listener.

    The listener is ours: whoever connects before uvicorn accepts, or between two of them, waits in its backlog.
    """

    def __init__(self, app: str, directory: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._directory = directory
        number = str(self._listener.fileno())
        self._command = [sys.executable, "-m", "uvicorn", app, "--fd", number, "--log-level", "critical"]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        keep = (self._listener.fileno(),)
        return subprocess.Popen(self._command, cwd=self._directory, pass_fds=keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._listener.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """End it without a goodbye, and start another one."""
        self._kill()
        self._process = self._start()
