"""
How ``copyover run`` takes uvicorn's options: flags made from their table, in a section of the help of their own.

It turns what was typed into configuration; whether a value can be used is decided in config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from copyover import uvicorn_options
from copyover.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from copyover.uvicorn_options import Option

_TYPES = {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING, list: click.STRING}


class _UvicornOption(click.Option):
    """One of theirs, for the help."""


class RunCommand(click.Command):
    """Shows uvicorn's options behind ours."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        ours: list[tuple[str, str]] = []
        theirs: list[tuple[str, str]] = []
        for parameter in self.get_params(context):
            row = parameter.get_help_record(context)
            if row is not None and isinstance(parameter, click.Option):
                (theirs if isinstance(parameter, _UvicornOption) else ours).append(row)
        for title, rows in (("Options", ours), ("Options for ASGI applications, as uvicorn has them", theirs)):
            with formatter.section(title):
                formatter.write_dl(rows)


def of_uvicorn(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all flags of uvicorn's, those too that are refused with a pointer."""
    for option in reversed(list(uvicorn_options.OPTIONS.values())):
        command = _taken(option)(command)
    for name in uvicorn_options.ELSEWHERE:
        command = _refused(name)(command)
    return command


def _taken(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    is_switch = "/" in option.flag or option.name in ("factory", "reset_contextvars")
    return click.option(
        option.flag,
        option.name,
        cls=_UvicornOption,
        help=option.doc,
        default=None,
        is_flag=is_switch,
        type=None if is_switch else _TYPES[option.kind],
        multiple=option.kind is list,
        metavar=f"[{'|'.join(option.choices)}]" if option.choices else None,
    )


def _refused(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag = "--" + name.replace("_", "-")

    def refuse(_: click.Context, __: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise UsageError(f"{flag} of uvicorn's has no place here; {uvicorn_options.ELSEWHERE[name]}")

    # Some of them take a value and some do not: whichever follows makes no difference.
    return click.option(
        flag, name, hidden=True, is_eager=True, expose_value=False, callback=refuse, is_flag=False, flag_value=""
    )


def take_options(given: dict[str, Any]) -> dict[str, Any]:
    """Take uvicorn's out of *given*, those that were typed."""
    taken = {name: given.pop(name) for name in uvicorn_options.OPTIONS if name in given}
    taken["headers"] = [header.split(":", 1) for header in taken["headers"]]
    return {name: value for name, value in taken.items() if value not in (None, [])}


def listen_of(listen: tuple[str, ...], host: str | None, port: int | None, uds: str | None, here: Path) -> list[str]:
    """
    Return the addresses that --listen, or uvicorn's --host, --port or --uds name; none if none was given.

    Raises:
        UsageError: two of these ways were chosen.

    """
    is_tcp = host is not None or port is not None
    if (bool(listen), is_tcp, uds is not None).count(True) > 1:
        raise UsageError("choose one of --listen, --uds, and --host with --port; --listen can be given several times")
    if uds is not None:
        path = str(here / uds)
        if set(path) & set("?#"):
            raise UsageError(f"--uds {uds}: a path with ? or # cannot be an address")
        return [f"unix://{path}?mode=0666"]  # as uvicorn leaves it, so that a proxy of another user may connect
    if is_tcp:
        host = "127.0.0.1" if host is None else host
        return [f"tcp://[{host}]:{_port(port)}" if ":" in host else f"tcp://{host}:{_port(port)}"]
    return list(listen)


def _port(port: int | None) -> int:
    return 8000 if port is None else port
