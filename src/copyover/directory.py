"""
Where a holder can be found: the runtime directory of its name, and the lock that says it lives.

It decides whether a directory can be trusted; it speaks with nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import struct
from pathlib import Path

import attrs

from copyover.errors import HolderExists, PermissionRefused, UnsafeRuntimeDirectory, UsageError

_FLOCK = struct.Struct("@hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid; 64-bit. fcntl_locking(2)
_LONGEST_SOCKET_PATH = 107  # sun_path without its NUL. unix(7)


@attrs.frozen
class Directory:
    """The runtime directory of one holder."""

    path: Path

    @property
    def control(self) -> Path:
        return self.path / "control.sock"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def workers(self) -> Path:
        """Where workers find a new holder; it is there while one waits for them."""
        return self.path / "workers.sock"

    @property
    def key(self) -> Path:
        """The secret of the name, by which a new holder knows its workers."""
        return self.path / "key"


def of(name: str) -> Directory:
    """
    Return the directory of the holder *name*, which need not exist.

    Raises:
        UsageError: the name cannot be one of a directory, or the path of its socket would be too long.

    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} cannot be a holder's name: letters, digits, '.', '_' and '-' can")
    named = Directory(_root() / name)
    if len(os.fsencode(named.control)) > _LONGEST_SOCKET_PATH:
        raise UsageError(f"{named.control} is too long for a socket; set COPYOVER_RUNTIME_DIR to a shorter one")
    return named


def _root() -> Path:
    if own := os.environ.get("COPYOVER_RUNTIME_DIR"):
        return Path(own)
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "copyover"
    return Path("/run/copyover")


def default_name() -> str:
    return os.environ.get("COPYOVER_NAME") or "default"


def prepare(directory: Directory, *, is_shared: bool = False) -> None:
    """
    Make the directory, 0700, and see that nobody else can write it.

    *is_shared*: 0711, so that other users can open in it by name what is theirs to open.

    Raises:
        UnsafeRuntimeDirectory: others may write it or its parent.
        PermissionRefused: it cannot be made, or others cannot pass through to it.

    """
    try:
        with contextlib.suppress(FileExistsError):
            directory.path.parent.mkdir(mode=0o700, parents=True)
            if is_shared:
                directory.path.parent.chmod(0o711)
        with contextlib.suppress(FileExistsError):
            directory.path.mkdir(mode=0o700)
    except OSError as problem:
        sentence = (
            f"{directory.path} cannot be made: {problem.strerror}; set COPYOVER_RUNTIME_DIR to a directory of yours"
        )
        raise PermissionRefused(sentence) from problem
    if not directory.path.is_dir():
        raise UnsafeRuntimeDirectory(f"{directory.path} is no directory; remove it, or set COPYOVER_RUNTIME_DIR")
    for path in (directory.path, directory.path.parent):
        found = path.stat()
        others = stat.S_IMODE(found.st_mode) & 0o022
        if found.st_uid not in (os.geteuid(), 0) or (others and not found.st_mode & stat.S_ISVTX):
            raise UnsafeRuntimeDirectory(
                f"{path} belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: others could "
                f"replace its sockets; chmod 700 it, or set COPYOVER_RUNTIME_DIR to a directory of yours"
            )
    if is_shared:
        _open_to_others(directory)


def _open_to_others(directory: Directory) -> None:
    try:
        directory.path.chmod(0o711)
    except OSError as problem:
        raise PermissionRefused(f"{directory.path} cannot be opened to others: {problem.strerror}") from problem
    for path in directory.path.parents:
        if not path.stat().st_mode & stat.S_IXOTH:
            raise PermissionRefused(
                f"other users cannot pass through {path} to the runtime directory, as user and control_group need; "
                f"chmod o+x it, or set COPYOVER_RUNTIME_DIR"
            )


def take_lock(directory: Directory, name: str) -> int:
    """
    Return the locked descriptor that proves that the holder *name* is this process; it survives execve.

    Raises:
        HolderExists: a living process has it.
        PermissionRefused: the lock's file cannot be opened.

    """
    try:
        descriptor = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        sentence = (
            f"{directory.lock} cannot be opened: {problem.strerror}; set COPYOVER_RUNTIME_DIR to a directory of yours"
        )
        raise PermissionRefused(sentence) from problem
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as held:
        pid = os.pread(descriptor, 32, 0).decode().strip()
        os.close(descriptor)
        raise HolderExists(
            f"a holder named {name!r} is running (pid {pid}); reload it with: copyover reload {name}, or choose --name",
            pid=int(pid) if pid.isdecimal() else None,
        ) from held
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def starting_pid(directory: Directory) -> int | None:
    """Return the pid of a holder that has taken the name and is not ready to be asked; None if there is none."""
    try:
        pid = int(directory.lock.read_text(encoding="ascii"))
        program = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"copyover.holder" in program else None


def draw_key(directory: Directory) -> None:
    """Draw a new secret; workers of an earlier holder are strangers from here on."""
    temporary = directory.key.with_suffix(f".{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(16))
    temporary.rename(directory.key)


def read_key(directory: Directory) -> str:
    """Return the secret; empty where there is none, which no worker has."""
    try:
        return directory.key.read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


def room_bytes(directory: Directory) -> int | None:
    """Return what files of slots may take there, those of living workers included; None without a limit."""
    found = os.statvfs(directory.path)
    if found.f_blocks == 0:  # a tmpfs of any size. tmpfs(5)
        return None
    taken = sum(path.stat().st_blocks * 512 for path in directory.path.glob("worker-*"))
    return found.f_bavail * found.f_frsize + taken


def registered(directory: Directory) -> dict[Path, int]:
    """
    Return the files of all workers that were ever registered and not buried, each with its worker's pid; 0 is dead.

    A worker locks its file for as long as it lives; no child of it has that lock. fcntl_locking(2), F_GETLK
    """
    found = sorted(directory.path.glob("worker-*"))
    return {path: registered_pid(path) for path in found if path.is_file() and not path.is_symlink()}


def registered_pid(path: Path) -> int:
    """Return the pid of the worker that has this file, 0 if it is dead."""
    with path.open("r+b") as file:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else pid
