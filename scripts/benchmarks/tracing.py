"""
The system calls that a process makes while a block runs, told by strace.

It counts; what they should be is for whoever asks.
"""

from __future__ import annotations

import collections
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

DEADLINE_S = 30.0
_CALL = re.compile(r"^\d+ +(\w+)\(")


class CannotTrace(Exception):
    """There is no strace, or it may not trace; the text says which."""


class Trace:
    """
    Traces *pid* from the start of a ``with`` block to its end; then ``calls`` has how many it made, by name.

    What it waits in at the end is not counted, what it waited in at the start is.

    Raises:
        CannotTrace: on entering.

    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.calls: collections.Counter[str] = collections.Counter()
        self.text = ""

    def __enter__(self) -> Self:
        if shutil.which("strace") is None:
            raise CannotTrace("there is no strace here")
        self._file = tempfile.NamedTemporaryFile("r", prefix="strace-", encoding="utf-8", errors="replace")
        command = ["strace", "-f", "-e", "signal=none", "-s", "16", "-o", self._file.name, "-p", str(self._pid)]
        self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._strace.stderr is not None
        said = self._strace.stderr.readline()
        if "attached" not in said:
            self._end()
            raise CannotTrace(said.strip() or "strace said nothing")
        return self

    def __exit__(self, *_: object) -> None:
        self.text = self._end()
        for line in self.text.splitlines():
            call = _CALL.match(line)
            if call is not None and not line.endswith("<detached ...>"):
                self.calls[call[1]] += 1

    def _end(self) -> str:
        self._strace.send_signal(signal.SIGINT)  # it detaches
        self._strace.communicate(timeout=DEADLINE_S)
        with self._file:
            return Path(self._file.name).read_text(encoding="utf-8", errors="replace")
