"""Processes of another user, for tests that root alone can run: an interpreter that user can execute, and its pids."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

import copyover

if TYPE_CHECKING:
    from collections.abc import Iterator

STRANGER = 61_617  # a uid without a name, a process or a limit of anybody else's
NOBODY = "nobody"
DEADLINE_S = 30.0

# Where this interpreter lies in a home directory that is closed to others, the system's has to do.
PATHS = os.pathsep.join([str(Path(copyover.__file__).parent.parent), sysconfig.get_path("purelib")])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")


@functools.cache
def python() -> str:
    """Return an interpreter that everybody can run with copyover, or skip the test."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        command = [candidate, "-P", "-c", "import copyover.cli, copyover.holder.daemon, copyover.worker.runtime"]
        try:
            done = subprocess.run(
                command,
                user=STRANGER,
                group=STRANGER,
                extra_groups=[],
                env=ENVIRONMENT,
                capture_output=True,
                check=False,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    pytest.skip("there is no interpreter that another user can run with copyover")


@contextlib.contextmanager
def running(
    *command: str, user: int, environment: dict[str, str], limit: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Run *command* as *user*, with at most *limit* descriptors; yield it with its output, end it with SIGTERM."""
    limited = [] if limit is None else ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
    process = subprocess.Popen(
        [*limited, *command],
        user=user,
        group=user,
        extra_groups=[],
        env=ENVIRONMENT | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.terminate()


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
