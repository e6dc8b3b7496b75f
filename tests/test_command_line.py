"""What an operator types and sees: one sentence, a distinct exit code, JSON on stdout and nothing else there."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from clients import Client
from copyover import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from copyover.testing import Servers

APPS = Path(__file__).parent / "apps"
CLI = [sys.executable, "-P", "-m", "copyover.cli"]


@pytest.fixture
def runtime(tmp_path: Path) -> dict[str, str]:
    """Give an environment whose runtime directory is the test's own."""
    return {**os.environ, "COPYOVER_RUNTIME_DIR": str(tmp_path / "r")}


def run(
    *arguments: str, env: Mapping[str, str], cwd: Path = APPS, check: int | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*CLI, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


BAD_INPUT = {
    "no such module": (["nowhere:app"], 10, "there is no module nowhere in"),
    "no such attribute": (["echo:nothing"], 10, "has no nothing"),
    "no attribute": (["echo"], 10, "write module:attribute"),
    "not a handler": (["handlers:ticks"], 11, "an async def handler(connection), or an ASGI application, is needed"),
    "not async": (["handlers:not_async"], 11, "is no coroutine function"),
    "bad address": (["--listen", "localhost", "echo:echo"], 14, "write HOST:PORT"),
    "bad port": (["--listen", "localhost:http", "echo:echo"], 14, "is no number from 0 to 65535"),
    "unknown host": (["--listen", "nowhere.invalid:80", "echo:echo"], 14, "cannot be found"),
    "no such python": (["--python", "./nopython", "echo:echo"], 17, "there is no interpreter"),
    "no such python on the path": (["--python", "python9.9", "echo:echo"], 17, "there is no python9.9 on the PATH"),
    "a venv without copyover": (["--python", "/bin/false", "echo:echo"], 18, "before it said hello"),
    "a python that is a directory": (["--python", "/tmp", "echo:echo"], 17, "there is no interpreter /tmp"),
    "a host that no name can be": (["--listen", "a..b:80", "echo:echo"], 14, "cannot be found"),
    "half an address": (["--listen", "[::1", "echo:echo"], 14, "is no address"),
    "no such directory": (["--chdir", "/nonexistent", "echo:echo"], 3, "/nonexistent does not exist"),
    "no such config": (["--config", "none.toml", "echo:echo"], 2, "none.toml: cannot be read"),
    "bad name": (["--name", "a/b", "echo:echo"], 2, "cannot be a holder's name"),
    "no application": ([], 2, "name the application as module:attribute"),
    "bad workers": (["--workers", "0", "echo:echo"], 2, "workers"),
    "no group": (["--listen", "unix:///tmp/co-none.sock?group=nosuchgroup", "echo:echo"], 14, "there is no group"),
    "no directory for the socket": (["--listen", "unix:///nonexistent/x.sock", "echo:echo"], 14, "cannot be bound"),
    "uvicorn's way of an address, too": (["--listen", "h:1", "--port", "0", "echo:echo"], 2, "choose one of --listen"),
    "two of uvicorn's ways": (["--uds", "x", "--host", "h", "echo:echo"], 2, "choose one of --listen"),
    "a path that is no address": (["--uds", "a?b", "echo:echo"], 2, "a path with ? or # cannot be an address"),
    "a choice that uvicorn lacks": (["--http", "h3", "echo:echo"], 2, "uvicorn.http: should be one of auto, h11"),
    "a server that cannot let go": (["--ws", "wsproto", "echo:echo"], 2, "connections that wsproto serves cannot move"),
    "half a header": (["--header", "x", "echo:echo"], 2, "uvicorn.headers: should be an array of headers"),
    "uvicorn for a handler": (
        *(["--interface", "handler", "--no-access-log", "echo:echo"], 2),
        "uvicorn.access_log: is an option of uvicorn's, which serves no handler",
    ),
    "resuming a handler": (["--interface", "handler", "--resume", "stream", "echo:echo"], 2, "resume: is about ASGI"),
    "a rate below nothing": (["--reenter-rate", "-1", "echo:echo"], 2, "must be >= 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_its_own_status(case: str, runtime: dict[str, str]) -> None:
    """No traceback, a distinct exit status, and what to do."""
    arguments, status, sentence = BAD_INPUT[case]
    listen = [] if {"--listen", "--uds"} & set(arguments) else ["--listen", "127.0.0.1:0"]
    done = run("run", *listen, *arguments, env=runtime)
    assert done.returncode == status, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("copyover: ")]
    assert len(said) == 1
    assert sentence in said[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


ELSEWHERE = {
    "--reload": "copyover reload",
    "--reload-dir=src": "copyover reload",
    "--reload-include=*.py": "copyover reload",
    "--reload-exclude=*.py": "copyover reload",
    "--reload-delay=1": "copyover reload",
    "--fd=3": "LISTEN_FDS",
    "--ssl-keyfile=key.pem": "TLS ends in haproxy or nginx in front",
    "--ssl-certfile=cert.pem": "TLS ends in haproxy or nginx in front",
    "--ssl-version=17": "TLS ends in haproxy or nginx in front",
    "--http2": "let haproxy or nginx in front speak it",
    "--backlog=9": "net.core.somaxconn",
    "--limit-max-requests=9": "copyover reload from a timer",
    "--limit-max-requests-jitter=9": "copyover reload from a timer",
    "--timeout-graceful-shutdown=9": "drain_timeout_s",
    "--timeout-worker-healthcheck=9": "health watch a new release",
}


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_what_uvicorn_does_and_we_do_otherwise_is_refused_with_a_pointer(flag: str) -> None:
    """Whoever comes from uvicorn reads what to do instead, wherever the flag stands; the help does not offer it."""
    name = flag.partition("=")[0]
    for arguments in ([flag, "echo:echo"], ["echo:echo", *flag.split("=")]):
        done = CliRunner().invoke(cli.main, ["run", *arguments])
        assert done.exit_code == 2
        assert done.stderr.startswith(f"copyover: {name} of uvicorn's has no place here; ")
        assert ELSEWHERE[flag] in done.stderr
        assert done.stderr.count("\n") == 1
    offered = CliRunner().invoke(cli.main, ["run", "--help"]).stdout
    assert re.search(rf"{name}(?![a-z-])", offered) is None


def test_every_flag_of_uvicorns_is_taken_or_has_its_pointer() -> None:
    """None is refused as one that nobody knows."""
    command = importlib.import_module("uvicorn.main").main  # uvicorn.main is a function, too
    theirs = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]}
    ours = {flag for option in cli.run.params for flag in [*option.opts, *option.secondary_opts]}
    assert theirs - ours == {"--version"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return what ``copyover run`` tells the holder that it becomes, of these arguments."""
    monkeypatch.chdir(tmp_path)

    def tell(*arguments: str) -> dict[str, Any]:
        found: list[list[str]] = []
        monkeypatch.setattr(os, "execv", lambda _, command: found.append(command))
        done = CliRunner().invoke(cli.main, ["run", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        answer: dict[str, Any] = json.loads(found[0][-1])["flags"]
        return answer

    return tell


UVICORN = [
    *("--factory", "--http", "h11", "--ws", "none", "--ws-max-size", "9", "--ws-ping-interval", "1.5"),
    *("--ws-per-message-deflate", "false", "--lifespan", "on", "--log-level", "debug", "--no-access-log"),
    *("--use-colors", "--root-path", "/x", "--timeout-keep-alive", "0", "--header", "X-A:b:c", "--header", "d:"),
    *("--env-file", ".env", "--reset-contextvars", "--no-server-header", "--date-header"),
]
UVICORN_TOLD = {
    "factory": True,
    "http": "h11",
    "ws": "none",
    "ws_max_size": 9,
    "ws_ping_interval": 1.5,
    "ws_per_message_deflate": False,
    "lifespan": "on",
    "log_level": "debug",
    "access_log": False,
    "use_colors": True,
    "root_path": "/x",
    "timeout_keep_alive": 0,
    "headers": [["X-A", "b:c"], ["d", ""]],
    "env_file": ".env",
    "reset_contextvars": True,
    "server_header": False,
    "date_header": True,
}


def test_uvicorns_flags_are_told_under_its_names(told: Callable[..., dict[str, Any]]) -> None:
    """Those that were given and no others, in uvicorn's types."""
    assert "uvicorn" not in told("app:app")
    ours = ["--interface", "asgi", "--resume", "stream", "--resume", "websocket", "--reenter-rate", "50"]
    given = told("app:app", *ours, *UVICORN)
    assert given["uvicorn"] == UVICORN_TOLD
    assert given["interface"] == "asgi"
    assert given["resume"] == ["stream", "websocket"]
    assert given["reenter_rate"] == 50.0
    assert told("app:app", "--handoff", "listeners")["handoff"] == "listeners"


@pytest.mark.parametrize(
    ("arguments", "listen"),
    [
        ("--port 0", "tcp://127.0.0.1:0"),
        ("--host 0.0.0.0", "tcp://0.0.0.0:8000"),
        ("--host ::1 --port 9", "tcp://[::1]:9"),
        ("--uds /run/x.sock", "unix:///run/x.sock?mode=0666"),
        ("--uds x.sock", "unix://HERE/x.sock?mode=0666"),
        ("--listen web=127.0.0.1:1", "web=127.0.0.1:1"),
    ],
)
def test_host_port_and_uds_make_the_listener(
    told: Callable[..., dict[str, Any]], tmp_path: Path, arguments: str, listen: str
) -> None:
    """With uvicorn's defaults, and its mode of a socket file."""
    assert told(*arguments.split(), "app:app")["listen"] == [listen.replace("HERE", str(tmp_path))]


def test_the_help_shows_ours_first_and_uvicorns_apart() -> None:
    """Two lists, each to be read as one."""
    shown = CliRunner().invoke(cli.main, ["run", "--help"]).stdout
    ours, theirs = shown.split("\nOptions for ASGI applications, as uvicorn has them:\n")
    assert "--listen" in ours
    assert "--root-path" not in ours
    assert "--root-path" in theirs
    assert "--config" not in theirs


def test_a_config_error_names_file_line_and_key(runtime: dict[str, str], tmp_path: Path) -> None:
    """Found in one look at the file."""
    file = tmp_path / "copyover.toml"
    file.write_text('app = "echo:echo"\n\nwokers = 2\n', encoding="utf-8")
    done = run("run", "--config", str(file), env=runtime, check=2)
    assert f"{file}:3: wokers: is no key of copyover.toml; did you mean workers?" in done.stderr
    file.write_text('app = "echo:echo"\nworkers = "two"\n', encoding="utf-8")
    done = run("run", "--config", str(file), env=runtime, check=2)
    assert f"{file}:2: workers: should be of type int, not str" in done.stderr
    file.write_text('app = "echo:echo"\nlisten = "127.0.0.1:0"\n', encoding="utf-8")
    done = run("run", "--config", str(file), env=runtime, check=2)
    assert f"{file}:2: listen: should be an array of strings" in done.stderr
    file.write_text('app = "echo:echo\n', encoding="utf-8")
    done = run("run", "--config", str(file), env=runtime, check=2)
    assert f"{file}:1: no TOML" in done.stderr


@pytest.mark.parametrize("name", ["r", "r/default", "r/default/lock", "r/default/control.sock"])
def test_a_runtime_directory_in_the_way_is_said(runtime: dict[str, str], tmp_path: Path, name: str) -> None:
    """Whatever lies where the holder's files go: one sentence."""
    (tmp_path / "r" / "default").mkdir(parents=True, mode=0o700)
    (tmp_path / "r").chmod(0o700)
    path = tmp_path / name
    if name.count("/") < 2:
        shutil.rmtree(path)
        path.write_text("", encoding="utf-8")
    else:
        path.mkdir()
    done = run("run", "--listen", "127.0.0.1:0", "echo:echo", env=runtime)
    assert done.returncode in (13, 16)
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_passed_descriptor_that_does_not_listen_is_refused(runtime: dict[str, str]) -> None:
    """LISTEN_FDS must be what it says."""
    with socket.socket() as bound:
        program = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), "
            "LISTEN_FDS='1'); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        command = [sys.executable, "-c", program, str(bound.fileno()), *CLI[1:], "run", "echo:echo"]
        done = subprocess.run(
            command, env=runtime, cwd=APPS, capture_output=True, text=True, check=False, pass_fds=[bound.fileno()]
        )
    assert done.returncode == 14
    assert "descriptor 3 of LISTEN_FDS is no listening stream socket" in done.stderr


def test_an_address_in_use_is_said(runtime: dict[str, str]) -> None:
    """Exit 12, with the command that finds who has it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("run", "--listen", f"127.0.0.1:{port}", "echo:echo", env=runtime, check=12)
    assert f"another process listens on 127.0.0.1:{port}" in done.stderr


def test_a_runtime_directory_that_others_may_write_is_refused(runtime: dict[str, str], tmp_path: Path) -> None:
    """Whoever can write it could replace the sockets."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r").chmod(0o777)
    done = run("run", "--listen", "127.0.0.1:0", "echo:echo", env=runtime, check=16)
    assert "others could replace its sockets" in done.stderr


