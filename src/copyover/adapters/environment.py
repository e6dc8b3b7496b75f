"""
The file of ``--env-file``, put into the environment before the application is imported.

It sets what is not set yet, as uvicorn does.
"""

from __future__ import annotations

from pathlib import Path

from copyover.errors import StartupFailed


def load(path: str) -> None:
    """
    Load *path*, relative to the release's directory.

    Raises:
        StartupFailed: it does not exist, or python-dotenv is not installed.

    """
    try:
        from dotenv import load_dotenv  # noqa: PLC0415  # the release may not have it
    except ImportError as missing:
        raise StartupFailed("--env-file needs python-dotenv: pip install 'uvicorn[standard]'") from missing
    if not Path(path).is_file():
        raise StartupFailed(f"there is no file {path} in {Path.cwd()}, which --env-file names")
    load_dotenv(dotenv_path=path)
