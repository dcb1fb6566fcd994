"""Messages on a stream of bytes: a header, a message, and raw bytes behind it.

| bytes | what |
|---|---|
| 4 | magic |
| 4 | number of the frame on this connection, from 0 |
| 4 | length of the message |
| 4 | length of the raw bytes |
| 4 | CRC-32 of the 16 bytes before, the message and the raw bytes |

Little-endian. A frame that is lost, doubled, cut, out of turn, damaged or too long raises FrameError, and
nothing of it is used. No length is believed before it is compared with the limit.
"""

import struct
import zlib

MAGIC = b"KVX1"
HEADER = struct.Struct("<4sIIII")
MESSAGE_LIMIT = 4 << 20  # bytes of a message: a prompt of 800,000 tokens
GREETING_LIMIT = 16 << 10  # before the peer has proved anything
PAYLOAD_LIMIT = 16 << 20  # raw bytes of a frame


class FrameError(ValueError):
    """What has come is no frame of this protocol. The connection is of no more use."""


def encode(number: int, message: bytes, payload: bytes | memoryview = b"") -> bytes:
    """Header and message of a frame; the payload is to be sent behind them."""
    prefix = HEADER.pack(MAGIC, number & 0xFFFFFFFF, len(message), len(payload), 0)[:-4]
    crc = zlib.crc32(payload, zlib.crc32(message, zlib.crc32(prefix)))
    return b"".join((prefix, crc.to_bytes(4, "little"), message))


class FrameParser:
    """Bytes as they come in, frames out.

    `space` is where the next bytes are to be put, `advance` says how many were; a frame's views are good
    until the next `space`.
    """

    def __init__(self) -> None:
        self.message_limit, self.payload_limit = GREETING_LIMIT, 0
        self._header = bytearray(HEADER.size)
        self._body = bytearray()
        self._number = 0
        self._filled = 0  # bytes of what is being read
        self._lengths: tuple[int, int] | None = None  # None: it is a header
        self._crc = 0

    def raise_limits(self, payload: int) -> None:
        """The peer has proved that it knows the secret."""
        self.message_limit, self.payload_limit = MESSAGE_LIMIT, payload

    def space(self) -> memoryview:
        """Never empty."""
        if self._lengths is None:
            return memoryview(self._header)[self._filled :]
        return memoryview(self._body)[self._filled : sum(self._lengths)]

    def advance(self, count: int) -> tuple[memoryview, memoryview] | None:
        """So many bytes have been put. A frame's message and payload when it is whole. Raises
        FrameError."""
        self._filled += count
        if self._lengths is None:
            if self._filled < HEADER.size:
                return None
            self._read_header()
            assert self._lengths is not None
        message, payload = self._lengths
        if self._filled < message + payload:
            return None
        whole = memoryview(self._body)[: message + payload]
        if zlib.crc32(whole, zlib.crc32(self._header[:-4])) != self._crc:
            raise FrameError(f"frame {self._number} is damaged: its checksum differs")
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._filled, self._lengths = 0, None
        return whole[:message], whole[message:]

    def _read_header(self) -> None:
        magic, number, message, payload, self._crc = HEADER.unpack(self._header)
        if magic != MAGIC:
            raise FrameError(f"no frame begins with {magic!r}")
        if number != self._number:
            raise FrameError(f"frame {number} has come where frame {self._number} was due")
        if not 0 < message <= self.message_limit:
            raise FrameError(f"a message of {message} bytes: the limit is {self.message_limit}")
        if payload > self.payload_limit:
            raise FrameError(f"{payload} raw bytes in a frame: the limit is {self.payload_limit}")
        if len(self._body) < message + payload:
            self._body = bytearray(message + payload)
        self._filled, self._lengths = 0, (message, payload)
