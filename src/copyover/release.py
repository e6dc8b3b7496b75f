"""
What a generation is started from: directory, interpreter and command, resolved once.

It starts nothing. A moved symlink is another release at the next reload; a crash restart uses the pinned one.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from copyover.errors import ChangeRefused, PythonNotFound

if TYPE_CHECKING:
    from copyover.config import Config


@attrs.frozen
class Release:
    """*directory* and the venv of *python* hold no symlink that a deploy could move."""

    directory: str
    python: str
    application: str
    app_dir: str

    @property
    def command(self) -> tuple[str, ...]:
        # -P: the working directory does not go onto sys.path before the standard library is imported.
        return (self.python, "-P", "-m", "copyover.worker")


def pin(config: Config) -> Release:
    """
    Resolve the release that *config* names, as it is now.

    Raises:
        ChangeRefused: the directory does not exist.
        PythonNotFound: the interpreter does not exist.

    """
    directory = os.path.realpath(config.chdir)
    if not Path(directory).is_dir():
        raise ChangeRefused(f"the release's directory {config.chdir} does not exist")
    app_dir = os.path.realpath(Path(directory) / config.app_dir)
    return Release(directory, _python(config.python, directory), config.app, app_dir)


def _python(named: str | None, directory: str) -> str:
    if named is None:
        default = Path(directory) / ".venv" / "bin" / "python"
        return _pinned_venv(default) if default.exists() else sys.executable
    if "/" not in named:
        found = shutil.which(named)
        if found is None:
            raise PythonNotFound(f"there is no {named} on the PATH; say --python with a path")
        return found
    path = Path(directory) / named
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise PythonNotFound(f"there is no interpreter {path}; say --python, or make the venv first")
    return _pinned_venv(path)


def _pinned_venv(python: Path) -> str:
    """Resolve the venv's directory only: the interpreter's own link is how Python finds its venv. site(3)"""
    return str(Path(os.path.realpath(python.parent.parent)) / python.parent.name / python.name)
