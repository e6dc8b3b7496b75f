"""
The pytest plugin with real processes: what it promises to the suites of users.

Half of it is mutations: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import copyover.testing
from copyover.verifying import Plan, SwarmReport

if TYPE_CHECKING:
    from copyover.testing import Server, Servers

pytest_plugins = ["pytester"]

APPS = Path(__file__).parent / "apps"


def ten_lines() -> str:
    """Return the test that the docstring of copyover.testing shows."""
    shown = re.search(r"^    def test_.*?(?=^\S)", copyover.testing.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert shown is not None
    return textwrap.dedent(shown[0])


@pytest.mark.parametrize("value", [1, 0.5, True, 'a"b\n', ["x", "y"], {"http": "h11", "headers": [["a", "b"]]}, {}])
def test_settings_are_written_as_toml(value: object) -> None:
    """A table in one line, too: uvicorn's options are one."""
    assert tomllib.loads(f"key = {copyover.testing._as_toml(value)}") == {"key": value}


def run_suite(pytester: pytest.Pytester, app: str, test: str) -> pytest.RunResult:
    """Run *test* as a user's suite, beside *app* as chat.py."""
    (pytester.path / "chat.py").write_text((APPS / app).read_text())
    pytester.makepyfile(test_chat=test)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider")


# ---- a user's suite


def test_the_ten_lines_of_the_docstring_pass(pytester: pytest.Pytester) -> None:
    """The documented test of a user's own server works as it stands, with nothing but the plugin."""
    run_suite(pytester, "echo.py", ten_lines()).assert_outcomes(passed=1)


def test_the_ten_lines_fail_for_a_faulty_server(pytester: pytest.Pytester) -> None:
    """The same test fails for a server that repeats a line, and names the byte."""
    result = run_suite(pytester, "faulty.py", ten_lines().replace("chat:echo", "chat:repeat"))
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r".*client \d+, byte \d+ \(reply \d+\)"])


def test_a_traceback_in_the_log_fails_the_test(pytester: pytest.Pytester) -> None:
    """A handler that raises fails the test at its teardown, even if the test itself saw nothing."""
    test = """
        import contextlib
        import socket

        def test_nothing(copyover_server):
            server = copyover_server("chat:stumble")
            with socket.create_connection(server.address) as client:
                client.sendall(b"line\\n")
                with contextlib.suppress(ConnectionResetError):
                    client.recv(1)
    """
    run_suite(pytester, "counting.py", test).assert_outcomes(passed=1, errors=1)


def test_expected_errors_do_not_fail_the_test(pytester: pytest.Pytester) -> None:
    """A test that provokes errors says so, and passes."""
    test = """
        import contextlib
        import socket

        def test_nothing(copyover_server):
            server = copyover_server("chat:stumble")
            server.expect_errors = True
            with socket.create_connection(server.address) as client:
                client.sendall(b"line\\n")
                with contextlib.suppress(ConnectionResetError):
                    client.recv(1)
            server.stop()
            assert server.problems()
    """
    run_suite(pytester, "counting.py", test).assert_outcomes(passed=1)


def test_the_plugin_is_light() -> None:
    """Every project's pytest loads the plugin, so it loads neither the command line nor the holder."""
    program = "import sys, copyover.testing; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"click", "rich", "cattrs", "pyroute2", "hypothesis", "uvloop", "copyover.holder", "copyover.cli"}
    assert heavy.isdisjoint(loaded)


# ---- the server


def test_reload_tells_what_it_did(copyover_server: Servers) -> None:
    """The result of a reload says how many connections moved and how long they paused."""
    server = copyover_server("echo:echo", chdir=APPS)
    with server.swarm(clients=5) as swarm:
        result = server.reload(timeout_s=30).assert_lossless()
        assert (result.moved, result.kept, result.lost) == (5, 0, 0)
        assert 0 < result.pause_ms["max"] <= result.took_ms
        assert {row["generation"] for row in server.connections()} == {2}
        with pytest.raises(AssertionError):
            result.assert_refused()
    swarm.report.assert_lossless()


def test_a_release_that_does_not_start_is_told_from_one_that_does(copyover_server: Servers) -> None:
    """assert_lossless raises for a refused reload; the clients noticed nothing of it."""
    server = copyover_server("echo:echo", chdir=APPS)
    with server.swarm(clients=5) as swarm:
        server.configure(app="echo:no_such_handler")
        refused = server.reload().assert_refused()
        assert refused.error is not None
        with pytest.raises(AssertionError, match=r"refused|rolled-back"):
            refused.assert_lossless()
        swarm.wait_round()
        server.configure(app="echo:echo", workers=2)
        server.reload().assert_lossless()
        assert len(server.worker_pids()) == 2
    swarm.report.assert_lossless()


def test_a_server_that_never_serves_is_an_error_with_its_log(copyover_server: Servers) -> None:
    """The factory raises, and says what the holder said."""
    with pytest.raises(RuntimeError, match="no_such_handler"):
        copyover_server("echo:no_such_handler", chdir=APPS)


