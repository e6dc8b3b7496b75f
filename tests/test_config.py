"""Flags and copyover.toml: one frozen schema, and errors that name file, line and key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest

from copyover import config
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
    """1024 bytes a connection; 0 is none."""
    assert config.load(None, APP).slot_bytes == 1024
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


def test_every_key_is_documented() -> None:
    """The table of docs/operate.md is made of these."""
    assert all(field.metadata["doc"] for field in config.FIELDS.values())
