"""uvicorn as it is, the reference: what it does with a client is what copyover has to do after a move, too."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def plain_uvicorn(app: str, app_dir: str, *options: str) -> Iterator[tuple[str, int]]:
    """Serve *app*; yield the address."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        command = [sys.executable, "-m", "uvicorn", app, "--app-dir", app_dir, "--fd", str(listener.fileno()), *options]
        with subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL) as process:
            try:
                yield listener.getsockname()
            finally:
                os.kill(process.pid, signal.SIGKILL)  # its goodbyes are of no interest
