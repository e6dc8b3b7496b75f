"""Which addresses are listened on, and how a socket file changes hands."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from copyover import listeners
from copyover.errors import AddressInUse, BadAddress
from copyover.listeners import Address, Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def bound() -> Iterator[Callable[[Address], Listener]]:
    """Bind, and close at the end."""
    made: list[Listener] = []

    def bind(address: Address) -> Listener:
        made.append(listeners.bind(address))
        return made[-1]

    yield bind
    listeners.close_all(made)


# ---- parsing


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1:80", host="127.0.0.1", port=80)),
        ("localhost:0", Address("localhost:0", host="localhost", port=0)),
        ("web=tcp://0.0.0.0:80", Address("web", host="0.0.0.0", port=80)),
        ("tcp://[::1]:80", Address("tcp://[::1]:80", host="::1", port=80)),
        ("[::1]:80", Address("[::1]:80", host="::1", port=80)),
        ("unix:///run/x.sock", Address("unix:///run/x.sock", path="/run/x.sock")),
        ("a_b-c=unix:///run/x.sock?mode=0660&group=web", Address("a_b-c", path="/run/x.sock", mode=0o660, group="web")),
        ("web=tcp://[::1]:80?on_crash=resume", Address("web", host="::1", port=80, on_crash="resume")),
        ("web=0.0.0.0:80?reuse_port=1", Address("web", host="0.0.0.0", port=80, is_shared=True)),
        ("web=0.0.0.0:80?reuse_port=0", Address("web", host="0.0.0.0", port=80)),
        ("x=unix:///run/x.sock?on_crash=reset", Address("x", path="/run/x.sock", on_crash="reset")),
        ("unix:///run/a=b.sock", Address("unix:///run/a=b.sock", path="/run/a=b.sock")),
    ],
)
def test_an_address_is_read(text: str, address: Address) -> None:
    """With a name or its own text for one."""
    assert listeners.parse(text) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no address"),
        ("host", "is no address"),
        ("host:", "is no address"),
        (":80", "is no address"),
        ("web=", "is no address"),
        ("host:80?reuse_port=yes", "neither 0 nor 1"),
        ("unix:///run/x.sock?reuse_port=1", "known: mode, group, on_crash"),
        ("host:99999", "no number from 0 to 65535"),
        ("host:http", "no number from 0 to 65535"),
        ("::1:80", "no number from 0 to 65535"),
        ("[::1:80", "address"),
        ("tcp://host:1/path", "is no address"),
        ("tcp://host:1?mode=1", "options mode; known: on_crash"),
        ("http://host:1", "neither tcp:// nor unix://"),
        ("unix://relative", "needs an absolute path"),
        ("unix:relative", "needs an absolute path"),
        ("unix:///x?mode=rw", "no octal number"),
        ("unix:///x?mode=9", "no octal number"),
        ("unix:///x?mode=-1", "no octal number"),
        ("unix:///x?owner=me", "options owner; known: mode, group, on_crash"),
        ("host:1?backlog=9", "options backlog; known: on_crash"),
        ("host:1?on_crash=hope", "on_crash of 'host:1[?]on_crash=hope' is none of reset, resume"),
        ("unix:///x?on_crash=", "is none of reset, resume"),
    ],
)
def test_what_is_no_address_is_named(text: str, says: str) -> None:
    """With the text as it was given, and exit code 14."""
    with pytest.raises(BadAddress, match=says) as caught:
        listeners.parse(text)
    assert caught.value.exit_code == 14


# ---- TCP


def test_a_tcp_listener_listens(bound: Callable[[Address], Listener]) -> None:
    """Without blocking, with the port that the kernel chose in its URL, and options that accepted sockets inherit."""
    listener = bound(Address("web", host="127.0.0.1", port=0))
    port = listener.socket.getsockname()[1]
    assert listener.url == f"tcp://127.0.0.1:{port}"
    assert not listener.socket.getblocking()
    assert not listener.socket.get_inheritable()
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        listener.socket.setblocking(True)
        accepted, _ = listener.socket.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)


def test_an_ipv6_listener_is_of_ipv6_alone(bound: Callable[[Address], Listener]) -> None:
    """So that another listener can have the same port of IPv4."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = bound(Address("six", host="::1", port=0))
    except BadAddress:
        pytest.skip("no IPv6 address here")
    assert listener.url.startswith("tcp://[::1]:")
    assert listener.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def test_a_port_in_use_is_said(bound: Callable[[Address], Listener]) -> None:
    """With the command that finds who has it, and exit code 12."""
    port = bound(Address("web", host="127.0.0.1", port=0)).socket.getsockname()[1]
    with pytest.raises(AddressInUse, match=f"another process listens on 127.0.0.1:{port}.*ss -ltnp") as caught:
        listeners.bind(Address("web", host="127.0.0.1", port=port))
    assert caught.value.exit_code == 12