def test_unix_sockets(copyover_server: Servers, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Servers on unix sockets are tested the same way."""
    path = tmp_path_factory.mktemp("u") / "s"
    server = copyover_server("echo:echo", chdir=APPS, listen=(f"unix://{path}",))
    assert server.path == str(path)
    with server.swarm(clients=5, churn=2) as swarm:
        server.reload().assert_lossless()
        swarm.wait_round()
    swarm.report.assert_lossless()


def test_nothing_is_left_behind(copyover_server: Servers) -> None:
    """After a stop no process and no file of the server is left; after a SIGKILL of the holder neither."""
    for end in (copyover.testing.Server.stop, copyover.testing.Server.kill):
        server = copyover_server("echo:echo", chdir=APPS)
        workers = [os.pidfd_open(pid) for pid in server.worker_pids()]
        assert server.descriptors() > 3
        end(server)
        server.discard()
        with pytest.raises(ProcessLookupError):
            os.kill(server.pid, 0)
        for worker in workers:
            assert wait_dead(worker)
        assert not server.directory.exists()


def wait_dead(pidfd: int) -> bool:
    """Wait for the end of a process, which was killed a moment ago."""
    import select  # noqa: PLC0415

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    is_dead = bool(poll.poll(30_000))
    os.close(pidfd)
    return is_dead


# ---- the swarm


@pytest.mark.parametrize("fault", ["repeat", "repeat_byte", "repeat_last", "swallow"])
def test_a_wrong_byte_is_caught(copyover_server: Servers, fault: str) -> None:
    """A server that repeats or swallows a line or a byte is caught, with the position."""
    report = talk_to_faulty(copyover_server("faulty:" + fault, chdir=APPS))
    assert report.wrong
    assert all(re.search(r"byte \d+", sentence) for sentence in report.wrong)


@pytest.mark.parametrize("fault", ["end", "reset"])
def test_a_dropped_connection_is_caught(copyover_server: Servers, fault: str) -> None:
    """A server that ends or resets a connection is caught, once for each client."""
    report = talk_to_faulty(copyover_server("faulty:" + fault, chdir=APPS))
    assert report.dropped == report.clients == len(report.drops)


def test_silence_is_caught(copyover_server: Servers) -> None:
    """A server that answers no more is caught, by the deadline."""
    report = talk_to_faulty(copyover_server("faulty:hang", chdir=APPS))
    assert "waited 2 s" in report.wrong[0]


def talk_to_faulty(server: Server) -> SwarmReport:
    with server.swarm(clients=3, deadline_s=2.0) as swarm:
        for _ in range(8):  # the seventh line is the wrong one
            swarm.wait_round()
    with pytest.raises(AssertionError):
        swarm.report.assert_lossless()
    return swarm.report


def test_a_server_that_is_killed_is_caught(copyover_server: Servers) -> None:
    """Connections that break because nobody has them any more count as dropped."""
    server = copyover_server("echo:echo", chdir=APPS)
    with server.swarm(clients=3, churn=2) as swarm:
        server.kill()
        server.discard()
    assert swarm.report.dropped == 5


def test_state_is_checked_with_a_reply_of_ones_own(copyover_server: Servers) -> None:
    """A test says what each line must be answered with; a count that is state goes on over reloads."""
    server = copyover_server("counting:count", chdir=APPS)
    with server.swarm(clients=5, reply=counted, greeting="hello\n") as swarm:
        server.reload().assert_lossless()
        swarm.wait_round()
    swarm.report.assert_lossless()


def test_forgotten_state_is_caught(copyover_server: Servers) -> None:
    """A handler that keeps the count in a local variable passes until the first reload, and no longer."""
    server = copyover_server("counting:forget", chdir=APPS)
    with server.swarm(clients=5, reply=counted, greeting="hello\n") as swarm:
        server.reload().assert_lossless()
        swarm.wait_round()
    assert len(swarm.report.wrong) == 5


def counted(line: bytes) -> bytes:
    """Return what counting:count answers: lines begin with their number."""
    return b"%d %d\n" % (int(line.split()[0]), len(line))


def test_churn_meets_reloads(copyover_server: Servers) -> None:
    """Clients that come and go during reloads are all served; those that stay and those that go are told apart."""
    server = copyover_server("echo:echo", chdir=APPS, workers=2)
    with server.swarm(clients=4, churn=8, seed=7) as swarm:
        for move in ("together", "rolling", "together"):
            server.reload(move=move).assert_lossless()
            swarm.wait_round()
    report = swarm.report.assert_lossless()
    assert report.clients == 4
    assert report.visits > 8


def test_many_pieces_and_long_lines(copyover_server: Servers) -> None:
    """Lines near the server's limit, in pieces, are compared byte by byte as well."""
    server = copyover_server("echo:echo", chdir=APPS, config={"line_bytes": 65536})
    with server.swarm(clients=4, longest_bytes=60_000, burst=8, pause_s=0.001) as swarm:
        server.reload().assert_lossless()
        swarm.wait_round()
    assert swarm.report.assert_lossless().bytes_verified > 0


def test_a_report_of_nothing_is_no_success() -> None:
    """A swarm that checked nothing proves nothing."""
    empty = SwarmReport(
        clients=0,
        visits=0,
        lines_sent=0,
        lines_verified=0,
        bytes_verified=0,
        dropped=0,
        drops=[],
        wrong=[],
        longest_gap_ms=0.0,
    )
    with pytest.raises(AssertionError, match="0 of 0 lines"):
        empty.assert_lossless()


def test_a_refused_connect_is_a_drop() -> None:
    """Where nobody listens, each client that stays is counted as dropped, at once."""
    swarm = copyover.testing.Swarm(Plan(address=("127.0.0.1", 1), clients=3))
    assert swarm.stop().dropped == 3
