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
from attrs.validators import deep_iterable, ge, gt, in_, instance_of, le, min_len, optional

from copyover import listeners, slots, uvicorn_options
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
FASTEST = 1e6
INTERFACES = ("auto", "handler", "asgi", "asgi3", "asgi2", "wsgi")
RESUMABLE = ("websocket", "stream")


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
    interface: str = _key(
        "what the application is: a handler of copyover's, or of a kind that uvicorn serves",
        default="auto",
        validator=in_(INTERFACES),
    )
    uvicorn: dict[str, Any] = _key("options of uvicorn's, by its names", factory=dict)
    resume: tuple[str, ...] = _key(
        "which connections of an ASGI application are entered again after a move, whatever it says itself",
        default=(),
        validator=deep_iterable(in_(RESUMABLE)),
    )
    reenter_rate: float = _key(
        "how many ASGI connections a worker enters again in a second, after a move; 0: all at once",
        default=0.0,
        validator=[ge(0), le(FASTEST)],
    )
    handoff: str = _key(
        "what moves of an ASGI application: live connections, or listeners only",
        default="live",
        validator=in_(("live", "listeners")),
    )
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
    connections: int | None = _key(
        "live connections that the limits of this machine must hold; else run and reload are refused",
        default=None,
        validator=optional(ge(1)),
    )
    worker_connections: int | None = _key(
        "live connections at which a worker stops accepting; else the holder's own limit",
        default=None,
        validator=optional(ge(1)),
    )
    worker_record_bytes: int = _key(
        "what the records of one worker's connections may hold in a move", default=1 << 30, validator=ge(1)
    )
    slot_bytes: int | None = _key(
        "what a slot takes in the runtime directory; 0 saves nothing; else 1024 for handlers, 16384 for ASGI",
        default=None,
        validator=optional(_slot_size),
    )
    shared_bytes: int = _key("the largest shared state that an application exports", default=64 << 20, validator=ge(1))
    on_crash: str = _key(
        "what becomes of connections that cannot go on exactly when their worker is killed",
        default="reset",
        validator=in_(listeners.ON_CRASH),
    )

    @property
    def worker_options(self) -> dict[str, Any]:
        """What a worker is told."""
        return {name: getattr(self, name) for name in _FOR_WORKERS}

    @property
    def addresses(self) -> list[listeners.Address]:
        return [listeners.parse(text) for text in self.listen]


FIELDS = {field.name: field for field in attrs.fields(Config)}
_FOR_WORKERS = (
    *("loop", "line_bytes", "message_bytes", "unsent_bytes", "record_bytes", "slot_bytes", "shared_bytes"),
    *("interface", "uvicorn", "resume", "reenter_rate", "handoff"),
)
_LISTS = {"listen": '["HOST:PORT"]', "resume": '["websocket"]'}


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


@attrs.frozen
class _Source:
    """Where values came from; flags have neither file nor line."""

    file: str | None = None
    text: str = ""

    def refuse(self, problem: str, key: str, option: str | None = None) -> ConfigError:
        """Make the error of *key*, or of an *option* in it."""
        line = _line_of(key, self.text)
        if option is None:
            return ConfigError(problem, key=key, file=self.file, line=line)
        line = _line_in_table(key, option, self.text) or line
        return ConfigError(problem, key=f"{key}.{option}", file=self.file, line=line)


_FLAGS = _Source()


def load(file: str | None, flags: Mapping[str, Any]) -> Config:
    """
    Return the configuration that *file* and *flags* make together.

    Raises:
        ConfigError: a key is unknown or its value cannot be used; names file, line and key.
        BadAddress: an address cannot be parsed.

    """
    source = _Source(file, _read(file)) if file is not None else _FLAGS
    values = {key: _checked(key, value, source) for key, value in _parse(source).items()}
    told = {key: _checked(key, value, _FLAGS) for key, value in flags.items()}
    options = dict.fromkeys(values.get("uvicorn", {}), source)
    options |= dict.fromkeys(told.get("uvicorn", {}), _FLAGS)
    values |= told | {"uvicorn": values.get("uvicorn", {}) | told.get("uvicorn", {})}
    if "app" not in values:
        raise ConfigError("is missing: name the application as module:attribute", key="app", file=file)
    config = Config(**values)
    names = [address.name for address in config.addresses]
    if not names or len(set(names)) != len(names):
        what = f"has one name twice among {', '.join(names)}" if names else "names no address"
        raise source.refuse(what, "listen")
    _check_together(config, options, _FLAGS if "resume" in told else source)
    return config