def test_a_second_holder_of_a_name_is_refused_and_a_dead_ones_socket_replaced(copyover_server: Servers) -> None:
    """One holder a name, by a lock that the kernel gives back when the holder dies."""
    server = copyover_server("echo:echo", chdir=str(APPS))
    server.expect_errors = True
    env = {**os.environ, "COPYOVER_RUNTIME_DIR": str(server.directory)}
    done = run("run", "--name", server.name, "--listen", "127.0.0.1:0", "echo:echo", env=env, check=15)
    assert f"a holder named '{server.name}' is running (pid {server.pid})" in done.stderr
    server.kill()
    assert run("status", server.name, env=env).returncode == 6
    arguments = [*CLI, "run", "--name", server.name, "--listen", "127.0.0.1:0", "echo:echo"]
    with subprocess.Popen(arguments, env=env, cwd=APPS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as second:
        assert second.stdout is not None
        assert second.stdout.readline().startswith(b"ready ")
        assert run("status", server.name, env=env).returncode == 0
        run("stop", server.name, env=env, check=0)
        assert second.wait(30) == 0


def test_no_holder_is_exit_6_and_status_says_who_serves(copyover_server: Servers, runtime: dict[str, str]) -> None:
    """Every question has its answer on stdout as JSON, and its truth in the exit code."""
    for command in ("reload", "status", "connections", "audit", "stop"):
        done = run(command, "nobody", env=runtime, check=6)
        assert "no holder named 'nobody' listens" in done.stderr
        assert done.stdout == ""
    server = copyover_server("echo:echo", chdir=str(APPS), workers=2)
    status = server.status()
    assert {"schema", "name", "pid", "generation", "phase", "listeners", "workers", "connections", "counters"} < set(
        status
    )
    assert status["last_reload"]["outcome"] == "done"
    assert [worker["connections"] for worker in status["workers"]] == [0, 0]
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"x\n"
        [row] = server.connections()
        host, port = client.socket.getsockname()
        assert (row["peer"], row["kind"]) == (f"{host}:{port}", "handler")
    env = {**os.environ, "COPYOVER_RUNTIME_DIR": str(server.directory), "COPYOVER_NAME": server.name}
    assert "ready" in run("status", env=env, check=0).stdout
    assert run("connections", env=env, check=0).stderr == ""
    done = run("reload", env=env, check=0)
    assert done.stdout == ""
    assert "generation 2 serves: " in done.stderr


def test_what_keeps_a_retiring_generation_is_told_in_full(copyover_server: Servers) -> None:
    """By kind, reason and count in the status; to a pipe neither that nor a row of connections is cut off."""
    server = copyover_server("handlers:never", chdir=str(APPS), config={"gather_s": 0.1, "boundary_s": 0.3})
    with Client(server.address) as busy:
        assert busy.ask(b"x\n") == b"busy\n"
        assert server.reload().kept == 1
        [row] = server.connections()
        kept = {"kind": "handler", "reason": row["kept"], "connections": 1}
        assert server.status()["retiring"] == [{"generation": 1, "kept": [kept]}]
        env = {**os.environ, "COPYOVER_RUNTIME_DIR": str(server.directory), "COPYOVER_NAME": server.name}
        told = run("status", env=env, check=0).stdout
        assert f"  generation 1 retires, and keeps 1 handler: {row['kept']}\n" in told
        listed = run("connections", env=env, check=0).stdout
        assert listed.endswith(f"  served  {row['kept']}\n")
        assert max(map(len, listed.splitlines())) > 80


def test_status_is_0_only_while_somebody_serves(runtime: dict[str, str], tmp_path: Path) -> None:
    """While the first generation boots, status answers and exits with 1; a SIGTERM then is no failure."""
    (tmp_path / "app.py").write_text(
        "import asyncio\nasync def handler(c): ...\nasync def startup():\n    await asyncio.Event().wait()\n",
        encoding="utf-8",
    )
    arguments = [*CLI, "run", "--listen", "127.0.0.1:0", "--chdir", str(tmp_path), "app:handler"]
    with subprocess.Popen(arguments, env=runtime, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as holder:
        assert holder.stderr is not None
        while b"phase=booting" not in holder.stderr.readline():
            assert holder.poll() is None
        done = run("status", "--json", env=runtime, check=1)
        assert json.loads(done.stdout)["phase"]["name"] == "booting"
        holder.send_signal(signal.SIGTERM)
        holder.stderr.read()
        assert holder.wait(30) == 0


def test_reload_json_is_one_object(copyover_server: Servers) -> None:
    """The keys that deploy scripts rely on."""
    server = copyover_server("echo:echo", chdir=str(APPS))
    answer = server.reload().answer
    assert set(answer) == {
        *("schema", "outcome", "exit_code", "generation", "serving_generation", "connections", "kept"),
        *("listeners", "pause_ms", "phases_ms", "error", "stderr_tail", "audit"),
    }
    assert answer["generation"] == {"from": 1, "to": 2}
    assert answer["phases_ms"].keys() == {"booting", "staging", "moving"}


def test_the_sockets_are_the_owners_alone(copyover_server: Servers) -> None:
    """The directory is 0700, the control socket 0600."""
    server = copyover_server("echo:echo", chdir=str(APPS))
    directory = server.directory / server.name
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "control.sock").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_denied(copyover_server: Servers) -> None:
    """Exit 8 for whoever may not connect, and for whoever gets through the directory all the same."""
    server = copyover_server("echo:echo", chdir=str(APPS))
    control = server.directory / server.name / "control.sock"
    program = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.settimeout(30); print(s.recv(1000).decode())"
    )
    refused = subprocess.run([sys.executable, "-c", program, str(control)], capture_output=True, text=True, check=False)
    assert "PermissionError" in refused.stderr
    for path in (server.directory, control.parent):
        path.chmod(0o711)
    control.chmod(0o666)
    let_in = subprocess.run([sys.executable, "-c", program, str(control)], capture_output=True, text=True, check=True)
    assert json.loads(let_in.stdout) == {"denied": "only the holder's own user and root may command it"}


