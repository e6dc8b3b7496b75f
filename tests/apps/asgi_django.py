"""Django with Channels, in one file, as its documentation has it; it knows nothing of copyover."""

from __future__ import annotations

import os
from typing import Any

import django
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="of no value",
    CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
)
django.setup()


def who(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"pid": os.getpid(), "method": request.method, "length": len(request.body)})


class Room(AsyncWebsocketConsumer):  # type: ignore[misc]  # Channels has no types
    """Whoever is in the room hears what anybody says."""

    async def connect(self) -> None:
        await self.channel_layer.group_add("room", self.channel_name)
        await self.accept()

    async def disconnect(self, code: int) -> None:  # noqa: ARG002  # its name is Channels'
        await self.channel_layer.group_discard("room", self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:  # noqa: ARG002  # as above
        await self.channel_layer.group_send("room", {"type": "said", "text": text_data})

    async def said(self, event: dict[str, Any]) -> None:
        await self.send(text_data=f"{os.getpid()} {event['text']}")


urlpatterns = [path("who", who)]

app = ProtocolTypeRouter({"http": get_asgi_application(), "websocket": URLRouter([path("room", Room.as_asgi())])})
