"""The runtime directory of a holder: where it is, whom it trusts, and the lock that says that a holder lives."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from copyover import directory
from copyover.errors import HolderExists, PermissionRefused, UnsafeRuntimeDirectory, UsageError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COPYOVER_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_where_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable of ours, else the session's directory, else the system's."""
    assert directory.of("web").path == root / "web"
    monkeypatch.delenv("COPYOVER_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert directory.of("web").path == Path("/run/user/1/copyover/web")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert directory.of("web").path == Path("/run/copyover/web")
    assert directory.of("web").control == Path("/run/copyover/web/control.sock")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "ä", "a\n"])
def test_a_name_is_one_of_a_directory(name: str) -> None:
    """No name leads out of the root, or hides, or looks like a flag."""
    with pytest.raises(UsageError, match="cannot be a holder's name"):
        directory.of(name)


def test_a_path_that_is_too_long_for_a_socket_is_refused(root: Path) -> None:
    """With the remedy; the kernel would only say that it is too long when somebody binds."""
    del root
    with pytest.raises(UsageError, match="COPYOVER_RUNTIME_DIR"):
        directory.of("x" * 108)


def test_the_default_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable, or default; an empty variable is none."""
    monkeypatch.setenv("COPYOVER_NAME", "chat")
    assert directory.default_name() == "chat"
    monkeypatch.setenv("COPYOVER_NAME", "")
    assert directory.default_name() == "default"
    monkeypatch.delenv("COPYOVER_NAME")
    assert directory.default_name() == "default"


def test_it_is_made_for_us_alone(root: Path) -> None:
    """0700, its parents too; made twice is no error."""
    made = directory.of("web")
    directory.prepare(made)
    directory.prepare(made)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(root.stat().st_mode) & 0o022 == 0


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("which", ["itself", "parent"])
def test_what_others_can_write_is_not_trusted(root: Path, mode: int, which: str) -> None:
    """They could put their own sockets there; the sentence says what to do."""
    made = directory.of("web")
    directory.prepare(made)
    (made.path if which == "itself" else root).chmod(mode)
    with pytest.raises(UnsafeRuntimeDirectory, match=rf"mode 0{mode:o}.*chmod 700") as caught:
        directory.prepare(made)
    assert caught.value.exit_code == 16


def test_a_sticky_parent_is_trusted(root: Path) -> None:
    """As /tmp is: others can add, but neither rename nor remove what is ours."""
    made = directory.of("web")
    directory.prepare(made)
    root.chmod(0o1777)
    directory.prepare(made)


def test_what_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the directory, the reason and the remedy."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("COPYOVER_RUNTIME_DIR", str(file / "run"))
    with pytest.raises(PermissionRefused, match=r"cannot be made: Not a directory; set COPYOVER_RUNTIME_DIR"):
        directory.prepare(directory.of("web"))


def test_one_living_holder_has_a_name(root: Path) -> None:
    """The second is told the first's process id and what it can do; when the first has gone the name is free."""
    del root
    made = directory.of("web")
    directory.prepare(made)
    first = directory.take_lock(made, "web")
    with pytest.raises(HolderExists, match=rf"'web' is running \(pid {os.getpid()}\)") as caught:
        directory.take_lock(made, "web")
    assert caught.value.exit_code == 15
    os.close(first)
    os.close(directory.take_lock(made, "web"))


def test_the_lock_holds_the_newest_process_id(root: Path) -> None:
    """A longer number of an earlier holder leaves no digits behind; the lock is ours alone to read."""
    del root
    made = directory.of("web")
    directory.prepare(made)
    made.lock.write_text("99999999999\n")
    descriptor = directory.take_lock(made, "web")
    assert made.lock.read_text() == f"{os.getpid()}\n"
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)
