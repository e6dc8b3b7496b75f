"""
The demo on the web: the chat page, and beside it clients of each kind that check every message.

It decides what a good run is; ``scripts/demo --web`` runs it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_running import DemoError, Reloads, Running, wait_ctrl_c

if TYPE_CHECKING:
    import argparse
    import contextlib

CLIENT_PROCESSES = 2
ROOM_SIZE = 10
RELOADS = (
    ("green, a new release", "green", "done"),
    ("a release that does not start", "broken", "refused"),
    ("back to blue", "blue", "done"),
    ("blue again", "blue", "done"),
    ("green", "green", "done"),
)
KINDS = {"websocket": "WebSocket", "keepalive": "HTTP, kept alive", "stream": "server-sent events"}
COUNTS = ("reconnects", "lost", "repeated", "wrong")


def run_web(options: argparse.Namespace, directory: Path, children: contextlib.ExitStack) -> bool:
    """Show everything; return whether nothing was lost and each reload ended as it had to."""
    module = options.app.partition(":")[0]
    demo = Running(options.app, make_releases(Path(options.example).resolve(), directory), directory, children)
    try:
        is_good = run(demo, options)
    except DemoError:
        print(demo.log.read_text(errors="replace"), file=sys.stderr)
        raise
    if options.interactive:
        wait_ctrl_c(advice(demo, Path(options.example) / f"{module}.py"))
    return is_good


def make_releases(example: Path, directory: Path) -> dict[str, Path]:
    """Make two releases of the same files: the page shows the name of the directory that serves it."""
    releases = {name: directory / name for name in ("blue", "green")}
    for release in releases.values():
        release.mkdir()
        for file in example.glob("*.*"):
            (release / file.name).symlink_to(file)
    return releases


def sizes_of(clients: int) -> dict[str, int]:
    """Return how many clients there are of each kind."""
    return {"websocket": clients, "keepalive": clients, "stream": -(-clients // 4)}


def connect(demo: Running, sizes: dict[str, int], every_s: float) -> None:
    """Start the clients: whole rooms, and a share of the others, in each process."""
    rooms = -(-sizes["websocket"] // ROOM_SIZE)
    for process in range(CLIENT_PROCESSES):
        mine = range(process, rooms, CLIENT_PROCESSES)
        plan = {
            "rooms": {room: min(ROOM_SIZE, sizes["websocket"] - room * ROOM_SIZE) for room in mine},
            "keepalive": len(range(process, sizes["keepalive"], CLIENT_PROCESSES)),
            "stream": len(range(process, sizes["stream"], CLIENT_PROCESSES)),
            "every_s": every_s,
        }
        demo.add_crowd("demo_web_clients.py", plan)
    demo.wait_connected()


# ---- the run


def run(demo: Running, options: argparse.Namespace) -> bool:
    sizes = sizes_of(options.clients)
    connect(demo, sizes, options.every)
    show_intro(demo, sizes)
    reloads = Reloads(demo, sum(sizes.values()))
    demo.ask_crowds("round")
    for number, reload in enumerate(RELOADS, 1):
        reloads.run(number, *reload)
    reports = demo.ask_crowds("stop")
    totals = {kind: add([report[kind] for report in reports]) for kind in KINDS}
    show_totals(totals, [sentence for report in reports for sentence in report["sentences"]])
    is_lossless = all(kind["verified"] and not any(kind[count] for count in COUNTS) for kind in totals.values())
    is_good = reloads.is_as_expected and is_lossless
    print("\nNothing was dropped." if is_good else "\nFAILED: see above.", flush=True)
    return is_good


def add(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of what the processes counted for one kind; lists are put together."""
    total = dict(reports[0])
    for report in reports[1:]:
        total = {key: total[key] + report[key] for key in total}
    return total


# ---- what is shown


def show_intro(demo: Running, sizes: dict[str, int]) -> None:
    print(f"""
A chat page (Starlette, on uvicorn's protocols) runs under copyover on http://{demo.host}:{demo.port}/, as one process.
{sizes["websocket"]} clients talk over WebSockets, half of them compressed;
{sizes["keepalive"]} clients send requests on kept connections, some of them pipelined or in halves;
{sizes["stream"]} clients listen to server-sent events.
Now the server is replaced {len(RELOADS)} times under this load. One of the releases is broken on purpose: the running
server then simply stays. Everything is numbered, in both directions, and each client checks what it gets.
""")


ROW = "{:<20} {:>8} {:>10} {:>11} {:>6} {:>9} {:>6} {:>10} {:>8} {:>8}"


def show_totals(totals: dict[str, dict[str, Any]], sentences: list[str]) -> None:
    print()
    print(ROW.format("", "", "", "", "", "", "", "gap p50", "p99", "max"))
    print(ROW.format("clients", "number", "verified", "reconnects", "lost", "repeated", "wrong", "ms", "ms", "ms"))
    for kind, name in KINDS.items():
        total = totals[kind]
        gaps = [f"{gap:.0f}" for gap in quantiles(total["gaps_ms"])]
        print(ROW.format(name, total["clients"], total["verified"], *(total[count] for count in COUNTS), *gaps))
    print('\n"gap" is the longest that a client waited for an answer; for events, for the next one.')
    for sentence in sentences[:10]:
        print(f"    {sentence}")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return p50, p99 and the largest."""
    ranked = sorted(values) or [0.0]
    return ranked[len(ranked) // 2], ranked[min(len(ranked) * 99 // 100, len(ranked) - 1)], ranked[-1]


def advice(demo: Running, example: Path) -> str:
    def deploy(release: str) -> str:
        return f"ln -sfn {demo.releases[release]} {demo.directory / 'current'} && {demo.command('reload')}"

    return f"""
The server stays up until Ctrl-C. Open it in a browser, in two windows if you like:

    http://{demo.host}:{demo.port}/

Replace it while you talk; the page counts how often it had to reconnect, and what it has lost:

    {deploy("blue")}
    {deploy("green")}
    {deploy("broken")}
    {demo.command("connections")}

Edit {os.path.relpath(example)} and reload to run your change. The log is {demo.log}. Ctrl-C here ends it all.
"""