def _parse(source: _Source) -> dict[str, Any]:
    try:
        return tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as problem:
        found = re.search(r"\(at line (\d+)", str(problem))
        line = int(found[1]) if found else None
        raise ConfigError(f"no TOML: {problem}", file=source.file, line=line) from problem


def _check_together(config: Config, options: Mapping[str, _Source], resume: _Source) -> None:
    """Refuse what contradicts each other; *options* says where each of uvicorn's came from, *resume* where that did."""
    if config.interface == "handler":
        for option, where in options.items():
            raise where.refuse("is an option of uvicorn's, which serves no handler", "uvicorn", option)
        if config.resume:
            raise resume.refuse('is about ASGI applications, and interface is "handler"', "resume")
    for option, where in options.items():
        chosen = config.uvicorn[option]
        if config.handoff == "live" and uvicorn_options.is_rigid(option, chosen):
            movable = [choice for choice in uvicorn_options.OPTIONS[option].choices if choice != chosen]
            movable = [choice for choice in movable if not uvicorn_options.is_rigid(option, choice)]
            raise where.refuse(
                f"connections that {chosen} serves cannot move: choose {', '.join(movable)}, or let only the listeners "
                'outlive a reload: handoff = "listeners" (--handoff listeners)',
                *("uvicorn", option),
            )


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot be read: {problem}", file=file) from problem


def _checked(key: str, value: Any, source: _Source) -> Any:
    field = FIELDS.get(key)
    if field is None:
        raise source.refuse(f"is no key of copyover.toml{_hint(key)}", key)
    if key == "uvicorn":
        return _checked_options(value, source)
    if isinstance(value, str) and "\0" in value:
        raise source.refuse("holds a NUL character", key)
    if key in _LISTS and isinstance(value, str):  # a string is a sequence of strings, too
        raise source.refuse(f"should be an array of strings: {_LISTS[key]}", key)
    try:
        structured = _converter.structure(value, _types()[key])
        if field.validator is not None:
            field.validator(None, field, structured)
    except (ValueError, TypeError, OverflowError, cattrs.BaseValidationError) as problem:
        raise source.refuse(_words(problem), key) from problem
    return structured


def _hint(key: str) -> str:
    if key in uvicorn_options.OPTIONS:
        return "; it is an option of uvicorn's: write it in the table [uvicorn]"
    near = difflib.get_close_matches(key, FIELDS, 1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(FIELDS)}"


def _checked_options(table: Any, source: _Source) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise source.refuse('should be a table: [uvicorn] with lines such as http = "h11"', "uvicorn")
    checked = {}
    for option, value in table.items():
        if option not in uvicorn_options.OPTIONS:
            raise source.refuse(_advice(option), "uvicorn", option)
        try:
            checked[option] = uvicorn_options.check(option, value)
        except (ValueError, OverflowError) as problem:
            raise source.refuse(str(problem), "uvicorn", option) from problem
    return checked


def _advice(option: str) -> str:
    advice = uvicorn_options.where_else(option)
    if advice is not None:
        return f"cannot be set here; {advice}"
    near = difflib.get_close_matches(option, uvicorn_options.OPTIONS, 1)
    known = f"did you mean {near[0]}?" if near else f"known are {', '.join(uvicorn_options.OPTIONS)}"
    return f"is no option of uvicorn's that a worker takes; {known}"


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


def _line_in_table(table: str, key: str, text: str) -> int | None:
    """Find the key behind the head of its table, or in one line with the table's name."""
    head, lines = rf"\s*\[{re.escape(table)}\]", text.splitlines()
    quoted = rf"[\"']?{re.escape(key)}[\"']?\s*[=.]"
    first = next((number for number, line in enumerate(lines, 1) if re.match(head, line)), len(lines))
    for number, line in enumerate(lines, 1):
        where = rf"\s*{quoted}" if number > first else rf"\s*[\"']?{re.escape(table)}[\"']?\s*[.=].*\b{quoted}"
        if re.match(where, line):
            return number
    return None


def wishes(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return those of *wanted* that are not None, checked as if they were flags of ``run``.

    Raises:
        ConfigError: a value cannot be used.

    """
    given = {key: value for key, value in wanted.items() if value is not None}
    return {key: _checked(key, value, _FLAGS) for key, value in given.items()}


def unreloadable(running: Config, wanted: Config) -> list[str]:
    """Return the keys that differ and that only a restart can change."""
    return [
        name
        for name, field in FIELDS.items()
        if not field.metadata["reloadable"] and getattr(running, name) != getattr(wanted, name)
    ]
