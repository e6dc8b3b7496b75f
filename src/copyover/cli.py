"""
What an operator types, and what the exit code says.

It asks the holder over the control socket and shows the answer: JSON to stdout, all else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from copyover import config as configs
from copyover import console, flags
from copyover import directory as directories
from copyover.errors import CopyoverError, UsageError
from copyover.witness import FINDINGS_SHOWN, Witness

if TYPE_CHECKING:
    from collections.abc import Iterator

DENIED, STOPPED_WAITING = 8, 7
FOLLOW = {"do": "events", "follow": True}
GRACE_S = 30.0  # a roll-back takes its time beyond the deadline


class _Group(click.Group):
    """Turns what goes wrong into one sentence and its exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except CopyoverError as problem:
            click.echo(f"copyover: {problem}", err=True)
            sys.exit(problem.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="copyover", prog_name="copyover")
def main() -> None:
    """Hot upgrades for servers: live connections survive a reload."""


@main.command(cls=flags.RunCommand)
@click.argument("app", required=False)
@click.option("--name", help="Name of the holder; default $COPYOVER_NAME, else default.")
@click.option(
    "--listen",
    multiple=True,
    metavar="[NAME=]ADDRESS",
    help="HOST:PORT, tcp://… or unix:///path; repeatable; default 127.0.0.1:8000.",
)
@click.option("--host", help="Listen on this host; default 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port, 0: any; default 8000.")
@click.option("--uds", metavar="PATH", help="Listen on this unix socket.")
@click.option("--workers", type=int, help="Interpreters of a generation; default 1.")
@click.option("--connections", type=int, help="Refuse to start where the limits do not hold so many at a time.")
@click.option("--python", help="The release's interpreter; default CHDIR/.venv/bin/python, else this one.")
@click.option("--chdir", help="The release's directory; a symlink is followed anew at each reload.")
@click.option("--app-dir", help="Where modules are imported from, relative to CHDIR.")
@click.option("--move", type=click.Choice(["auto", "together", "rolling"]), help="How connections move; default auto.")
@click.option(
    "--loop", type=click.Choice(["auto", "asyncio", "uvloop"]), help="The event loop; auto takes uvloop if there."
)
@click.option(
    "--interface", type=click.Choice(configs.INTERFACES), help="What APP is; auto finds out: a handler, or ASGI."
)
@click.option(
    "--resume",
    multiple=True,
    type=click.Choice(configs.RESUMABLE),
    help="Enter all connections of the kind again after a move, from the top; repeatable.",
)
@click.option("--reenter-rate", type=float, metavar="NUMBER", help="Enter so many in a second again; default all.")
@click.option(
    "--handoff",
    type=click.Choice(["live", "listeners"]),
    help="What moves of an ASGI application; default live: connections, too.",
)
@click.option("--user", help="The user that workers run as; the holder must be root.")
@click.option("--group", help="The group that workers run as; default the user's own.")
@click.option("--config", "file", type=click.Path(dir_okay=False), help="copyover.toml; flags win over it.")
@flags.of_uvicorn
def run(
    *,
    file: str | None,
    listen: tuple[str, ...],
    host: str | None,
    port: int | None,
    uds: str | None,
    chdir: str | None,
    **typed: Any,
) -> None:
    """Start a holder, and the server APP (module:attribute) under it."""
    lists = {
        "listen": flags.listen_of(listen, host, port, uds, _here()),
        "resume": list(typed.pop("resume")),
        "uvicorn": flags.take_options(typed),
    }
    given = {key: value for key, value in typed.items() if value is not None}
    given |= {key: value for key, value in lists.items() if value}
    file = None if file is None else str(Path(file).absolute())
    if chdir is not None:
        given["chdir"] = str(_here() / chdir)
    settled = configs.load(file, given)
    if "name" not in given and settled.name == configs.FIELDS["name"].default:
        given["name"] = directories.default_name()
    if chdir is None and settled.chdir == configs.FIELDS["chdir"].default:
        given["chdir"] = str(_here())
    told = json.dumps({"file": file, "flags": given})
    # A fresh interpreter under the same pid: the holder outlives every deploy and loads no click.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "copyover.holder", told])  # noqa: S606