def test_rubbish_on_the_control_socket_is_answered_and_dropped(copyover_server: Servers) -> None:
    """Whoever speaks no JSON gets a sentence; the holder stays up, and keeps no descriptor."""
    server = copyover_server("echo:echo", chdir=str(APPS))
    before = server.descriptors()
    control = str(server.directory / server.name / "control.sock")
    rubbish = [b"\x00\xff\n", b"[]\n", b'{"do": 3}\n', b'{"do": "dance"}\n', b'{"do": "reload", "timeout_s": "x"}\n']
    rubbish += [b'{"do": "reload", "timeout_s": ' + b"9" * 400 + b"}\n", b'{"do": "reload", "timeout_s": Infinity}\n']
    for line in [*rubbish, b"[" * 5000 + b"\n", b"x" * (70 << 10)]:
        with Client(control) as caller:
            caller.send(line)
            assert "error" in json.loads(caller.line())
            assert caller.receive(1) == b""
    with Client(control):
        pass  # says nothing and goes
    assert server.status()["is_serving"]
    assert server.descriptors() <= before  # the pipe of the first stderr may have been open still


def test_ctrl_c_detaches_and_the_reload_goes_on(copyover_server: Servers, tmp_path: Path) -> None:
    """Exit 7, said in a sentence; the change is the holder's, not the terminal's."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    app = tmp_path / "app.py"
    slow = f"import os\nasync def startup():\n    if os.path.exists({str(gate)!r}): open({str(gate)!r}).read()\n"
    app.write_text("async def handler(c):\n    await c.read()\n", encoding="utf-8")
    server = copyover_server("app:handler", chdir=str(tmp_path))
    app.write_text(app.read_text(encoding="utf-8") + slow, encoding="utf-8")
    env = {**os.environ, "COPYOVER_RUNTIME_DIR": str(server.directory)}
    ours, theirs = pty.openpty()
    with subprocess.Popen([*CLI, "reload", server.name], env=env, stderr=theirs, stdout=theirs) as client:
        os.close(theirs)
        seen = b""
        while b"booting" not in seen:  # the progress bar, on a terminal
            assert select.select([ours], [], [], 30)[0]
            seen += os.read(ours, 4096)
        client.send_signal(signal.SIGINT)
        assert client.wait(30) == 7
    rest = seen
    while select.select([ours], [], [], 1)[0]:
        try:
            rest += os.read(ours, 4096)
        except OSError:  # EIO: the other side of the terminal is closed. pty(7)
            break
    os.close(ours)
    assert b"no longer waiting; the reload goes on" in rest
    assert server.status()["phase"]["name"] == "booting"
    gate.open("w", encoding="utf-8").close()
    while server.status()["generation"] != 2:
        assert server.status()["is_serving"]


def test_listeners_can_be_passed_and_the_manager_is_told(runtime: dict[str, str], tmp_path: Path) -> None:
    """Socket activation and sd_notify, as systemd does them."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(30)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', "
        "LISTEN_FDNAMES='web'); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    command = [sys.executable, "-c", program, str(listener.fileno()), *CLI[1:], "run", "handlers:on_listener"]
    env = {**runtime, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    with subprocess.Popen(
        command, env=env, cwd=APPS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[listener.fileno()]
    ) as holder:
        listener.close()
        assert manager.recv(100) == b"READY=1"
        with Client(address) as client:
            assert client.ask(b"x\n") == b"web x\n"
            holder.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
            assert client.ask(b"y\n") == b"web y\n"
        holder.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert holder.wait(30) == 0
    manager.close()


def test_what_a_reload_may_change_is_taken_from_the_file(copyover_server: Servers) -> None:
    """As it is then."""
    server = copyover_server("echo:echo", chdir=str(APPS))
    server.configure(workers=3)
    assert server.reload().outcome == "done"
    assert len([worker for worker in server.status()["workers"] if worker["state"] == "ready"]) == 3
