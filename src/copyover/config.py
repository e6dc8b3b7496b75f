"""
What a holder was told: flags and copyover.toml, one frozen schema.

It reads and checks; an error names the file, the line and the key. Flags win over the file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import cattrs
from attrs.validators import ge, gt, in_, instance_of, le, min_len, optional

from copyover import listeners, slots
from copyover.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def _key(doc: str, *, reloadable: bool = True, **options: Any) -> Any:
    return attrs.field(metadata={"doc": doc, "reloadable": reloadable}, **options)


def _needs_bake(config: Config | None, _field: Any, health: str | None) -> None:
    if config is not None and health is not None and config.bake_s <= 0:
        raise ConfigError("is watched while baking, and bake_s is 0: set that too", key="health")


def _slot_size(_: object, __: object, value: int) -> None:
    if value != 0 and not slots.SMALLEST_BYTES <= value <= slots.LARGEST_BYTES:
        raise ValueError(f"must be 0, or from {slots.SMALLEST_BYTES} to {slots.LARGEST_BYTES}")


LONGEST_S = 1e7  # 115 days: longer is never, and infinity is no number of milliseconds


@attrs.frozen(kw_only=True)
class Config:
    """Every key, its default, and whether a reload may change it. The source of the table in docs/operate.md."""

    app: str = _key("module:attribute of the handler, Application or factory", validator=instance_of(str))
    name: str = _key("the holder's name", reloadable=False, default="default", validator=min_len(1))
    user: str | None = _key("the user that workers run as", reloadable=False, default=None)
    group: str | None = _key("the group that workers run as, instead of the user's own", reloadable=False, default=None)
    control_group: str | None = _key(
        "the group whose members may command the holder, besides its user and root", reloadable=False, default=None
    )
    listen: tuple[str, ...] = _key("addresses, each [NAME=]ADDRESS", default=("127.0.0.1:8000",))
    workers: int = _key("interpreters of a generation", default=1, validator=ge(1))
    python: str | None = _key("the release's interpreter; else .venv/bin/python, else the holder's own", default=None)
    chdir: str = _key("the release's directory; a symlink is followed anew at each reload", default=".")
    app_dir: str = _key("where modules are imported from, relative to chdir", default=".")
    move: str = _key(
        "how connections move: HTTP rolling and all else together, or all alike",
        default="auto",
        validator=in_(("auto", "together", "rolling")),
    )
    loop: str = _key("the event loop", default="auto", validator=in_(("auto", "asyncio", "uvloop")))
    timeout_s: float = _key(
        "a reload that has not committed by then is rolled back", default=60.0, validator=[gt(0), le(LONGEST_S)]
    )
    gather_s: float = _key(
        "how long a consistent cut waits for stragglers", default=1.0, validator=[gt(0), le(LONGEST_S)]
    )
    boundary_s: float = _key(
        "how long a connection may take to reach a boundary", default=5.0, validator=[gt(0), le(LONGEST_S)]
    )
    drain_timeout_s: float = _key(
        "how long kept connections may live on", default=3600.0, validator=[ge(0), le(LONGEST_S)]
    )
    max_retiring: int = _key("generations that may retire at a time", default=2, validator=ge(1))
    bake_s: float = _key(
        "how long the incumbent waits after the move, ready to take all back",
        default=0.0,
        validator=[ge(0), le(LONGEST_S)],
    )
    health: str | None = _key(
        "run again and again by /bin/sh while baking; a failure rolls back", default=None, validator=_needs_bake
    )
    stop_timeout_s: float = _key("how long a stop waits for boundaries", default=10.0, validator=[ge(0), le(LONGEST_S)])
    line_bytes: int = _key("the longest line", default=64 << 10, validator=ge(1))
    message_bytes: int = _key("the longest message of messages() and read_exactly()", default=1 << 20, validator=ge(1))
    unsent_bytes: int = _key("what may be unsent before a client is aborted", default=16 << 20, validator=ge(1))
    record_bytes: int = _key("the largest record that travels", default=32 << 20, validator=ge(1))
    worker_connections: int | None = _key(
        "live connections at which a worker stops accepting; else the holder's own limit",
        default=None,
        validator=optional(ge(1)),
    )
    worker_record_bytes: int = _key(
        "what the records of one worker's connections may hold in a move", default=1 << 30, validator=ge(1)
    )
    slot_bytes: int = _key(
        "what a slot takes in the runtime directory; 0 saves nothing",
        default=1024,
        validator=_slot_size,
    )
    on_crash: str = _key(
        "what becomes of connections that cannot go on exactly when their worker is killed",
        default="reset",
        validator=in_(listeners.ON_CRASH),
    )

    @property
    def worker_options(self) -> dict[str, Any]:
        """What a worker is told."""
        names = ("loop", "line_bytes", "message_bytes", "unsent_bytes", "record_bytes")
        return {name: getattr(self, name) for name in names}

    @property
    def addresses(self) -> list[listeners.Address]:
        return [listeners.parse(text) for text in self.listen]


FIELDS = {field.name: field for field in attrs.fields(Config)}


def _strict(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise TypeError(f"should be of type {kind.__name__}, not {type(value).__name__}")

    return structure


_converter = cattrs.Converter()
for _kind in (int, float, str):
    _converter.register_structure_hook(_kind, _strict(_kind))


def load(file: str | None, flags: Mapping[str, Any]) -> Config:
    """
    Return the configuration that *file* and *flags* make together.

    Raises:
        ConfigError: a key is unknown or its value cannot be used; names file, line and key.
        BadAddress: an address cannot be parsed.

    """
    text = _read(file) if file is not None else ""
    try:
        from_file = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        found = re.search(r"\(at line (\d+)", str(problem))
        raise ConfigError(f"no TOML: {problem}", file=file, line=int(found[1]) if found else None) from problem
    values = {}
    for key, value in from_file.items():
        values[key] = _checked(key, value, file=file, line=_line_of(key, text))
    for key, value in flags.items():
        values[key] = _checked(key, value, file=None, line=None)
    if "app" not in values:
        raise ConfigError("is missing: name the application as module:attribute", key="app", file=file)
    config = Config(**values)
    names = [address.name for address in config.addresses]
    if not names or len(set(names)) != len(names):
        what = f"has one name twice among {', '.join(names)}" if names else "names no address"
        raise ConfigError(what, key="listen", file=file, line=_line_of("listen", text))
    return config


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot be read: {problem}", file=file) from problem


def _checked(key: str, value: Any, *, file: str | None, line: int | None) -> Any:
    field = FIELDS.get(key)
    if field is None:
        near = difflib.get_close_matches(key, FIELDS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(FIELDS)}"
        raise ConfigError(f"is no key of copyover.toml{hint}", key=key, file=file, line=line)
    if isinstance(value, str) and "\0" in value:
        raise ConfigError("holds a NUL character", key=key, file=file, line=line)
    if key == "listen" and isinstance(value, str):  # a string is a sequence of strings, too
        raise ConfigError('should be an array of strings: ["HOST:PORT"]', key=key, file=file, line=line)
    try:
        structured = _converter.structure(value, _types()[key])
        if field.validator is not None:
            field.validator(None, field, structured)
    except (ValueError, TypeError, OverflowError, cattrs.BaseValidationError) as problem:
        raise ConfigError(_words(problem), key=key, file=file, line=line) from problem
    return structured


def _types() -> dict[str, Any]:
    return {field.name: field.type for field in attrs.fields(attrs.resolve_types(Config))}


def _words(problem: BaseException) -> str:
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    return str(problem.args[0]) if problem.args else str(problem)


def _line_of(key: str, text: str) -> int | None:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]|\s*\[+{re.escape(key)}[\].]", line):
            return number
    return None


def wishes(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return those of *wanted* that are not None, checked as if they were flags of ``run``.

    Raises:
        ConfigError: a value cannot be used.

    """
    given = {key: value for key, value in wanted.items() if value is not None}
    return {key: _checked(key, value, file=None, line=None) for key, value in given.items()}


def unreloadable(running: Config, wanted: Config) -> list[str]:
    """Return the keys that differ and that only a restart can change."""
    return [
        name
        for name, field in FIELDS.items()
        if not field.metadata["reloadable"] and getattr(running, name) != getattr(wanted, name)
    ]
