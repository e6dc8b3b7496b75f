"""
Which addresses clients connect to, and the sockets that listen there.

It binds and closes; what is accepted from them is the workers' business.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import re
import select
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import attrs

from copyover.errors import AddressInUse, BadAddress, PermissionRefused
from copyover.sockets import drop_new_clients

if TYPE_CHECKING:
    from collections.abc import Iterable

BACKLOG = 4096
ON_CRASH = ("reset", "resume")  # what becomes of connections that cannot go on exactly when their worker is killed
_FIRST_PASSED = 3  # SD_LISTEN_FDS_START. sd_listen_fds(3)
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)=(.*)", re.DOTALL)


@attrs.frozen
class Address:
    """Where to listen. *host* and *port* for TCP, else *path*."""

    name: str
    host: str = ""
    port: int = 0
    path: str | None = None
    mode: int | None = None
    group: str | None = None
    on_crash: str | None = None  # None: as the configuration says
    is_shared: bool = False  # other holders may listen there, too


@attrs.frozen
class Listener:
    """A listening socket. *address* is what it was asked for; a service manager's has none."""

    name: str
    socket: socket.socket
    path: str | None = None
    address: Address | None = None
    file: tuple[int, int] | None = None  # device and inode of its socket file

    @property
    def url(self) -> str:
        """The address as it was bound, with the port that the kernel chose."""
        where = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            return f"unix://{self.path or where}"
        host, port = where[0], where[1]
        return f"tcp://[{host}]:{port}" if self.socket.family == socket.AF_INET6 else f"tcp://{host}:{port}"


def parse(text: str) -> Address:
    """
    Read ``[NAME=]tcp://HOST:PORT``, ``unix:///path?mode=0660&group=NAME``, or a bare ``HOST:PORT``.

    All take ``?on_crash=reset`` or ``resume``, those of TCP ``reuse_port=1``.

    Raises:
        BadAddress: it is none of these.

    """
    named = _NAMED.fullmatch(text)
    name, url = named.groups() if named else (text, text)
    if url.startswith("unix:"):
        return _parse_unix(name, url)
    if "://" in url and not url.startswith("tcp://"):
        raise BadAddress(f"{text!r} is neither tcp:// nor unix://")
    try:
        parts = urlsplit(url if "://" in url else "tcp://" + url)
    except ValueError as problem:
        raise BadAddress(f"{text!r} is no address; write HOST:PORT, tcp://[::1]:PORT or unix:///path") from problem
    try:
        port = parts.port
    except ValueError as problem:
        raise BadAddress(f"the port of {text!r} is no number from 0 to 65535") from problem
    rest = parts.path or parts.fragment or parts.username
    if not parts.hostname or port is None or rest:
        raise BadAddress(f"{text!r} is no address; write HOST:PORT, tcp://[::1]:PORT or unix:///path")
    options = _options(text, parts.query, ("on_crash", "reuse_port"))
    if options.get("reuse_port", "1") not in ("0", "1"):
        raise BadAddress(f"reuse_port of {text!r} is neither 0 nor 1")
    is_shared = options.get("reuse_port") == "1"
    return Address(name, host=parts.hostname, port=port, on_crash=options.get("on_crash"), is_shared=is_shared)


