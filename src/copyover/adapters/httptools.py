"""uvicorn's HTTP connections on httptools, where the release has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from copyover.adapters.http import Http

if TYPE_CHECKING:
    from copyover.adapters.uvicorn import Uvicorn


class HttpTools(Http, HttpToolsProtocol):
    """``--http httptools``"""

    def __init__(self, host: Uvicorn, **kwargs: Any) -> None:
        HttpToolsProtocol.__init__(self, **kwargs)
        self._begin(host)

    def on_response_complete(self) -> None:
        HttpToolsProtocol.on_response_complete(self)
        self.answered()
