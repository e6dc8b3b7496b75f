"""What the limits do not hold is refused before anything is started, in a sentence that says what would do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

import others
from clients import DEADLINE_S, Client
from copyover import limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copyover.testing import Servers

APPS = Path(__file__).parent / "apps"
MODEST = limits.Demand(connections=10_000, workers=2, worker_connections=None, slot_bytes=1024)
ROOMY = limits.Found(descriptors=65_536, most_descriptors=1 << 20, slots_bytes=1 << 30)


# ---- what is decided


@pytest.mark.parametrize(("descriptors", "connections"), [(65_536, 64_512), (2048, 1024), (700, 350), (3, 2)])
def test_a_holder_keeps_descriptors_for_itself(descriptors: int, connections: int) -> None:
    """1024, or half of few."""
    assert limits.capacity(descriptors) == connections


@pytest.mark.parametrize(
    "demand",
    [
        MODEST,
        attrs.evolve(MODEST, connections=64_512, slot_bytes=0),
        attrs.evolve(MODEST, worker_connections=5000),
        attrs.evolve(MODEST, connections=64_512, slot_bytes=8192),
    ],
)
def test_what_fits_is_not_refused(demand: limits.Demand) -> None:
    """To the very last connection."""
    assert limits.shortfall(demand, ROOMY) is None


@pytest.mark.parametrize(
    ("demand", "found", "says"),
    [
        ({"connections": 64_513}, {}, ["of 65536 allows for 64512", "raise it to 65537 (LimitNOFILE="]),
        ({"connections": 600}, {"descriptors": 1000}, ["of 1000 allows for 500", "raise it to 1200 "]),
        ({"connections": 64_513}, {"most_descriptors": 65_536}, ["and before that fs.nr_open, which is 65536"]),
        ({"connections": 1_047_553}, {"descriptors": 1 << 20}, ["keeps 1047552 at most", "?reuse_port=1"]),
        ({"worker_connections": 4999}, {}, ["2 workers with worker_connections = 4999 accept 9998"]),
        ({}, {"slots_bytes": 19 << 20}, ["20 MiB in a reload", "has room for 19 MiB", "slot_bytes lower, 0 for none"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_raise(
    demand: dict[str, int], found: dict[str, int], says: list[str]
) -> None:
    """The sentence has the limit, what it allows for, and what would do."""
    sentence = limits.shortfall(attrs.evolve(MODEST, **demand), attrs.evolve(ROOMY, **found))
    assert sentence is not None
    assert all(part in sentence for part in says), sentence


@pytest.mark.parametrize("connections", [2, 1023, 1024, 1025, 64_513])
def test_the_limit_that_the_sentence_names_is_enough(connections: int) -> None:
    """Whoever does what it says need not come again."""
    demand = attrs.evolve(MODEST, connections=connections)
    sentence = limits.shortfall(demand, attrs.evolve(ROOMY, descriptors=connections))
    assert sentence is not None
    needed = int(sentence.partition("raise it to ")[2].split()[0])
    assert limits.shortfall(demand, attrs.evolve(ROOMY, descriptors=needed)) is None


def test_slots_in_a_file_system_without_a_size_have_room() -> None:
    """A tmpfs may have none."""
    assert limits.shortfall(MODEST, attrs.evolve(ROOMY, slots_bytes=None)) is None


# ---- at a start


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a runtime directory; short, for the paths of its sockets."""
    made = Path(tempfile.mkdtemp(prefix="co-"))
    yield made
    shutil.rmtree(made)


def run(directory: Path, *arguments: str) -> list[str]:
    listen = f"unix://{directory}/web.sock"
    return [sys.executable, "-P", "-m", "copyover.cli", "run", "--chdir", str(APPS), "--listen", listen, *arguments]


def refused(directory: Path, *arguments: str, limit: int) -> str:
    """Start a holder with at most *limit* descriptors, and return what it said as it was refused."""
    command = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *run(directory, *arguments)]
    environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(directory)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        if ready := holder.stdout.readline():  # it serves: with SIGTERM its worker ends, too
            holder.terminate()
        _, log = holder.communicate(timeout=DEADLINE_S)
    assert not ready
    assert holder.returncode == 2, log
    assert "event=started" not in log
    assert not (directory / "web.sock").exists()
    return log.splitlines()[-1]