def test_an_address_of_another_machine_is_said() -> None:
    """192.0.2.0/24 is of nobody: documentation only."""
    with pytest.raises(BadAddress, match=r"192\.0\.2\.1:1 cannot be bound: Cannot assign"):
        listeners.bind(Address("web", host="192.0.2.1", port=1))


# ---- unix sockets


def test_a_unix_listener_listens(bound: Callable[[Address], Listener], tmp_path: Path) -> None:
    """Under its final name, with nothing beside it."""
    path = tmp_path / "x.sock"
    listener = bound(Address("x", path=str(path)))
    assert listener.url == f"unix://{path}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.sock"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_its_mode_is_set_before_it_has_its_name(bound: Callable[[Address], Listener], tmp_path: Path) -> None:
    """No moment at which others may connect that must not."""
    path = tmp_path / "x.sock"
    bound(Address("x", path=str(path), mode=0o620))
    assert stat.S_IMODE(path.stat().st_mode) == 0o620


def test_an_unknown_group_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    """No half-made socket stays behind."""
    with pytest.raises(BadAddress, match="no group 'no-such-group'"):
        listeners.bind(Address("x", path=str(tmp_path / "x.sock"), group="no-such-group"))
    assert list(tmp_path.iterdir()) == []


def test_a_stale_socket_is_replaced(bound: Callable[[Address], Listener], tmp_path: Path) -> None:
    """Nobody listens on it any more: its owner was killed."""
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    before = path.stat().st_ino
    bound(Address("x", path=str(path)))
    assert path.stat().st_ino != before


def test_a_living_socket_is_left_alone(bound: Callable[[Address], Listener], tmp_path: Path) -> None:
    """Its clients would find somebody else."""
    path = tmp_path / "x.sock"
    bound(Address("x", path=str(path)))
    before = path.stat().st_ino
    with pytest.raises(AddressInUse, match=r"x\.sock; stop it first"):
        listeners.bind(Address("x", path=str(path)))
    assert path.stat().st_ino == before


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A file of the user's, named by mistake, is not deleted."""
    path = tmp_path / "precious"
    path.write_text("text")
    with pytest.raises(BadAddress, match="no socket; it is left alone"):
        listeners.bind(Address("x", path=str(path)))
    assert path.read_text() == "text"


def test_a_directory_that_is_absent_or_none_is_said(tmp_path: Path) -> None:
    """The kernel's own words, behind the path."""
    with pytest.raises(BadAddress, match="cannot be bound: No such file or directory"):
        listeners.bind(Address("x", path=str(tmp_path / "absent" / "x.sock")))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadAddress, match="cannot be bound: Not a directory"):
        listeners.bind(Address("x", path=str(tmp_path / "file" / "x.sock")))


def test_a_path_that_is_too_long_is_said(tmp_path: Path) -> None:
    """Python's own words, since the kernel has none."""
    with pytest.raises(BadAddress, match="too long"):
        listeners.bind(Address("x", path=str(tmp_path / ("x" * 120))))


def test_closing_removes_our_path_and_no_other_s(tmp_path: Path) -> None:
    """A successor may have renamed its socket over ours: that one stays."""
    path = tmp_path / "x.sock"
    ours = listeners.bind(Address("x", path=str(path)))
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(tmp_path / "theirs"))
        successor.listen()
        (tmp_path / "theirs").rename(path)
        listeners.close_all([ours])
        assert path.exists()
    path.unlink()
    listeners.close_all([listeners.bind(Address("x", path=str(path)))])
    assert not path.exists()


# ---- passed by a service manager


def test_listeners_that_are_passed_are_taken(tmp_path: Path) -> None:
    """LISTEN_FDS from descriptor 3 on, with their names; close-on-exec, without blocking."""
    program = textwrap.dedent(
        """
        import os, socket, sys
        passed = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        passed[1] = socket.socket(socket.AF_UNIX)
        passed[1].bind(sys.argv[1])
        passed[1].listen()
        kept = [os.dup(one.fileno()) for one in passed]
        high = [os.dup2(one.fileno(), 50 + place) for place, one in enumerate(passed)]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, 3 + place, inheritable=True)
        os.environ.update(LISTEN_FDS="3", LISTEN_FDNAMES="web:admin", LISTEN_PID=str(os.getpid()))
        from copyover.listeners import take_passed
        taken = take_passed()
        assert [one.name for one in taken] == ["web", "admin", "fd2"], taken
        assert [one.socket.fileno() for one in taken] == [3, 4, 5]
        assert not any(os.get_inheritable(one.socket.fileno()) for one in taken)
        assert not any(one.socket.getblocking() for one in taken)
        assert taken[0].socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert taken[1].url == "unix://" + sys.argv[1]
        os._exit(0)
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.sock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_FDS": "x", "LISTEN_PID": ""}],
)
def test_what_was_passed_to_somebody_else_is_left(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """The variables may be a parent's: only ours by process id are taken."""
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert listeners.take_passed() == []


def test_a_count_that_is_no_number_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is guessed."""
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "-1")
    assert listeners.take_passed() == []
