"""
How operators reach the holder: the server's half of the control socket.

One JSON object a line in each direction. It checks who asks and what the lines are; it knows no request.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import selectors
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copyover import succession
from copyover.errors import CopyoverError, PermissionRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.directory import Directory

log = logging.getLogger("copyover.holder")

LONGEST_REQUEST = 64 << 10
BACKLOG = 128
MOST_UNREAD = 8 << 20
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Linux 4.13
_MOST_GROUP_BYTES = 1024  # what getsockopt of Python takes: 256 groups


class BadRequest(CopyoverError):
    """A line that is no request; the sentence goes back to the sender."""


class Caller:
    """One connected operator."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._input = b""
        self._output = bytearray()
        self.number = number
        self.is_done = False

    @classmethod
    def inherit(cls, left: succession.Caller) -> Caller:
        """Take the caller of a predecessor over."""
        caller = cls(socket.socket(fileno=left.descriptor), left.number)
        caller._input, caller._output, caller.is_done = left.heard, bytearray(left.unsent), left.is_done
        return caller

    def left(self) -> succession.Caller:
        """Return what the successor needs to know."""
        return succession.Caller(
            number=self.number,
            descriptor=self.fileno(),
            heard=self._input,
            unsent=bytes(self._output),
            is_done=self.is_done,
        )

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._output)

    def is_permitted(self, group: int | None) -> bool:
        """Only this user, root and the members of *group* may command the holder. unix(7), SO_PEERCRED"""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, gid = struct.unpack("3i", credentials)
        return uid in (os.geteuid(), 0) or (group is not None and (gid == group or group in self._groups()))

    def _groups(self) -> tuple[int, ...]:
        """Return the supplementary groups that the caller had when it connected; none if they are too many."""
        try:
            found = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUP_BYTES)
        except OSError:  # ERANGE
            return ()
        return struct.unpack(f"{len(found) // 4}I", found)

    def requests(self) -> list[dict[str, Any]]:
        """
        Return the requests that have come.

        Raises:
            BadRequest: a line is no JSON object, or too long.
            EOFError: the caller has gone.

        """
        try:
            data = self._socket.recv(LONGEST_REQUEST)
        except BlockingIOError:
            return []
        except ConnectionError as gone:
            raise EOFError from gone
        if not data:
            raise EOFError
        *lines, self._input = (self._input + data).split(b"\n")
        if len(self._input) > LONGEST_REQUEST:
            raise BadRequest(f"a request is longer than {LONGEST_REQUEST} bytes")
        return [_request(line) for line in lines]

    def queue(self, answer: dict[str, Any], *, is_last: bool) -> None:
        """Queue one line."""
        self._output += json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.is_done = self.is_done or is_last

    def flush(self) -> None:
        """
        Send what is queued, as far as it goes.

        Raises:
            EOFError: the caller has gone, or reads nothing.

        """
        try:
            sent = self._socket.send(self._output)
        except BlockingIOError:
            sent = 0
        except ConnectionError as gone:
            raise EOFError from gone
        del self._output[:sent]
        if len(self._output) > MOST_UNREAD and not self.is_done:  # an answer may be long, a backlog may not
            raise EOFError

    def close(self) -> None:
        self._socket.close()


