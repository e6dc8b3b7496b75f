"""Flags and copyover.toml: one frozen schema, and errors that name file, line and key."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from copyover import config, uvicorn_options
from copyover.errors import BadAddress, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

APP = {"app": "chat:main"}


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "copyover.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def problem_of(file: str | None, flags: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.load(file, flags)
    return caught.value


def test_defaults_need_the_application_only() -> None:
    """One flag, and everything else has a value that serves."""
    made = config.load(None, APP)
    assert (made.app, made.name, made.workers, made.move, made.loop) == ("chat:main", "default", 1, "auto", "auto")
    assert [(address.host, address.port) for address in made.addresses] == [("127.0.0.1", 8000)]


def test_slots_are_on_and_can_be_switched_off() -> None:
    """The worker decides how large, by what it serves; 0 is none."""
    assert config.load(None, APP).slot_bytes is None
    assert config.load(None, {**APP, "slot_bytes": 2048}).slot_bytes == 2048
    assert config.load(None, APP).on_crash == "reset"
    assert config.load(None, {**APP, "slot_bytes": 0}).slot_bytes == 0


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """A key of the file holds unless a flag says otherwise."""
    file = written(tmp_path, 'app = "a:b"\nworkers = 3\nmove = "rolling"\n')
    made = config.load(file, {"workers": 5})
    assert (made.app, made.workers, made.move) == ("a:b", 5, "rolling")


def test_lists_and_numbers_of_the_file(tmp_path: Path) -> None:
    """Seconds may be whole numbers; addresses are a list."""
    file = written(tmp_path, 'app = "a:b"\nlisten = ["web=127.0.0.1:1", "unix:///run/x.sock"]\ntimeout_s = 5\n')
    made = config.load(file, {})
    assert made.timeout_s == 5.0
    assert type(made.timeout_s) is float
    assert made.listen == ("web=127.0.0.1:1", "unix:///run/x.sock")
    assert [address.name for address in made.addresses] == ["web", "unix:///run/x.sock"]


def test_a_missing_application_is_named(tmp_path: Path) -> None:
    """With the file that could name it, where there is one."""
    assert str(problem_of(None, {})) == "app: is missing: name the application as module:attribute"
    file = written(tmp_path, "workers = 2\n")
    problem = problem_of(file, {})
    assert (problem.file, problem.key) == (file, "app")


@pytest.mark.parametrize(
    ("line", "key", "says"),
    [
        ('worker = "2"', "worker", "did you mean workers?"),
        ("zzz = 1", "zzz", "known are app, name"),
        ('workers = "2"', "workers", "should be of type int, not str"),
        ("workers = true", "workers", "should be of type int, not bool"),
        ("workers = 2.0", "workers", "should be of type int, not float"),
        ("workers = 0", "workers", "must be >= 1"),
        ('move = "sideways"', "move", "must be in"),
        ('loop = "twisted"', "loop", "must be in"),
        ("timeout_s = 0", "timeout_s", "must be > 0"),
        ("timeout_s = nan", "timeout_s", "must be > 0"),
        ("timeout_s = inf", "timeout_s", "must be <= "),
        ("drain_timeout_s = -1", "drain_timeout_s", "must be >= 0"),
        ('name = ""', "name", "must be >= 1"),
        ("listen = [1]", "listen", "should be of type str, not int"),
        ("python = 3", "python", "should be of type str, not int"),
        ("listen = []", "listen", "names no address"),
        ("slot_bytes = 255", "slot_bytes", "must be 0, or from 256 to 1048576"),
        ("slot_bytes = 1048577", "slot_bytes", "must be 0, or from 256"),
        ("slot_bytes = -1", "slot_bytes", "must be 0, or from 256"),
        ('on_crash = "hope"', "on_crash", "must be in"),
        ('listen = ["a=h:1", "a=h:2"]', "listen", "has one name twice among a, a"),
        ('interface = "rsgi"', "interface", "must be in"),
        ('resume = "stream"', "resume", 'should be an array of strings: ["websocket"]'),
        ('resume = ["http"]', "resume", "must be in"),
        ("reenter_rate = -1", "reenter_rate", "must be >= 0"),
        ("reenter_rate = inf", "reenter_rate", "must be <= "),
        ('handoff = "dead"', "handoff", "must be in"),
        ("shared_bytes = 0", "shared_bytes", "must be >= 1"),
        ('uvicorn = "h11"', "uvicorn", "should be a table: [uvicorn]"),
        ('http = "h11"', "http", "it is an option of uvicorn's: write it in the table [uvicorn]"),
    ],
)
def test_a_wrong_key_names_file_line_and_key(tmp_path: Path, line: str, key: str, says: str) -> None:
    """Whoever wrote the file finds the place without searching."""
    file = written(tmp_path, f'# a comment\napp = "a:b"\n\n{line}\n')
    problem = problem_of(file, {})
    assert (problem.file, problem.line, problem.key) == (file, 4, key)
    assert str(problem).startswith(f"{file}:4: {key}: ")
    assert says in problem.problem


def test_a_wrong_flag_names_the_key_alone() -> None:
    """There is no line to name."""
    problem = problem_of(None, {**APP, "workers": 0})
    assert (problem.file, problem.line, problem.key) == (None, None, "workers")
    assert str(problem).startswith("workers: ")


def test_broken_toml_names_its_line(tmp_path: Path) -> None:
    """As the parser found it."""
    file = written(tmp_path, 'app = "a:b"\nworkers = = 2\n')
    problem = problem_of(file, {})
    assert (problem.file, problem.line, problem.key) == (file, 2, None)
    assert "no TOML" in str(problem)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Absent, or no text."""
    assert "cannot be read" in str(problem_of(str(tmp_path / "absent.toml"), {}))
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe")
    assert str(problem_of(str(file), {})).startswith(str(file))


