"""
Which options of uvicorn's a server takes, under uvicorn's own names, and where to turn for the others.

It knows the table and checks values; it imports no uvicorn, which only the release has. What the options do is
uvicorn's business, in the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping


@attrs.frozen(kw_only=True)
class Option:
    """
    One keyword of ``uvicorn.Config``.

    *flag* is what it is called on the command line, if not by its name with a value. *rigid* are those of the
    *choices* whose connections cannot move.
    """

    name: str
    kind: type[Any] = str
    doc: str
    choices: tuple[str, ...] = ()
    rigid: tuple[str, ...] = ()
    least: int | None = None
    flag: str = attrs.field(default=attrs.Factory(lambda self: "--" + self.name.replace("_", "-"), takes_self=True))


def _pair(name: str, doc: str) -> Option:
    flag = name.replace("_", "-")
    return Option(name=name, kind=bool, flag=f"--{flag}/--no-{flag}", doc=doc)


_ALL = (
    Option(name="factory", kind=bool, doc="APP is called without arguments and returns the application."),
    Option(name="env_file", doc="Environment variables for the application, relative to CHDIR; read by each release."),
    Option(name="http", choices=("auto", "h11", "httptools", "zttp"), rigid=("zttp",), doc="The HTTP implementation."),
    Option(
        name="ws",
        choices=("auto", "none", "websockets-sansio", "websockets", "wsproto"),
        rigid=("websockets", "wsproto"),
        doc="The WebSocket implementation.",
    ),
    Option(name="ws_max_size", kind=int, least=0, doc="The largest WebSocket message, in bytes."),
    Option(name="ws_max_queue", kind=int, least=0, doc="The longest queue of messages; for --ws websockets only."),
    Option(name="ws_ping_interval", kind=float, least=0, doc="Seconds between pings; 0 sends none."),
    Option(name="ws_ping_timeout", kind=float, least=0, doc="Seconds that a pong may take."),
    Option(name="ws_per_message_deflate", kind=bool, doc="Compress WebSocket messages."),
    Option(name="lifespan", choices=("auto", "on", "off"), doc="Whether the application has a lifespan."),
    Option(name="log_config", doc="Logging configuration, .ini, .json or .yaml; relative to CHDIR."),
    Option(
        name="log_level",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        doc="The level of uvicorn's loggers.",
    ),
    _pair("access_log", "Log each request."),
    _pair("use_colors", "Colours in uvicorn's log."),
    _pair("proxy_headers", "Believe X-Forwarded-Proto and X-Forwarded-For of trusted proxies."),
    Option(name="forwarded_allow_ips", doc="The trusted proxies, with commas; default $FORWARDED_ALLOW_IPS."),
    _pair("server_header", "Send the Server header."),
    _pair("date_header", "Send the Date header."),
    Option(name="headers", kind=list, flag="--header", doc="NAME:VALUE, a header of each response; repeatable."),
    Option(name="root_path", doc="Where a proxy mounts the application."),
    Option(name="limit_concurrency", kind=int, least=1, doc="Connections or tasks at which requests are answered 503."),
    Option(name="timeout_keep_alive", kind=int, least=0, doc="Seconds that an idle connection is kept."),
    Option(name="h11_max_incomplete_event_size", kind=int, least=1, doc="The largest head that h11 takes, in bytes."),
    Option(name="reset_contextvars", kind=bool, doc="Run each request in a fresh context."),
)
OPTIONS: Mapping[str, Option] = {option.name: option for option in _ALL}

_LISTENERS = "the holder makes the listeners: write listen = [ADDRESS], or run with --listen, --host and --port, --uds"
_OURS = "it is no option of uvicorn's here: write it above the table"
_RELOAD = "code is replaced when you say so, and no connection is lost: copyover reload"
_TLS = "TLS ends in haproxy or nginx in front, so that its sessions outlive a reload: see TLS in docs/operate.md"
_LIMIT = "a worker serves until it is replaced: copyover reload from a timer does what recycling it would"

# Names of uvicorn's that mean nothing here; a dash for each underscore they are flags too.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("reload", "reload_dir", "reload_include", "reload_exclude", "reload_delay"), _RELOAD),
    **dict.fromkeys(("reload_dirs", "reload_includes", "reload_excludes"), _RELOAD),
    "fd": f"{_LISTENERS}; a service manager passes its own with LISTEN_FDS",
    "backlog": "listeners have a backlog of 4096 at most: net.core.somaxconn lowers it",
    **dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_version", "ssl_cert_reqs"), _TLS),
    **dict.fromkeys(("ssl_ca_certs", "ssl_ciphers", "ssl_context_factory"), _TLS),
    "http2": "HTTP/2 connections cannot move: let haproxy or nginx in front speak it",
    **dict.fromkeys(("limit_max_requests", "limit_max_requests_jitter"), _LIMIT),
    "timeout_graceful_shutdown": "connections that stay behind have drain_timeout_s, those of a stop stop_timeout_s",
    "timeout_worker_healthcheck": "the kernel says when a worker ends; bake_s and health watch a new release",
}
_ABOVE: Mapping[str, str] = {
    **dict.fromkeys(("host", "port", "uds"), _LISTENERS),
    **dict.fromkeys(("loop", "workers", "interface", "app", "app_dir"), _OURS),
}


def where_else(name: str) -> str | None:
    """Return what to do instead of giving that option, if it is known for that."""
    return ELSEWHERE.get(name) or _ABOVE.get(name)


def check(name: str, value: Any) -> Any:
    """
    Return *value* as uvicorn takes it for the option *name*, which is one of ours.

    Raises:
        ValueError: it cannot be used; the sentence lacks its subject.

    """
    option = OPTIONS[name]
    if option.kind is list:
        return _headers(value)
    if option.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not option.kind:
        raise ValueError(f"should be of type {option.kind.__name__}, not {type(value).__name__}")
    if option.choices and value not in option.choices:
        raise ValueError(f"should be one of {', '.join(option.choices)}, not {value!r}")
    if option.least is not None and not option.least <= value < float("inf"):
        raise ValueError(f"should be at least {option.least}, not {value}")
    if option.kind is str and "\0" in value:
        raise ValueError("holds a NUL character")
    return value


def _headers(value: Any) -> list[list[str]]:
    if not isinstance(value, list) or not all(_is_header(header) for header in value):
        raise ValueError('should be an array of headers, each ["NAME", "VALUE"] in one line of Latin-1')
    return value


def _is_header(header: Any) -> bool:
    if not isinstance(header, list) or len(header) != 2 or not all(isinstance(text, str) for text in header):
        return False
    name, value = header
    is_name = name.isascii() and name.isprintable() and bool(name) and not set(name) & set(' ":,;()<>@[]{}/\\?=')
    return is_name and not set(value) & set("\r\n\0") and max(map(ord, value), default=0) < 256


def is_rigid(name: str, value: Any) -> bool:
    """Whether connections that are served so cannot move."""
    return value in OPTIONS[name].rigid