def test_more_than_the_descriptors_allow_for_is_not_begun(directory: Path) -> None:
    """Exit 2, one sentence, no listener and no worker."""
    assert refused(directory, "--connections", "600", "echo:echo", limit=1000) == (
        "copyover: connections: 600 are to be held, and the hard RLIMIT_NOFILE of 1000 allows for 500: "
        "raise it to 1200 (LimitNOFILE=, --ulimit nofile=)"
    )


def test_a_backlog_that_the_kernel_cuts_is_told(directory: Path) -> None:
    """It cuts it without a word: a crowd that comes while a worker starts would not know why."""
    unshare = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a network namespace")
    cut = 'echo 100 > /proc/sys/net/core/somaxconn; exec "$@"'
    command = [*unshare, "sh", "-c", cut, "sh", *run(directory, "echo:echo")]
    environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(directory)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith("ready ")
        holder.send_signal(signal.SIGTERM)
        _, log = holder.communicate(timeout=DEADLINE_S)
    assert "event=backlog-cut wanted=4096 allowed=100" in log
    assert "net.core.somaxconn=4096" in log


# ---- at a reload


def test_a_reload_that_asks_for_more_is_refused(copyover_server: Servers) -> None:
    """Who serves goes on; with a number that fits the next reload moves it."""
    server = copyover_server("echo:echo", chdir=APPS, config={"connections": 5})
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        server.configure(connections=10, worker_connections=9)
        result = server.reload()
        result.assert_refused()
        assert result.exit_code == 3
        assert "1 workers with worker_connections = 9 accept 9" in str(result.error)
        assert client.ask(b"b\n") == b"b\n"
        server.configure(worker_connections=10)
        assert server.reload().assert_lossless().moved == 1
        assert client.ask(b"c\n") == b"c\n"


def test_a_takeover_that_asks_for_more_is_refused(copyover_server: Servers) -> None:
    """The workers of the dead holder serve on, and one that asks for what there is takes them over."""
    server = copyover_server("echo:echo", chdir=APPS)
    environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(server.directory)}
    command = [sys.executable, "-P", "-m", "copyover.cli", "run", "--name", server.name, "--connections", "2000000"]
    with Client(server.address) as client:
        assert client.ask(b"a\n") == b"a\n"
        server.kill()
        done = subprocess.run(
            [*command, "--config", str(server.directory / "copyover.toml")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 2, done
        assert "2000000 are to be held, and one holder keeps 1047552 at most" in done.stderr
        assert client.ask(b"b\n") == b"b\n"
        server.run()
        assert server.reload().assert_lossless().moved == 1
        assert client.ask(b"c\n") == b"c\n"


@others.needs_root
def test_slots_need_room_in_the_runtime_directory(directory: Path) -> None:
    """What a tmpfs has not is not promised; without slots nothing of it is needed."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=True)
    try:
        file = directory / "copyover.toml"
        file.write_text("connections = 1000\n", encoding="utf-8")
        said = refused(directory, "--config", str(file), "echo:echo", limit=5000)
        assert "1000 are to be held, their slots take 2 MiB in a reload" in said
        assert "room for 1 MiB: mount it larger, or set slot_bytes lower, 0 for none" in said
        file.write_text("connections = 1000\nslot_bytes = 0\n", encoding="utf-8")
        environment = os.environ | {"COPYOVER_RUNTIME_DIR": str(directory)}
        command = run(directory, "--config", str(file), "echo:echo")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline().startswith("ready ")
            holder.send_signal(signal.SIGTERM)
            assert holder.wait(DEADLINE_S) == 0
    finally:
        subprocess.run(["umount", directory], check=True)


# ---- several holders on one address


def test_several_holders_share_an_address(copyover_server: Servers) -> None:
    """The kernel spreads clients over them; one reloads without the other, and one that stops leaves the other all."""
    listen = "first=127.0.0.1:0?reuse_port=1"
    first = copyover_server("handlers:on_listener", chdir=APPS, listen=(listen,), name="first")
    listen = f"second=127.0.0.1:{first.address[1]}?reuse_port=1"
    second = copyover_server("handlers:on_listener", chdir=APPS, listen=(listen,), name="second")
    clients = [Client(first.address) for _ in range(64)]
    try:
        served = [client.ask(b"who\n") for client in clients]
        assert set(served) == {b"first who\n", b"second who\n"}
        assert first.reload().assert_lossless().moved == served.count(b"first who\n")
        assert [client.ask(b"who\n") for client in clients] == served
        assert second.stop() == 0
        for _ in range(8):
            with Client(first.address) as late:
                assert late.ask(b"who\n") == b"first who\n"
    finally:
        for client in clients:
            client.socket.close()