def _options(url: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not options.keys() <= set(known):
        raise BadAddress(f"{url!r} has the options {', '.join(options)}; known: {', '.join(known)}")
    if options.get("on_crash", "reset") not in ON_CRASH:
        raise BadAddress(f"on_crash of {url!r} is none of {', '.join(ON_CRASH)}")
    return options


def _parse_unix(name: str, url: str) -> Address:
    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/"):
        raise BadAddress(f"{url!r} needs an absolute path: unix:///path")
    options = _options(url, parts.query, ("mode", "group", "on_crash"))
    mode = options.get("mode")
    if mode is not None and not re.fullmatch("0?[0-7]{3}", mode):
        raise BadAddress(f"the mode of {url!r} is no octal number such as 0660")
    return Address(
        name,
        path=parts.path,
        mode=None if mode is None else int(mode, 8),
        group=options.get("group"),
        on_crash=options.get("on_crash"),
    )


def bind(address: Address, *, is_successor: bool = False) -> Listener:
    """
    Listen on *address*; the *is_successor* of a unix socket of ours gets its path later, by take_place.

    Accepted sockets inherit the options: TCP_NODELAY, and SO_OOBINLINE, without which an urgent byte would hide how
    many bytes are unread. tcp(7)

    Raises:
        AddressInUse: somebody listens there.
        PermissionRefused: this user may not.
        BadAddress: the host or group does not exist, or is not of this machine.

    """
    if address.path is not None:
        sock = _bind_unix(address, address.path, is_successor=is_successor)
        file = _file_at(sock.getsockname() if is_successor else address.path)
        return Listener(address.name, sock, address.path, address, file)
    family, kind, protocol, where = _resolve(address)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.is_shared:  # each of them has to say so before it binds, and be of one user. socket(7)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        _prepare(sock)
    except OSError as problem:
        sock.close()
        raise _in_words(problem, address) from problem
    return Listener(address.name, sock, address=address)


def _resolve(address: Address) -> tuple[int, int, int, tuple[Any, ...]]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as problem:  # UnicodeError: a label that no DNS name can have
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise BadAddress(f"the host of {address.name!r} cannot be found: {why}") from problem
    family, kind, protocol, _, where = found[0]
    return family, kind, protocol, where


def is_at(listener: Listener, address: Address) -> bool:
    """
    Whether a TCP listener listens where *address* says, whatever its name.

    Raises:
        BadAddress: the host does not exist.

    """
    if address.path is not None or listener.socket.family == socket.AF_UNIX:
        return False
    family, _, _, where = _resolve(address)
    return family == listener.socket.family and where == listener.socket.getsockname()


def _prepare(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.listen(BACKLOG)
    sock.setblocking(False)


def _bind_unix(address: Address, path: str, *, is_successor: bool) -> socket.socket:
    """Bind under a temporary name and rename: no moment at which clients find nothing."""
    if not is_successor and _somebody_listens(path):
        raise AddressInUse(f"another process listens on {path}; stop it first, or choose another path")
    temporary = f"{path}.{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(temporary)
        if address.mode is not None:
            Path(temporary).chmod(address.mode)
        if address.group is not None:
            os.chown(temporary, -1, grp.getgrnam(address.group).gr_gid)
        _prepare(sock)
        if not is_successor:
            Path(temporary).rename(path)
    except KeyError as problem:
        sock.close()
        Path(temporary).unlink()
        raise BadAddress(f"there is no group {address.group!r} for {path}") from problem
    except OSError as problem:
        sock.close()
        Path(temporary).unlink(missing_ok=True)
        raise _in_words(problem, address) from problem
    return sock


def _somebody_listens(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise BadAddress(f"{path} exists and is no socket; it is left alone")
    except FileNotFoundError:
        return False
    except PermissionError as problem:
        raise PermissionRefused(f"this user may not listen on {path}: {problem.strerror}") from problem
    except OSError as problem:
        raise BadAddress(f"{path} cannot be bound: {problem.strerror}") from problem
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) != errno.ECONNREFUSED


def _in_words(problem: OSError, address: Address) -> Exception:
    where = address.path or f"{address.host}:{address.port}"
    if problem.errno == errno.EADDRINUSE:
        how = "" if address.path else f"; find it with: ss -ltnp 'sport = :{address.port}'"
        left = "workers whose holder has died hold it too: pgrep -af copyover.worker"
        return AddressInUse(f"another process listens on {where}{how}; {left}")
    if problem.errno in (errno.EACCES, errno.EPERM):
        return PermissionRefused(f"this user may not listen on {where}: {problem.strerror}")
    return BadAddress(f"{where} cannot be bound: {problem.strerror or problem}")


def take_passed() -> list[Listener]:
    """
    Take the listeners of LISTEN_FDS, if they are meant for this process. sd_listen_fds(3)

    Raises:
        BadAddress: one of them is no listening stream socket.

    """
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    taken = []
    for place in range(int(count)):
        try:
            sock = socket.socket(fileno=_FIRST_PASSED + place)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as problem:
            raise BadAddress(f"descriptor {_FIRST_PASSED + place} of LISTEN_FDS is no socket") from problem
        if sock.type != socket.SOCK_STREAM or not is_listening:
            raise BadAddress(f"descriptor {_FIRST_PASSED + place} of LISTEN_FDS is no listening stream socket")
        sock.set_inheritable(False)
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        taken.append(Listener(names[place] if place < len(names) and names[place] else f"fd{place}", sock))
    return taken


def recognise(name: str, sock: socket.socket, address: Address | None) -> Listener:
    """Make a listener of what another process of ours has bound; *address* is what that name is asked for now."""
    if address is None:
        return Listener(name, sock)
    if address.path is not None:
        is_same = sock.family == socket.AF_UNIX and str(sock.getsockname()).startswith(f"{address.path}.")
        return Listener(name, sock, address.path, address, _file_at(address.path)) if is_same else Listener(name, sock)
    asked = address if address.port or sock.family == socket.AF_UNIX else _with_port(address, sock)
    try:
        is_same = is_at(Listener(name, sock), asked)
    except BadAddress:  # the name service is away: the listener is there all the same
        is_same = False
    return Listener(name, sock, address=address if is_same else None)


def _with_port(address: Address, sock: socket.socket) -> Address:
    return attrs.evolve(address, port=sock.getsockname()[1])


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def take_place(listener: Listener) -> None:
    """Give a successor the path that it was bound for: from now on clients find it there."""
    if listener.path is not None and os.path.lexists(listener.socket.getsockname()):
        Path(listener.socket.getsockname()).rename(listener.path)


def turn_away(listener: Listener) -> None:
    """Let nobody connect any more; whoever waits in the backlog can still be accepted."""
    if listener.socket.family == socket.AF_UNIX:
        _remove_file(listener)
    else:
        drop_new_clients(listener.socket)


def has_waiting(listener: Listener) -> bool:
    """Whether somebody waits in the backlog."""
    poll = select.poll()
    poll.register(listener.socket, select.POLLIN)
    return bool(poll.poll(0))


def end(listener: Listener) -> None:
    """
    Listen no more, nor does any worker that has a copy: closing ours alone would leave theirs.

    Who waits in the backlog of a TCP listener is reset.
    """
    _remove_file(listener)
    with contextlib.suppress(OSError):  # it was ended before
        listener.socket.shutdown(socket.SHUT_RDWR)
    listener.socket.close()


def close_all(listeners: Iterable[Listener]) -> None:
    """Close our copies; what a service manager passed goes on listening for its next holder."""
    for listener in listeners:
        _remove_file(listener)
        listener.socket.close()


def _remove_file(listener: Listener) -> None:
    """Unlink the socket file while it is this very socket's: the path may be a successor's by now."""
    if listener.file is None or listener.path is None:
        return
    for path in (listener.path, listener.socket.getsockname()):  # a successor may not have taken its place yet
        # Our inode lives as long as our socket: no other file has its number. unix(7)
        if _file_at(path) == listener.file:
            Path(path).unlink(missing_ok=True)