def _here() -> Path:
    """Return the working directory as the shell names it: a symlink that a deploy moves stays one."""
    named = os.environ.get("PWD", "")
    try:
        return Path(named) if named and Path(named).samefile(Path.cwd()) else Path.cwd()
    except OSError:
        return Path.cwd()


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), help="Roll back after so many seconds."
)
@click.option("--no-wait", is_flag=True, help="Ask for it and return.")
@click.option("--move", type=click.Choice(["auto", "together", "rolling"]), help="How connections move, this time.")
@click.option("--bake", "bake_s", type=click.FloatRange(min=0), help="Keep the incumbent ready so many seconds more.")
@click.option("--health", metavar="COMMAND", help="Run while baking, again and again; a failure rolls back.")
@click.option("--one-way", is_flag=True, help="Go on though the incumbent cannot read the new states.")
@click.option("--no-audit", is_flag=True, help="Do not compare with the kernel's account.")
def reload(name: str | None, *, as_json: bool, no_wait: bool, one_way: bool, no_audit: bool, **wishes: Any) -> None:
    """Replace the interpreters; live connections go on."""
    name = name or directories.default_name()
    request = {"do": "reload", "wait": not no_wait, "one_way": one_way, **configs.wishes(wishes)}
    _follow(name, request, as_json=as_json, is_audited=not (no_audit or no_wait))


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
@click.option("--one-way", is_flag=True, help="Go on though the present release cannot read its states.")
def rollback(name: str | None, *, as_json: bool, one_way: bool) -> None:
    """Undo the reload under way; else go back to the release before, as a reload."""
    request = {"do": "rollback", "one_way": one_way}
    _follow(name or directories.default_name(), request, as_json=as_json, is_audited=True)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def cancel(name: str | None, *, as_json: bool) -> None:
    """Undo the reload under way: everything returns to the incumbent."""
    _follow(name or directories.default_name(), {"do": "cancel"}, as_json=as_json, is_audited=False)


def _follow(name: str, request: dict[str, Any], *, as_json: bool, is_audited: bool) -> None:
    """Ask for a change, wait for its result, say it, and exit with its code."""
    witness = Witness(name, is_present=is_audited)
    timeout_s = request.get("timeout_s")
    try:
        patience_s = None if timeout_s is None else timeout_s + request.get("bake_s", 0.0) + GRACE_S
        with console.call(name, request, patience_s=patience_s) as answers:
            result = _await_result(answers)
    except (KeyboardInterrupt, TimeoutError):
        click.echo(f"\ncopyover: no longer waiting; the reload goes on, see: copyover status {name}", err=True)
        result = {"schema": 1, "outcome": "timeout", "exit_code": STOPPED_WAITING, "error": "no longer waited for"}
        if as_json:
            click.echo(json.dumps(result))
        sys.exit(STOPPED_WAITING)
    if is_audited:
        result["audit"] = witness.testify()
        result["exit_code"] = result["audit"].get("exit_code") or result["exit_code"]
    if as_json:
        click.echo(json.dumps(result))
    _explain_reload(result, name)
    if "audit" in result:
        _explain_audit(result["audit"])
    sys.exit(result["exit_code"])


