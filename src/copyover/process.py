"""
How other processes are started, watched and ended: the only spawn, pidfd and kill.

It decides nothing about them. Death is a readable pidfd, never the EOF of a channel: a forked child of a worker holds
that open. pidfd_open(2)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from copyover.errors import PermissionRefused, PythonNotFound
from copyover.limits import MOST_DESCRIPTORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from copyover.users import User


EXPENDABLE = 500  # what a process that is not needed yet has above ours
_HIGHEST_OOM_SCORE = 1000


SUCCEEDED = "exited with 0"

_children: set[int] = set()  # started here and not reaped yet


class Child:
    """
    A process known by its pid and the pidfd that this owns; ``fileno`` is readable once it is dead.

    Who started it does not matter: children stay those of a process over its execve, and one that another holder
    started is watched and killed in the same way.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self.is_reaped = False
        _children.add(pid)

    def fileno(self) -> int:
        return self._pidfd

    def kill(self) -> None:
        """SIGKILL it; the pidfd names it even when its number is reused."""
        if self.is_reaped:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return  # it is dead and waits to be reaped

    def set_oom_score(self, above_ours: int) -> None:
        """
        Make it so much likelier than us to be killed when memory runs out. proc(5), oom_score_adj

        Raises:
            OSError: this user may not (EACCES), or it is dead.

        """
        ours = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
        theirs = min(ours + above_ours, _HIGHEST_OOM_SCORE)
        Path(f"/proc/{self.pid}/oom_score_adj").write_text(f"{theirs}\n", encoding="ascii")

    def kill_group(self) -> None:
        """SIGKILL it and what it started; it is not reaped, so the number is still its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> str:
        """Take its exit status, waiting for it if need be, and say in words how it ended."""
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:  # another holder started it: whoever adopted it has its status
            ended = None
            _wait_readable(self._pidfd)
        os.close(self._pidfd)
        self.is_reaped = True
        _children.discard(self.pid)
        if ended is None:
            return "ended"
        if ended.si_code == os.CLD_EXITED:
            return f"exited with {ended.si_status}"
        try:
            return f"was killed by {signal.Signals(ended.si_status).name}"
        except ValueError:
            return f"was killed by signal {ended.si_status}"


def _wait_readable(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def spawn(
    argv: Sequence[str],
    *,
    cwd: str,
    env: Mapping[str, str],
    inherit: Sequence[int],
    stderr: int,
    stdout: int | None = None,
    user: User | None = None,
) -> Child:
    """
    Start *argv* as a child in a process group of its own, with the descriptors *inherit* open under their numbers.

    Without *stdout* it has ours. With *user* it has the rights of that user and its groups, and those of no other.

    All other descriptors of ours are close-on-exec, so that the child need not walk over thousands of them.

    Raises:
        PythonNotFound: *argv[0]* does not exist.
        PermissionRefused: it cannot be executed, or *cwd* cannot be entered.

    """
    for descriptor in inherit:
        os.set_inheritable(descriptor, True)
    try:
        popen = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            close_fds=False,
            process_group=0,  # a terminal's Ctrl-C reaches the holder alone
            user=None if user is None else user.uid,
            group=None if user is None else user.gid,
            extra_groups=None if user is None else user.groups,
        )
        popen.returncode = 0  # so that Popen reaps nothing: a Child does, by the pidfd
        return Child(popen.pid, os.pidfd_open(popen.pid))
    except FileNotFoundError as missing:
        if not os.path.isdir(cwd):  # noqa: PTH112  # a borrowed string
            raise PythonNotFound(f"the release's directory {cwd} is gone; put it back, or reload another") from missing
        if os.access(argv[0], os.X_OK):
            raise PythonNotFound(
                f"{argv[0]} is there and cannot run: the interpreter of its own is missing"
            ) from missing
        raise PythonNotFound(f"there is no {missing.filename}; say --python, or make the venv first") from missing
    except PermissionError as refused:
        who = "" if user is None else f" by user {user.name}"
        what = f"{refused.filename or argv[0]} cannot be run or entered{who}: {refused.strerror}"
        raise PermissionRefused(what) from refused
    finally:
        for descriptor in inherit:
            os.set_inheritable(descriptor, False)


def reap_orphans() -> None:
    """Reap adopted children (we may be PID 1); those that were started here are left to who watches their pidfds."""
    while True:
        try:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if dead is None or dead.si_pid in _children:
            return
        os.waitid(os.P_PID, dead.si_pid, os.WEXITED | os.WNOHANG)


def descriptor_limit() -> int:
    """Return how many descriptors this process, and a worker of it, may have."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MOST_DESCRIPTORS)


def raise_descriptor_limit() -> int:
    """
    Raise the soft NOFILE to the hard limit, grow the descriptor table to it once, and return it.

    A table that grows while descriptors arrive costs a synchronize_rcu at each doubling when threads live.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = min(hard, MOST_DESCRIPTORS)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, limit - 1))
    os.close(null)
    return limit