class Desk:
    """
    The control socket, and everybody who is connected to it: 0600, or 0660 and of *group*.

    Who is to answer is said when it opens; what is replied to a caller that has gone is dropped.
    """

    def __init__(
        self,
        directory: Directory,
        sock: socket.socket,
        watch: Callable[[Any, Callable[[], None], int], None],
        unwatch: Callable[[Any], None],
        group: int | None = None,
    ) -> None:
        self._directory = directory
        self._watch = watch
        self._unwatch = unwatch
        self._answer: Callable[[int, dict[str, Any]], None] = _nobody
        self._group = group
        self._socket = sock
        self._callers: dict[int, Caller] = {}
        self._numbers = itertools.count(1)
        self.denied = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def open(self, answer: Callable[[int, dict[str, Any]], None]) -> None:
        """Let callers in; *answer* is given the number of a caller and a request."""
        self._answer = answer
        self._watch(self, self.accept, selectors.EVENT_READ)

    def accept(self) -> None:
        """Let in whoever waits; this user, root and the group may speak."""
        try:
            sock, _ = self._socket.accept()
        except OSError as problem:
            if not isinstance(problem, (BlockingIOError, ConnectionAbortedError)):
                log.warning("event=caller-not-accepted problem=%r", str(problem))
            return
        number = next(self._numbers)
        caller = self._callers[number] = Caller(sock, number)
        if caller.is_permitted(self._group):
            self._watch(caller, lambda: self._hear(caller), selectors.EVENT_READ)
        else:
            self.denied += 1
            members = "" if self._group is None else ", and members of its control_group,"
            self.reply(number, {"denied": f"only the holder's own user and root{members} may command it"}, is_last=True)

    def left(self) -> succession.Desk:
        """Return what the successor needs to know; a caller's number is used up by it."""
        return succession.Desk(
            control=self.fileno(),
            next_caller=next(self._numbers),
            denied=self.denied,
            group=self._group,
            callers=[caller.left() for caller in self._callers.values()],
        )

    def inherit(self, left: succession.Desk) -> None:
        """Take the callers of a predecessor over."""
        self._numbers, self.denied = itertools.count(left.next_caller), left.denied
        for one in left.callers:
            caller = self._callers[one.number] = Caller.inherit(one)
            self._flush(caller)

    def is_present(self, number: int) -> bool:
        return number in self._callers

    def reply(self, number: int, answer: dict[str, Any], *, is_last: bool = False) -> None:
        """Send one line; after the last the caller is hung up on."""
        caller = self._callers.get(number)
        if caller is not None:
            caller.queue(answer, is_last=is_last)
            self._flush(caller)

    def close(self) -> None:
        """Go away; the file of the socket goes too."""
        for caller in list(self._callers.values()):
            self._hang_up(caller)
        self._unwatch(self)
        self._directory.control.unlink(missing_ok=True)
        self._socket.close()

    def _hear(self, caller: Caller) -> None:
        try:
            if caller.has_unsent:
                self._flush(caller)
                if not self.is_present(caller.number):
                    return  # that was its last answer
            for request in caller.requests():
                self._answer(caller.number, request)
        except BadRequest as problem:
            self.reply(caller.number, {"error": str(problem)}, is_last=True)
        except EOFError:
            self._hang_up(caller)
        except Exception:  # one request must never end the process that keeps every connection
            log.exception("event=request-failed")
            self.reply(caller.number, {"error": "the holder failed at this request; its log says where"}, is_last=True)

    def _flush(self, caller: Caller) -> None:
        try:
            caller.flush()
        except EOFError:
            self._hang_up(caller)
            return
        if caller.is_done and not caller.has_unsent:
            self._hang_up(caller)
        else:
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.has_unsent else 0)
            self._watch(caller, lambda: self._hear(caller), mask)

    def _hang_up(self, caller: Caller) -> None:
        """The caller has gone; what it asked for goes on."""
        if self._callers.pop(caller.number, None) is not None:
            self._unwatch(caller)
            caller.close()


def listen(directory: Directory, group: int | None = None) -> socket.socket:
    """
    Return the control socket of *directory*, 0600; with *group* 0660 and of that.

    Bound under a temporary name and renamed: a dead holder's socket is replaced (the lock says that it is dead).

    Raises:
        PermissionRefused: something else is in its place, or this user cannot give it to the group.

    """
    temporary = f"{directory.control}.{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(temporary)
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    try:
        if group is not None:
            os.chown(temporary, -1, group)
            Path(temporary).chmod(0o660)
        Path(temporary).rename(directory.control)
    except PermissionError as problem:
        Path(temporary).unlink()
        raise PermissionRefused(
            f"{directory.control} cannot be given to control_group (gid {group}): this user is neither root nor in it"
        ) from problem
    except OSError as problem:
        Path(temporary).unlink()
        raise PermissionRefused(f"{directory.control} cannot be replaced: {problem.strerror}; remove it") from problem
    return sock


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise BadRequest(f"a request is one JSON object a line: {problem}") from problem
    if type(request) is not dict or type(request.get("do")) is not str:
        raise BadRequest('a request is an object with a key "do"')
    return request


def _nobody(_caller: int, _request: dict[str, Any]) -> None:
    raise AssertionError("the desk is not open")