@pytest.mark.parametrize("text", ["[workers]\nnumber = 2\n", '"workers" = "x"\n', "workers.number = 2\n"])
def test_keys_are_found_however_they_are_written(tmp_path: Path, text: str) -> None:
    """A table, a quoted or a dotted key has a line too."""
    problem = problem_of(written(tmp_path, f'app = "a:b"\n{text}'), {})
    assert (problem.key, problem.line) == ("workers", 2)


def test_an_address_that_cannot_be_parsed_is_refused() -> None:
    """With the exit code of addresses."""
    with pytest.raises(BadAddress, match="nowhere") as caught:
        config.load(None, {**APP, "listen": ("nowhere",)})
    assert caught.value.exit_code == 14


def test_wishes_are_checked_as_flags() -> None:
    """What a caller of reload asks for is held to the same schema; None is no wish."""
    assert config.wishes({"timeout_s": 3, "move": None}) == {"timeout_s": 3.0}
    with pytest.raises(ConfigError, match="move"):
        config.wishes({"move": "sideways"})


def test_what_only_a_restart_can_change_is_named() -> None:
    """The name; anything else a reload may change."""
    running = config.load(None, APP)
    changed = attrs.evolve(running, workers=9, app="other:app", listen=("127.0.0.1:1",))
    assert config.unreloadable(running, changed) == []
    assert config.unreloadable(running, attrs.evolve(running, name="other")) == ["name"]


def test_a_worker_is_told_what_concerns_it() -> None:
    """Loop and limits, by the names of the schema."""
    options = config.load(None, {**APP, "line_bytes": 99}).worker_options
    assert options["line_bytes"] == 99
    assert set(options) <= set(config.FIELDS)
    assert "drain_timeout_s" not in options


# ---- uvicorn's options

IN_ONE_LINE = "\n\nuvicorn = { factory = true, %s }"
IN_TABLE = {
    'http = "h12"': "http: should be one of auto, h11, httptools, zttp, not 'h12'",
    "http = 1": "http: should be of type str, not int",
    "acess_log = true": "acess_log: is no option of uvicorn's that a worker takes; did you mean access_log?",
    "zzz = true": "zzz: is no option of uvicorn's that a worker takes; known are factory",
    'access_log = "no"': "access_log: should be of type bool, not str",
    "timeout_keep_alive = -1": "timeout_keep_alive: should be at least 0, not -1",
    "timeout_keep_alive = true": "timeout_keep_alive: should be of type int, not bool",
    "ws_ping_interval = nan": "ws_ping_interval: should be at least 0, not nan",
    f"ws_ping_interval = {'9' * 400}": "ws_ping_interval: int too large",
    'headers = ["a: b"]': "headers: should be an array of headers",
    'headers = [["a b", "c"]]': "headers: should be an array of headers",
    'headers = [["a", "b\\r\\nc: d"]]': "headers: should be an array of headers",
    'headers = [["a", "\\u20ac"]]': "headers: should be an array of headers",
    'root_path = "\\u0000"': "root_path: holds a NUL character",
    'ws = "wsproto"': "ws: connections that wsproto serves cannot move: choose auto, none, websockets-sansio, or",
    'ws = "websockets"': "ws: connections that websockets serves cannot move",
    'http = "zttp"': "http: connections that zttp serves cannot move: choose auto, h11, httptools, or",
    "reload = true": "reload: cannot be set here; code is replaced when you say so",
    'reload_dirs = ["."]': "reload_dirs: cannot be set here; code is replaced when you say so",
    "port = 80": "port: cannot be set here; the holder makes the listeners: write listen = [ADDRESS]",
    'loop = "asyncio"': "loop: cannot be set here; it is no option of uvicorn's here: write it above the table",
    'ssl_keyfile = "x"': "ssl_keyfile: cannot be set here; TLS ends in haproxy or nginx in front",
}


