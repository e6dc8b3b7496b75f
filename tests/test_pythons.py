"""Holder, incumbent and replacement are three environments, perhaps three versions of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from clients import Client
from http_client import HttpClient
from websocket_client import Deflater, Frame, Op, WebSocketClient

if TYPE_CHECKING:
    from copyover.testing import Servers

ROOT = Path(__file__).parent.parent
APPS = ROOT / "tests" / "apps"
VERSIONS = ("3.11", "3.12", "3.13")


def find(version: str) -> str | None:
    """Return an interpreter of that version: on the PATH, or one of pyenv's."""
    roots = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))]
    candidates = [shutil.which(f"python{version}")]
    candidates += [str(path) for root in roots for path in sorted(root.glob(f"versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        # A shim of pyenv is on the PATH for versions that are not chosen: only running it tells.
        program = "import sys, venv; print('.'.join(map(str, sys.version_info[:2])))"
        done = subprocess.run([candidate, "-c", program], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    return None


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make an environment of its own for each version that there is, with attrs and nothing else."""
    made = {}
    for version in VERSIONS:
        python = find(version)
        if python is None:
            continue
        directory = tmp_path_factory.mktemp(f"python{version}")
        subprocess.run([python, "-m", "venv", directory], check=True)
        own = str(directory / "bin" / "python")
        subprocess.run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "attrs"], check=True)
        packages = next(directory.glob("lib/python*/site-packages"))
        (packages / "copyover.pth").write_text(f"{ROOT / 'src'}\n", encoding="utf-8")
        made[version] = own
    return made


@pytest.fixture(scope="session")
def web_environments(environments: dict[str, str]) -> dict[str, str]:
    """The same with uvicorn, from here on: a session's other tests have run without it or need not."""
    for python in environments.values():
        packages = ["uvicorn>=0.52.4,<0.55", "websockets>=15,<18", "httptools"]
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(command, check=True)
    return environments


def test_an_asgi_release_without_uvicorn_is_refused(
    copyover_server: Servers, environments: dict[str, str], tmp_path: Path
) -> None:
    """The sentence names the interpreter, and what to install."""
    server = copyover_server("asgi_raw:app", chdir=str(APPS), loop="asyncio")
    bare = tmp_path / "bare"
    python = next(iter(environments.values()))
    subprocess.run([python, "-m", "venv", "--without-pip", bare], check=True)
    packages = next(bare.glob("lib/python*/site-packages"))
    sources = [ROOT / "src", Path(attrs.__file__).parent.parent]
    (packages / "attr").symlink_to(sources[1] / "attr")
    (packages / "attrs").symlink_to(sources[1] / "attrs")
    (packages / "copyover.pth").write_text(f"{sources[0]}\n", encoding="utf-8")
    server.configure(python=str(bare / "bin" / "python"))
    refused = server.reload().assert_refused()
    assert "does not have uvicorn" in str(refused.error)
    assert "pip install 'copyover[uvicorn]'" in str(refused.error)
    assert str(bare) in str(refused.error)


def test_uvicorns_connections_move_from_one_python_to_the_next(
    copyover_server: Servers, web_environments: dict[str, str]
) -> None:
    """A kept connection and a compressed WebSocket, up the versions and down again."""
    if len(web_environments) < 2:
        pytest.skip(f"only Python {', '.join(web_environments)} is installed here; this needs two of {VERSIONS}")
    ladder = [*web_environments.values(), *reversed(web_environments.values())]
    server = copyover_server("asgi_raw:app", chdir=str(APPS), python=ladder[0], loop="asyncio")
    server.configure(uvicorn={"timeout_keep_alive": 600})
    deflater = Deflater(12)
    with (
        HttpClient(server.address) as kept,
        WebSocketClient(server.address, "/echo", offer="permessage-deflate; client_max_window_bits") as packed,
    ):
        pids = {kept.get("/who").pid}
        for number, python in enumerate(ladder[1:], 2):
            said = b"what was said before is referred to %d" % number
            packed.send_frame(Op.BINARY, deflater.message(said), rsv=4)
            assert packed.receive_frame() == Frame(Op.BINARY, said, rsv1=True)
            server.configure(python=python)
            server.reload().assert_lossless()
            pids.add(kept.get("/who").pid)
        assert len(pids) == len(ladder)


def test_connections_move_from_one_python_to_the_next(copyover_server: Servers, environments: dict[str, str]) -> None:
    """The wire knows no version of Python: up, and down again, under load, with every byte."""
    if len(environments) < 2:
        pytest.skip(f"only Python {', '.join(environments)} is installed here; this needs two of {', '.join(VERSIONS)}")
    ladder = [*environments.values(), *reversed(environments.values())]
    server = copyover_server("handlers:tally", chdir=str(APPS), python=ladder[0])
    with Client(server.address) as client:
        assert client.ask(b"x\n") == b"1\n"
        for number, python in enumerate(ladder[1:], 2):
            client.send(b"ha")
            server.configure(python=python)
            server.reload().assert_lossless()
            assert server.status()["workers"][-1]["release"]["python"] == python
            assert client.ask(b"lf\n") == b"%d\n" % number


@pytest.mark.parametrize("version", VERSIONS)
def test_every_byte_moves_on_this_python(copyover_server: Servers, environments: dict[str, str], version: str) -> None:
    """Both moves under load, in an environment that has attrs and nothing else."""
    if version not in environments:
        pytest.skip(f"Python {version} is not installed here")
    assert environments[version] != sys.executable
    server = copyover_server("echo:echo", chdir=str(APPS), python=environments[version], workers=2)
    with server.swarm(clients=20, churn=4, seed=int(version.split(".")[1])) as swarm:
        for move in ("together", "rolling"):
            server.reload(move=move).assert_lossless()
            swarm.wait_round()
    swarm.report.assert_lossless()
