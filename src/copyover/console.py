"""
The operator's side of the control socket, and how answers look on a terminal.

It decides nothing about exit codes; rich is loaded only where something is drawn.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Any

from copyover import directory as directories
from copyover.errors import HolderAbsent, PermissionRefused
from copyover.sockets import connect_unix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console


class Denied(PermissionRefused):
    """The control socket belongs to somebody else."""

    exit_code = 8


@contextlib.contextmanager
def call(name: str, request: dict[str, Any], *, patience_s: float | None) -> Iterator[Iterator[dict[str, Any]]]:
    """
    Send one request to the holder *name*; iterate over its answers.

    Raises:
        TimeoutError: no line came for *patience_s* seconds (None: wait for ever).
        HolderAbsent: nobody listens.
        Denied: this user may not connect.

    """
    path = directories.of(name).control
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            connect_unix(sock, str(path), patience_s=patience_s)
        except TimeoutError:
            raise
        except PermissionError as refused:
            raise Denied(f"this user may not command the holder {name!r} at {path}") from refused
        except OSError as absent:
            pid = directories.starting_pid(directories.of(name))
            if pid is not None:
                sentence = "it is starting, or hears the workers of one that died; ask again in a moment"
                raise HolderAbsent(f"the holder {name!r} (pid {pid}) does not answer yet: {sentence}") from absent
            raise HolderAbsent(
                f"no holder named {name!r} listens on {path}; start one with: copyover run --name {name} APP; "
                f"if it runs under another COPYOVER_RUNTIME_DIR, set that here too"
            ) from absent
        with contextlib.suppress(BrokenPipeError):  # who is denied is answered and hung up on before the request
            sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile("r", encoding="utf-8") as lines, contextlib.suppress(ConnectionResetError):
            yield (json.loads(line) for line in lines)


def wait_gone(pid: int) -> None:
    """Wait until the process has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    os.close(pidfd)


@contextlib.contextmanager
def progress_bar(*, is_shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that shows how far the change is."""
    if not is_shown:
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415  # 40 ms that a pipe does not pay
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("booting", total=None)

        def show(progress: dict[str, Any]) -> None:
            total = progress["moved"] + progress["open"]
            bar.update(task, description=progress["phase"], completed=progress["moved"], total=total or None)

        yield show


def show_status(found: dict[str, Any]) -> None:
    """Print ``status`` for people."""
    from rich.console import Console  # noqa: PLC0415  # 40 ms that no other command pays

    screen = Console(soft_wrap=True)
    phase = found["phase"]
    deadline = "" if phase["deadline_in_s"] is None else f", {phase['deadline_in_s']:.0f} s to its deadline"
    live = found["connections"]
    screen.print(
        f"[bold]{found['name']}[/] (pid {found['pid']}): {phase['name']}{deadline}, generation {found['generation']}, "
        f"{live['live']} live connections, {live['kept']} kept in a retiring generation",
        highlight=False,
    )
    if found["limits"]["is_full"]:
        screen.print(
            f"  full: of {found['limits']['connections']} connections that its descriptors allow for; nobody accepts, "
            "clients wait in the backlog; raise the hard RLIMIT_NOFILE and restart",
            highlight=False,
        )
    for worker in found["workers"]:
        if worker["is_full"]:
            quota = found["limits"]["worker_connections"]
            advice = "raise worker_connections or workers, and reload"
            screen.print(f"  worker {worker['worker']} has its quota of {quota} connections; {advice}", highlight=False)
    for listener in found["listeners"]:
        state = "" if listener["state"] == "serving" else f" ({listener['state']})"
        screen.print(f"  listens on {listener['address']}{state}", highlight=False, markup=False)
    for blocking in phase["blocked_by"]:
        screen.print(f"  waits for {_in_words(blocking)}", highlight=False, markup=False)
        for line in blocking.get("last_lines", ()):
            screen.print(f"    | {line}", highlight=False, markup=False)
    _show_workers(found, screen)
    last = found["last_reload"]
    if last is not None:
        counts = ", ".join(f"{number} {what}" for what, number in last["connections"].items())
        screen.print(f"  last reload: {last['outcome']} ({counts})", highlight=False)
        if last["error"]:
            screen.print(f"  {last['error']}", highlight=False, markup=False)


def _show_workers(found: dict[str, Any], screen: Console) -> None:
    for retiring in found["retiring"]:
        for kept in retiring["kept"]:
            why = f"{kept['connections']} {kept['kind']}: {kept['reason']}"
            line = f"  generation {retiring['generation']} retires, and keeps {why}"
            screen.print(line, highlight=False, markup=False)
    columns = ("worker", "pid", "generation", "state", "connections")
    _show_table(
        (*columns, "release"),
        [
            (*(worker[column] for column in columns), (worker["release"] or {}).get("directory"))
            for worker in found["workers"]
        ],
    )


def _in_words(blocking: dict[str, Any]) -> str:
    who = f"worker {blocking['worker']} (pid {blocking['pid']})"
    if "connection" in blocking:
        who = f"connection {blocking['connection']} from {blocking['peer'] or 'a client that has gone'}, {who}"
    time = "" if blocking["for_s"] is None else f", for {blocking['for_s']:.1f} s"
    return f"{who}{time}: {blocking['reason']}"


def show_connections(found: dict[str, Any]) -> None:
    """Print ``connections`` for people."""
    columns = ("connection", "listener", "peer", "kind", "worker", "generation", "state", "kept")
    _show_table(columns, [[row[column] for column in columns] for row in found["connections"]])


def _show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table that fits the terminal; to a pipe nothing is cut off."""
    lines = [list(columns), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print(text.rstrip())  # noqa: T201  # it is the answer
        return
    from rich.console import Console  # noqa: PLC0415  # 40 ms that a pipe does not pay
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    Console(soft_wrap=True).print(table, crop=False)


def show_audit(found: dict[str, Any], *, listed: int) -> None:
    """Print ``audit`` for people."""
    from rich.console import Console  # noqa: PLC0415  # 40 ms that a pipe does not pay
    from rich.table import Table  # noqa: PLC0415

    screen = Console(soft_wrap=True)
    half = "".join(f", {number} in {state}" for state, number in found["half_closed"].items())
    screen.print(
        f"[bold]{found['held']}[/] held: {found['same']} are the kernel's live sockets{half}; {found['ended']} ended "
        f"meanwhile, {found['over']} over, {found['missing']} missing, {found['unheld']} unheld",
        highlight=False,
    )
    queues = Table("listener", "address", "waiting", "limit", "", box=None)
    for listener in found["listeners"]:
        cells = (listener["name"], listener["address"], listener["waiting"], listener["limit"])
        queues.add_row(*map(str, cells), "full" if listener["is_full"] else "")
    screen.print(queues)
    for kind, findings in found["findings"].items():
        for finding in findings[:listed]:
            screen.print(
                f"  {kind}: connection {finding['connection']}: {finding['reason']}", highlight=False, markup=False
            )
        if len(findings) > listed:
            screen.print(f"  {kind}: {len(findings) - listed} more, see --json", highlight=False)