@pytest.mark.parametrize("line", IN_TABLE)
@pytest.mark.parametrize("how", ["[uvicorn]\nfactory = true\n%s", "uvicorn.factory = true\n\nuvicorn.%s", IN_ONE_LINE])
def test_a_wrong_option_of_uvicorn_names_its_line(tmp_path: Path, line: str, how: str) -> None:
    """In a table, dotted, or inline: the line of the option, not of the table."""
    file = written(tmp_path, f'app = "a:b"\n{how % line}\n')
    problem = problem_of(file, {})
    assert (problem.file, problem.line) == (file, 4)
    assert str(problem).startswith(f"{file}:4: uvicorn.{IN_TABLE[line]}")


def test_uvicorns_options_go_to_the_worker(tmp_path: Path) -> None:
    """Those that were given, flags over the file, option by option; the worker's uvicorn knows the rest."""
    assert config.load(None, APP).worker_options["uvicorn"] == {}
    file = written(tmp_path, 'app = "a:b"\n[uvicorn]\nhttp = "h11"\nws_ping_interval = 5\naccess_log = true\n')
    made = config.load(file, {"uvicorn": {"access_log": False, "headers": [["x-a", "b"]]}, "resume": ["stream"]})
    options = made.worker_options
    expected = {"http": "h11", "ws_ping_interval": 5.0, "access_log": False, "headers": [["x-a", "b"]]}
    assert options["uvicorn"] == expected
    assert type(options["uvicorn"]["ws_ping_interval"]) is float
    assert options["resume"] == ("stream",)
    assert (options["interface"], options["reenter_rate"], options["handoff"]) == ("auto", 0.0, "live")
    assert (options["slot_bytes"], options["shared_bytes"]) == (None, 64 << 20)


def test_a_flag_that_corrects_the_file_is_no_contradiction(tmp_path: Path) -> None:
    """What counts in the end is looked at, and named where it came from."""
    file = written(tmp_path, 'app = "a:b"\n[uvicorn]\nws = "wsproto"\n')
    assert config.load(file, {"uvicorn": {"ws": "none"}}).uvicorn == {"ws": "none"}
    assert config.load(file, {"handoff": "listeners"}).uvicorn == {"ws": "wsproto"}
    assert str(problem_of(None, {**APP, "uvicorn": {"ws": "wsproto"}})).startswith("uvicorn.ws: connections that")


def test_a_handler_has_no_options_of_uvicorn(tmp_path: Path) -> None:
    """They would do nothing: who wrote them expects something else."""
    handler = {**APP, "interface": "handler"}
    assert config.load(None, handler).interface == "handler"
    problem = problem_of(None, {**handler, "uvicorn": {"factory": True}})
    assert str(problem) == "uvicorn.factory: is an option of uvicorn's, which serves no handler"
    file = written(tmp_path, 'app = "a:b"\ninterface = "handler"\n[uvicorn]\nhttp = "h11"\n')
    assert (problem_of(file, {}).line, problem_of(file, {}).key) == (4, "uvicorn.http")
    file = written(tmp_path, 'app = "a:b"\ninterface = "handler"\n')
    problem = problem_of(file, {"resume": ["stream"]})
    assert str(problem) == 'resume: is about ASGI applications, and interface is "handler"'


def test_the_table_is_uvicorns() -> None:
    """Each option is a keyword of uvicorn.Config, and each of its keywords is an option, or has its pointer."""
    uvicorn = pytest.importorskip("uvicorn")
    theirs = set(inspect.signature(uvicorn.Config).parameters) - {"timeout_notify", "callback_notify"}
    ours = uvicorn_options.OPTIONS.keys()
    assert ours <= theirs
    assert {name for name in theirs if uvicorn_options.where_else(name) is None} == ours


def test_every_key_is_documented() -> None:
    """The table of docs/operate.md is made of these."""
    assert all(field.metadata["doc"] for field in config.FIELDS.values())
