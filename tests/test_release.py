"""What a generation is started from: directory, interpreter and command, resolved once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from copyover.config import load
from copyover.errors import ChangeRefused, PythonNotFound
from copyover.release import Release, pin

if TYPE_CHECKING:
    from pathlib import Path


def pinned(chdir: Path, **flags: Any) -> Release:
    return pin(load(None, {"app": "chat:main", "chdir": str(chdir), **flags}))


def interpreter(place: Path) -> Path:
    """Make a venv's interpreter: a link to another, as venv makes it."""
    place.parent.mkdir(parents=True)
    place.symlink_to(sys.executable)
    return place


def test_a_release_is_its_directory_resolved(tmp_path: Path) -> None:
    """No symlink is left in it that a deploy could move."""
    real = tmp_path / "releases" / "1"
    real.mkdir(parents=True)
    current = tmp_path / "current"
    current.symlink_to(real)
    release = pinned(current, app_dir="src")
    assert release.directory == str(real.resolve())
    assert release.app_dir == str(real.resolve() / "src")
    assert release.application == "chat:main"


def test_a_moved_symlink_is_a_new_release(tmp_path: Path) -> None:
    """Pinned at each reload; what was pinned before stays what it was."""
    for name in "12":
        interpreter(tmp_path / name / ".venv" / "bin" / "python")
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "1")
    first = pinned(current)
    current.unlink()
    current.symlink_to(tmp_path / "2")
    second = pinned(current)
    assert first.directory.endswith("/1")
    assert second.directory.endswith("/2")
    assert first.python.endswith("/1/.venv/bin/python")
    assert second.python.endswith("/2/.venv/bin/python")


def test_the_release_s_own_venv_is_preferred(tmp_path: Path) -> None:
    """``.venv/bin/python`` where there is one, else the holder's interpreter."""
    assert pinned(tmp_path).python == sys.executable
    interpreter(tmp_path / ".venv" / "bin" / "python")
    assert pinned(tmp_path).python == str(tmp_path.resolve() / ".venv" / "bin" / "python")


def test_a_venv_is_pinned_but_its_interpreter_s_link_is_kept(tmp_path: Path) -> None:
    """The directory is resolved; the link of bin/python is how Python finds the venv it is in."""
    interpreter(tmp_path / "venvs" / "7" / "bin" / "python")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / ".venv").symlink_to(tmp_path / "venvs" / "7")
    python = pinned(tmp_path / "app").python
    assert python == str(tmp_path.resolve() / "venvs" / "7" / "bin" / "python")


def test_a_named_interpreter(tmp_path: Path) -> None:
    """A path is relative to the release; a bare name is looked for on the PATH."""
    interpreter(tmp_path / "env" / "bin" / "python")
    assert pinned(tmp_path, python="env/bin/python").python == str(tmp_path.resolve() / "env" / "bin" / "python")
    assert pinned(tmp_path, python=sys.executable).python.endswith(sys.executable.rsplit("/", 1)[-1])


def test_a_bare_name_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell would find it."""
    found = interpreter(tmp_path / "bin" / "python-of-mine")
    monkeypatch.setenv("PATH", str(found.parent))
    assert pinned(tmp_path, python="python-of-mine").python == str(found)
    with pytest.raises(PythonNotFound, match="no such-python on the PATH") as caught:
        pinned(tmp_path, python="such-python")
    assert caught.value.exit_code == 17


def test_a_missing_interpreter_is_named_with_its_remedy(tmp_path: Path) -> None:
    """Nothing is started to find out."""
    with pytest.raises(PythonNotFound, match=r"there is no interpreter .*/env/bin/python; say --python"):
        pinned(tmp_path, python="env/bin/python")
    file = tmp_path / "plain"
    file.write_text("no program")
    file.chmod(0o644)
    with pytest.raises(PythonNotFound):
        pinned(tmp_path, python="./plain")


def test_a_missing_directory_refuses_the_change(tmp_path: Path) -> None:
    """A deploy that is not there yet: what serves, serves on."""
    with pytest.raises(ChangeRefused, match="absent does not exist"):
        pinned(tmp_path / "absent")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "gone")
    with pytest.raises(ChangeRefused, match="dangling does not exist"):
        pinned(dangling)


def test_the_command_keeps_the_directory_off_the_path(tmp_path: Path) -> None:
    """A module of the release named like one of the standard library's must not be imported in its place."""
    release = pinned(tmp_path)
    assert release.command == (release.python, "-P", "-m", "copyover.worker")