def _await_result(answers: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Follow the progress, with a bar where somebody watches."""
    with console.progress_bar(is_shown=sys.stderr.isatty()) as show:
        for answer in answers:
            if "progress" in answer:
                show(answer["progress"])
            else:
                return _result_of(answer)
    raise CopyoverError("the holder went away before it answered: what became of the reload is in its log")


def _result_of(answer: dict[str, Any]) -> dict[str, Any]:
    if "denied" in answer:
        click.echo(f"copyover: {answer['denied']}", err=True)
        sys.exit(DENIED)
    if "error" in answer:
        raise UsageError(str(answer["error"]))
    result: dict[str, Any] = answer["result"]
    return result


def _explain_reload(result: dict[str, Any], name: str) -> None:
    outcome = result["outcome"]
    if outcome == "started":
        click.echo(f"copyover: the reload is asked for; see: copyover status {name}", err=True)
        return
    if outcome == "nothing":
        click.echo(f"copyover: {result['error']}", err=True)
        return
    counts = result["connections"]
    if outcome == "done":
        pause = result["pause_ms"]
        spent_s = sum(result["phases_ms"].values()) / 1000
        click.echo(
            f"generation {result['generation']['to']} serves: {counts['moved']} connections moved, "
            f"{counts['kept']} kept, {counts['ended']} ended by themselves, {counts['lost']} lost, in {spent_s:.2f} s; "
            f"pause p50 {pause['p50']:.1f} ms, p99 {pause['p99']:.1f} ms, max {pause['max']:.1f} ms",
            err=True,
        )
        for change, listed in result["listeners"].items():
            for listener in listed:
                click.echo(f"  {change}: listener {listener['name']} at {listener['address']}", err=True)
        for kept in result["kept"]:
            click.echo(f"  kept: connection {kept['connection']}: {kept['reason']}", err=True)
        return
    click.echo(f"copyover: {outcome}: {result['error']}", err=True)
    if result["stderr_tail"]:
        click.echo("The last lines that the replacement wrote:", err=True)
        for line in result["stderr_tail"]:
            click.echo(f"  | {line}", err=True)


def _explain_audit(audit: dict[str, Any]) -> None:
    if "skipped" in audit:
        click.echo(f"  no audit: {audit['skipped']}", err=True)
        return
    click.echo(
        f"  audit: {audit['same']} are the same sockets, {audit['ended']} ended, {audit['missing']} missing, "
        f"{audit['unheld']} unheld",
        err=True,
    )
    for kind, findings in audit["findings"].items():
        for finding in findings:
            click.echo(f"  {kind}: connection {finding['connection']}: {finding['reason']}", err=True)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def audit(name: str | None, *, as_json: bool) -> None:
    """Compare what is held with the kernel's own account; exit 4 if something is missing."""
    from copyover import audit as auditing  # noqa: PLC0415  # 110 ms that no other command pays
    from copyover import comparison  # noqa: PLC0415

    found = comparison.as_object(auditing.compare(name or directories.default_name()))
    if as_json:
        click.echo(json.dumps(found))
    else:
        console.show_audit(found, listed=FINDINGS_SHOWN)
    sys.exit(found["exit_code"])


@main.command()
@click.argument("name", required=False)
@click.option("--python", help="The interpreter that has the new copyover; default the one that the holder runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def upgrade(name: str | None, python: str | None, *, as_json: bool) -> None:
    """Replace the holder's own program; its pid, its workers and all connections stay."""
    if python is not None and "/" in python:
        python = str(_here() / python)
    result = _ask(name, {"do": "upgrade", "python": python}, patience_s=2 * GRACE_S)  # it has two deadlines of its own
    if as_json:
        click.echo(json.dumps(result))
    if result["outcome"] == "done":
        before, now = result["from"], result["to"]
        click.echo(
            f"the holder (pid {result['pid']}) is copyover {now['copyover']} on Python {now['python']} now, and was "
            f"{before['copyover']} on {before['python']}: {result['connections']} connections and {result['workers']} "
            f"workers stay; it was away {result['away_ms']:.0f} ms",
            err=True,
        )
    else:
        click.echo(f"copyover: {result['outcome']}: {result['error']}", err=True)
    sys.exit(result["exit_code"])


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def status(name: str | None, *, as_json: bool) -> None:
    """Show who serves; exit 0 only while a generation does."""
    found = _ask(name, {"do": "status"})
    if as_json:
        click.echo(json.dumps(found))
    else:
        console.show_status(found)
    sys.exit(0 if found["is_serving"] else 1)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def connections(name: str | None, *, as_json: bool) -> None:
    """List the live connections."""
    found = _ask(name, {"do": "connections"})
    if as_json:
        click.echo(json.dumps(found))
    else:
        console.show_connections(found)


@main.command()
@click.argument("name", required=False)
@click.option("--follow", is_flag=True, help="Go on with each as it happens, until the holder ends.")
@click.option("--json", "as_json", is_flag=True, help="It is JSON in any case, one object a line.")
def events(name: str | None, *, follow: bool, as_json: bool) -> None:  # noqa: ARG001  # every command takes --json
    """Print the last 1000 transitions of the holder, one JSON object a line."""
    if follow:
        sys.exit(_follow_events(name or directories.default_name()))
    for noted in _ask(name, {"do": "events"})["events"]:
        click.echo(json.dumps(noted))


def _follow_events(name: str) -> int:
    """Print what happens until the holder has stopped, or Ctrl-C; return the exit code."""
    has_stopped = False
    with contextlib.suppress(KeyboardInterrupt), console.call(name, FOLLOW, patience_s=None) as answers:
        for answer in answers:
            noted = answer["event"] if "event" in answer else _result_of(answer)
            click.echo(json.dumps(noted))
            has_stopped = noted["fields"].get("phase") == "stopped"
        if not has_stopped:
            raise CopyoverError("the holder went away, or hung up because too much was left unread; its log says which")
    return 0


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def stop(name: str | None, *, as_json: bool) -> None:
    """Stop the holder and its server: connections end at their boundaries; return when it is gone."""
    name = name or directories.default_name()
    found = _ask(name, {"do": "stop"})
    console.wait_gone(int(found["pid"]))
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(f"holder {name} (pid {found['pid']}) has stopped", err=True)


def _ask(name: str | None, request: dict[str, Any], *, patience_s: float = GRACE_S) -> dict[str, Any]:
    name = name or directories.default_name()
    try:
        with console.call(name, request, patience_s=patience_s) as answers:
            for answer in answers:
                return _result_of(answer)
    except TimeoutError:
        click.echo(f"copyover: the holder {name!r} lives and does not answer; is it stopped (SIGSTOP)?", err=True)
        sys.exit(STOPPED_WAITING)
    raise CopyoverError("the holder went away before it answered")


if __name__ == "__main__":
    main()
