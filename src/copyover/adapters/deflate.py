"""
permessage-deflate that can be gone on with elsewhere: it remembers what the next message may refer to. RFC 7692

The compressor needs no memory: after a flush a fresh one is legal. The decompressor needs the last window of what it
gave out, which zlib keeps to itself.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Opcode

if TYPE_CHECKING:
    from websockets.frames import Frame


class Deflate(PerMessageDeflate):
    """
    Made of what was negotiated, without a detour: each costs ten microseconds.

    *window* is what a decompressor that goes on here has to be given.
    """

    def __init__(
        self,
        remote_no_context_takeover: bool,  # noqa: FBT001  # as its base has it
        local_no_context_takeover: bool,  # noqa: FBT001
        remote_max_window_bits: int,
        local_max_window_bits: int,
        compress_settings: dict[str, Any] | None,
    ) -> None:
        super().__init__(
            remote_no_context_takeover,
            local_no_context_takeover,
            remote_max_window_bits,
            local_max_window_bits,
            compress_settings,
        )
        self.window = bytearray()

    @classmethod
    def of(cls, negotiated: PerMessageDeflate) -> Deflate:
        return cls(
            negotiated.remote_no_context_takeover,
            negotiated.local_no_context_takeover,
            negotiated.remote_max_window_bits,
            negotiated.local_max_window_bits,
            negotiated.compress_settings,
        )

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        is_compressed = self.decode_cont_data if frame.opcode is Opcode.CONT else frame.rsv1
        decoded = super().decode(frame, max_size=max_size)
        if is_compressed and not self.remote_no_context_takeover:
            self.window += decoded.data
            del self.window[: -(1 << self.remote_max_window_bits)]
        return decoded

    def parameters(self) -> list[int]:
        """Return what was negotiated, for ``again``."""
        return [
            int(self.remote_no_context_takeover),
            int(self.local_no_context_takeover),
            self.remote_max_window_bits,
            self.local_max_window_bits,
        ]

    @classmethod
    def again(cls, parameters: list[int], window: bytes) -> Deflate:
        """Return one that goes on from *window*."""
        remote, local, remote_bits, local_bits = parameters
        settings = {"memLevel": 5}  # as in uvicorn
        made = cls(bool(remote), bool(local), remote_bits, local_bits, settings)
        if window:
            made.window += window
            made.decoder = zlib.decompressobj(wbits=-remote_bits, zdict=window)
        return made
