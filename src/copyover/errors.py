"""
What can go wrong, in words, with what to do.

It decides the exit code of each failure; it never prints and never exits.

    CopyoverError
    ├── Moved                     a push to a connection that has moved, and no holder to pass it on
    ├── ConnectionClosed          a write to a connection that has ended
    ├── LimitExceeded             a line, a message or an output queue over its limit
    ├── WireError                 a packet that the peer should not have sent
    │   ├── TruncatedPacket       the kernel dropped descriptors (MSG_CTRUNC)
    │   └── ChannelClosed         the peer is gone
    ├── IllegalEvent              an event that the state machine does not take in its phase
    ├── AuditImpossible           1   no account of the kernel to compare with
    ├── UsageError                2   flags and configuration
    │   ├── ConfigError           2   names file, line and key
    │   └── BadAddress            14
    ├── ChangeRefused             3   refused or rolled back, nothing lost
    ├── HolderAbsent              6
    ├── ApplicationNotFound       10
    ├── NotAHandler               11
    ├── AddressInUse              12
    ├── PermissionRefused         13
    ├── HolderExists              15
    ├── UnsafeRuntimeDirectory    16
    ├── PythonNotFound            17
    └── StartupFailed             18
"""

from __future__ import annotations

from typing import ClassVar


class CopyoverError(Exception):
    """The root. *exit_code* is what a command that fails with it exits with."""

    exit_code: ClassVar[int] = 1


class Moved(CopyoverError):
    """The connection was frozen here, and no holder lives that could pass on what is done to it."""


class ConnectionClosed(CopyoverError, ConnectionError):
    """The connection has ended: nothing can be written to it any more."""


class LimitExceeded(CopyoverError, ValueError):
    """The peer sent more than the handler allows for, or takes less than is pushed to it."""


class WireError(CopyoverError):
    """The peer broke the protocol; nothing of the packet was used."""


class TruncatedPacket(WireError):
    """The kernel dropped descriptors of a packet (MSG_CTRUNC); those that arrived are closed."""


class ChannelClosed(WireError):
    """The peer closed its end of the channel, or died."""


class AuditImpossible(CopyoverError):
    """The kernel cannot be asked from here, or says nothing of the holder's sockets: no account, and no accusation."""


class IllegalEvent(CopyoverError):
    """The event has no transition in this phase; nothing changed."""


class UsageError(CopyoverError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """
    A key of the configuration cannot be used.

    *file* and *line* are None where the value came from a flag.
    """

    def __init__(
        self, problem: str, *, key: str | None = None, file: str | None = None, line: int | None = None
    ) -> None:
        self.problem, self.key, self.file, self.line = problem, key, file, line
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(f"{where}{problem}" if key is None else f"{where}{key}: {problem}")


class BadAddress(UsageError):
    """An address of a listener that cannot be parsed."""

    exit_code = 14


class ChangeRefused(CopyoverError):
    """A reload was refused or rolled back; nothing was lost."""

    exit_code = 3


class HolderAbsent(CopyoverError):
    """No holder of that name listens on its control socket."""

    exit_code = 6


class ApplicationNotFound(CopyoverError):
    """The module cannot be found, or it has no such attribute."""

    exit_code = 10


class NotAHandler(CopyoverError):
    """What was found is neither a handler, nor an Application, nor a factory of one."""

    exit_code = 11


class AddressInUse(CopyoverError):
    """Another socket listens on that address."""

    exit_code = 12


class PermissionRefused(CopyoverError):
    """The kernel does not let this user do that."""

    exit_code = 13


class HolderExists(CopyoverError):
    """A living holder has the name; *pid* is None where its file does not say."""

    exit_code = 15

    def __init__(self, sentence: str, *, pid: int | None = None) -> None:
        self.pid = pid
        super().__init__(sentence)


class UnsafeRuntimeDirectory(CopyoverError):
    """Others may write the runtime directory, so anybody could replace its sockets."""

    exit_code = 16


class PythonNotFound(CopyoverError):
    """The interpreter of the release does not exist or cannot run."""

    exit_code = 17


class StartupFailed(CopyoverError):
    """The application's ``startup`` raised, or the worker died before it was ready."""

    exit_code = 18
