"""Which versions of uvicorn are served, and what still works with one that is not known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asgi_servers import Deployment
from copyover.adapters import versions
from copyover.errors import StartupFailed
from http_client import HttpClient
from websocket_client import WebSocketClient

if TYPE_CHECKING:
    from pathlib import Path

    from copyover.testing import Servers

SOURCE = "from starlette.applications import Starlette\napp = Starlette()\n"


def pretend(root: Path, package: str, version: str) -> None:
    """Let *root* say that this is the version which is installed."""
    told = root / f"{package}-{version}.dist-info"
    told.mkdir()
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    (told / "METADATA").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("package", "version"), [("uvicorn", "0.52.4"), ("uvicorn", "0.54.9"), ("websockets", "15.0")])
def test_a_known_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, version: str) -> None:
    pretend(tmp_path, package, version)
    monkeypatch.syspath_prepend(tmp_path)
    versions.check()


@pytest.mark.parametrize(
    ("package", "version"),
    [("uvicorn", "0.52.3"), ("uvicorn", "0.55.0"), ("uvicorn", "1.0"), ("websockets", "14.2"), ("websockets", "18.0")],
)
def test_an_unknown_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, version: str
) -> None:
    """The sentence says which are known, and what still works."""
    pretend(tmp_path, package, version)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StartupFailed, match=rf"^{package} {version} is not known .* below .* --handoff listeners"):
        versions.check()


def test_a_part_that_is_missing_is_named() -> None:
    with pytest.raises(StartupFailed, match="object has no flow, cycle"):
        versions.check_parts(object(), ["__class__", "flow", "cycle"])


def test_a_release_with_an_unknown_uvicorn_is_refused(copyover_server: Servers, tmp_path: Path) -> None:
    """Nobody loses anything by an upgrade of uvicorn that came too early."""
    deployment = Deployment(copyover_server, tmp_path, SOURCE)
    server = deployment.server
    with HttpClient(server.address) as client:
        assert client.get("/").status == 404
        deployment.deploy("two", SOURCE)
        pretend(tmp_path / "two", "uvicorn", "9.9")
        refused = server.reload().assert_refused()
        assert "uvicorn 9.9 is not known" in str(refused.error)
        assert "generation 1" in str(refused.error)
        assert client.get("/").status == 404


def test_from_live_to_listeners_only(copyover_server: Servers) -> None:
    """What the replacement does not take stays in the incumbent: the way to a uvicorn that is not known."""
    server = copyover_server("asgi_raw:app", chdir="tests/apps")
    with HttpClient(server.address) as old, WebSocketClient(server.address, "/number") as talk:
        incumbent = old.get("/who").pid
        assert talk.ask_text("x").startswith("1 ")
        server.configure(handoff="listeners")
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (0, 2)
        assert old.get("/who").pid == incumbent
        assert talk.ask_text("x").startswith("2 ")
        with HttpClient(server.address) as new:
            assert new.get("/who").pid != incumbent


def test_a_handler_does_not_follow_an_asgi_application(copyover_server: Servers) -> None:
    """Neither can go on with the other's connections, and it is said what to do instead."""
    server = copyover_server("asgi_raw:app", chdir="tests/apps")
    server.configure(app="echo:echo")
    refused = server.reload().assert_refused()
    assert "another interface (handler) than the incumbent (asgi)" in str(refused.error)


def test_listeners_only(copyover_server: Servers) -> None:
    """Any uvicorn: new connections come to the replacement, each old one ends where it began; no handshake is lost."""
    server = copyover_server("asgi_raw:app", chdir="tests/apps", config={"handoff": "listeners"})
    with HttpClient(server.address) as old, WebSocketClient(server.address, "/number") as talk:
        incumbent = old.get("/who").pid
        assert talk.ask_text("x").startswith("1 ")
        result = server.reload().assert_lossless()
        assert (result.moved, result.kept) == (0, 2)
        assert {kept["reason"] for kept in result.answer["kept"]} == {
            "the listeners only pass from release to release here (--handoff)",
            "a WebSocketsSansIOProtocol cannot move",
        }
        assert old.get("/who").pid == incumbent
        assert talk.ask_text("x").startswith("2 ")
        with HttpClient(server.address) as new:
            assert new.get("/who").pid != incumbent
