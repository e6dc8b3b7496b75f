"""Workers with the rights of another user, and commands by one."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import others
from clients import Client
from copyover import directory as directories
from copyover import users
from copyover.errors import ConfigError, PermissionRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Server, Servers

APPS = Path(__file__).parent / "apps"
GROUP = grp.getgrgid(1)  # one that everybody has and nobody is in by chance


@pytest.fixture
def others_directory() -> Iterator[Path]:
    """Return a directory of root's that others may pass and not write."""
    directory = Path(tempfile.mkdtemp(prefix="co-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# ---- names


def test_no_user_is_no_change() -> None:
    """Without the key workers have the holder's rights."""
    assert users.find(None, None) is None


def test_a_group_alone_is_refused() -> None:
    """It would be read as less than it is: the worker would be root still."""
    with pytest.raises(ConfigError, match="group: says nothing without a user"):
        users.find(None, GROUP.gr_name)


@others.needs_root
@pytest.mark.parametrize(
    ("user", "group", "sentence"),
    [
        ("nosuchuser", None, "user: there is no user 'nosuchuser'"),
        (others.NOBODY, "none", "group: there is no group"),
    ],
)
def test_unknown_names_are_refused(user: str, group: str | None, sentence: str) -> None:
    """With the key, and the command that lists the known ones."""
    with pytest.raises(ConfigError, match=f"{sentence}.*getent"):
        users.find(user, group)


def test_only_root_can_give_rights_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 13, and what to do instead."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionRefused, match="only root may start processes of another user; start the holder as"):
        users.find(others.NOBODY, None)


@others.needs_root
def test_the_group_is_the_user_s_own_or_the_one_that_is_named() -> None:
    """Supplementary groups come from the group database either way."""
    own = users.find(others.NOBODY, None)
    named = users.find(others.NOBODY, GROUP.gr_name)
    assert own is not None
    assert named is not None
    assert own.gid == pwd.getpwnam(others.NOBODY).pw_gid
    assert (named.gid, named.groups) == (1, tuple(os.getgrouplist(others.NOBODY, 1)))


# ---- the directory


def test_a_shared_directory_can_be_passed_and_not_listed(
    others_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0711 whatever the umask, also where it was 0700 before; what lies in it has modes of its own."""
    monkeypatch.setenv("COPYOVER_RUNTIME_DIR", str(others_directory / "run"))
    before = os.umask(0o077)
    try:
        directories.prepare(directories.of("web"), is_shared=True)
        directories.prepare(directories.of("chat"))
        directories.prepare(directories.of("chat"), is_shared=True)
    finally:
        os.umask(before)
    for path in (others_directory / "run", directories.of("web").path, directories.of("chat").path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o711


def test_a_directory_that_others_cannot_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the one on the way that is closed."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("COPYOVER_RUNTIME_DIR", str(tmp_path / "run"))
    with pytest.raises(PermissionRefused, match=rf"cannot pass through {tmp_path}/run to the runtime directory"):
        directories.prepare(directories.of("web"), is_shared=True)


# ---- workers


class Worker:
    """A client whose lines are tried by the worker."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def tries(self, **asked: Any) -> Any:
        return json.loads(self._client.ask(json.dumps(asked).encode() + b"\n"))


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of a server find copyover with an interpreter that everybody can run."""
    monkeypatch.setenv("PYTHONPATH", others.PATHS)


def as_nobody(servers: Servers, **config: Any) -> Server:
    return servers("rights:rights", chdir=APPS, python=others.python(), config={"user": others.NOBODY, **config})


@others.needs_root
@pytest.mark.usefixtures("paths")
def test_a_worker_has_the_rights_of_its_user_and_no_others(copyover_server: Servers) -> None:
    """It serves, and moves, and can neither command the holder, nor read its lock, nor end it."""
    server = as_nobody(copyover_server, group=GROUP.gr_name)
    nobody = pwd.getpwnam(others.NOBODY)
    directory = server.directory / server.name
    with Client(server.address) as client:
        worker = Worker(client)
        for _ in range(2):
            assert worker.tries(do="identity") == {
                "uid": [nobody.pw_uid] * 3,
                "gid": [1] * 3,
                "groups": sorted(os.getgrouplist(others.NOBODY, 1)),
                "umask": current_umask(),
                "USER": others.NOBODY,
                "LOGNAME": others.NOBODY,
                "HOME": nobody.pw_dir,
            }
            assert worker.tries(do="connect", path=str(directory / "control.sock")) == "PermissionError"
            assert worker.tries(do="read", path=str(directory / "lock")) == "PermissionError"
            assert worker.tries(do="list", path=str(directory)) == "PermissionError"
            assert worker.tries(do="signal", pid=server.pid) == "PermissionError"
            assert server.reload().assert_lossless().moved == 1
    assert stat.S_IMODE(directory.stat().st_mode) == 0o711
    for name in ("control.sock", "lock"):
        found = (directory / name).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 0)


def current_umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


@others.needs_root
@pytest.mark.usefixtures("paths")
def test_the_user_s_worker_is_started_again_as_that_user(copyover_server: Servers) -> None:
    """A restart has no more rights than the first start."""
    server = as_nobody(copyover_server)
    os.kill(server.worker_pids()[0], 9)
    with Client(server.address) as client:
        assert Worker(client).tries(do="identity")["uid"] == [pwd.getpwnam(others.NOBODY).pw_uid] * 3


@others.needs_root
@pytest.mark.usefixtures("paths")
def test_rights_are_the_same_after_an_upgrade(copyover_server: Servers) -> None:
    """Of the workers that the next program starts, and of those who may command it."""
    server = as_nobody(copyover_server, control_group=GROUP.gr_name, worker_connections=1)
    with Client(server.address) as client:
        assert command(server, "upgrade", server.name, groups=(1,)).returncode == 0
        assert server.status()["limits"]["worker_connections"] == 1
        assert command(server, "status", server.name).returncode == 8
        assert command(server, "reload", server.name, groups=(1,)).returncode == 0
        assert Worker(client).tries(do="identity")["uid"] == [pwd.getpwnam(others.NOBODY).pw_uid] * 3


@others.needs_root
@pytest.mark.usefixtures("paths")
def test_a_new_holder_finds_the_workers_of_the_user(copyover_server: Servers) -> None:
    """They may connect to it where it waits for them, and to nothing else."""
    server = as_nobody(copyover_server)
    with Client(server.address) as client:
        worker = Worker(client)
        before = worker.tries(do="identity")
        server.kill()
        process = server._process = server._start()
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline().startswith(b"ready ")
        assert worker.tries(do="identity") == before
        control = server.directory / server.name / "control.sock"
        assert worker.tries(do="connect", path=str(control)) == "PermissionError"
        assert server.reload().assert_lossless().moved == 1
        assert worker.tries(do="identity") == before


@others.needs_root
@pytest.mark.usefixtures("paths")
def test_the_user_is_no_matter_of_a_reload(copyover_server: Servers) -> None:
    """The directory was made for it: a change is refused, and the incumbent serves."""
    server = as_nobody(copyover_server)
    server.configure(user=None)
    assert "user cannot be changed by a reload" in str(server.reload().assert_refused().error)


@others.needs_root
def test_an_interpreter_that_the_user_cannot_run_is_said(copyover_server: Servers, tmp_path: Path) -> None:
    """With the user's name: root could run it, and would wonder."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    python = closed / "python"
    python.symlink_to(others.python())
    with pytest.raises(RuntimeError, match=f"cannot be run or entered by user {others.NOBODY}: Permission denied"):
        copyover_server("rights:rights", chdir=APPS, python=str(python), config={"user": others.NOBODY})


# ---- commands


def command(server: Server, *arguments: str, gid: int = others.STRANGER, groups: tuple[int, ...] = ()) -> Any:
    """Run a command as a user without privileges and with these groups."""
    argv = [others.python(), "-P", "-m", "copyover.cli", *arguments]
    environment = others.ENVIRONMENT | {"COPYOVER_RUNTIME_DIR": str(server.directory)}
    return subprocess.run(
        argv,
        user=others.STRANGER,
        group=gid,
        extra_groups=groups,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@others.needs_root
def test_another_user_s_command_is_exit_8(copyover_server: Servers) -> None:
    """Whatever it asks, and whether or not it gets through the directory."""
    server = copyover_server("echo:echo", chdir=APPS)
    for _ in range(2):
        for asked in ("status", "reload", "stop", "events"):
            done = command(server, asked, server.name, groups=(1,))
            assert (done.returncode, done.stdout) == (8, ""), done.stderr
            assert "this user may not command the holder" in done.stderr
        for path in (server.directory, server.directory / server.name):
            path.chmod(0o711)
    assert server.status()["is_serving"]


@others.needs_root
def test_members_of_the_control_group_may_command(copyover_server: Servers) -> None:
    """By their first group or any other; nobody else may."""
    server = copyover_server("echo:echo", chdir=APPS, config={"control_group": GROUP.gr_name})
    control = (server.directory / server.name / "control.sock").stat()
    assert (stat.S_IMODE(control.st_mode), control.st_uid, control.st_gid) == (0o660, 0, 1)
    assert command(server, "status", server.name).returncode == 8
    assert json.loads(command(server, "status", server.name, "--json", groups=(1,)).stdout)["is_serving"]
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        done = command(server, "reload", server.name, "--json", gid=1)
        assert json.loads(done.stdout)["connections"]["moved"] == 1
        assert client.ask(b"b\n") == b"b\n"


@others.needs_root
def test_who_gets_through_without_being_a_member_is_denied(copyover_server: Servers) -> None:
    """The mode of the file is not the only lock: the kernel says who the caller is."""
    server = copyover_server("echo:echo", chdir=APPS, config={"control_group": GROUP.gr_name})
    (server.directory / server.name / "control.sock").chmod(0o666)
    for _ in range(5):  # the holder hangs up before the request has come, or after
        done = command(server, "status", server.name)
        assert done.returncode == 8
        assert "only the holder's own user and root, and members of its control_group, may command it" in done.stderr
    assert server.status()["counters"]["denied"] == 5


# ---- a holder without privileges


@others.needs_root
def test_a_runtime_directory_of_others_is_exit_13(others_directory: Path) -> None:
    """One sentence with the remedy, as whoever has no rights there."""
    run = [others.python(), "-P", "-m", "copyover.cli", "run", "--chdir", str(APPS), "echo:echo"]
    environment = {"COPYOVER_RUNTIME_DIR": str(others_directory)}
    with others.running(*run, user=others.STRANGER, environment=environment) as (process, said):
        assert "cannot be made: Permission denied; set COPYOVER_RUNTIME_DIR to a directory of yours" in said.read()
        assert process.wait(others.DEADLINE_S) == 13


@others.needs_root
@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--user", others.NOBODY], 13, "only root may start processes of another user"),
        (["--listen", "unix:///root/x.sock"], 13, "this user may not listen on"),
        (["--group", GROUP.gr_name], 2, "says nothing without a user"),
    ],
)
def test_what_needs_root_is_refused_without_it(
    others_directory: Path, flags: list[str], code: int, sentence: str
) -> None:
    """In words, with the exit code of the cause."""
    os.chown(others_directory, others.STRANGER, others.STRANGER)
    listen = [] if "--listen" in flags else ["--listen", "127.0.0.1:0"]
    run = [others.python(), "-P", "-m", "copyover.cli", "run", "--chdir", str(APPS), *listen, *flags, "echo:echo"]
    environment = {"COPYOVER_RUNTIME_DIR": str(others_directory)}
    with others.running(*run, user=others.STRANGER, environment=environment) as (process, said):
        assert sentence in said.read()
        assert process.wait(others.DEADLINE_S) == code
