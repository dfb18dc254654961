"""The protocol between the server and an interpreter. Standard library only.

A cell runs in the process of the interpreter and has access to its channel. The server therefore treats a reply as text written
by the cell: it contains no status except "failed", its size is bounded, and it must contain the nonce of the request. A cell can
find the nonce of its own request, with the same effect as printing; it cannot predict the next one.
"""

import socket
import struct
from asyncio import StreamReader

FORK = struct.Struct(">H")  # to the process that forks: number of the user, sent with channel and lifeline
NONCE_BYTES = 16
READY = b"r"
REQUEST = struct.Struct(f">{NONCE_BYTES}sI")  # nonce, length of the code in bytes
REPLY = struct.Struct(f">{NONCE_BYTES}s?I")  # nonce, whether the cell failed, length of the output in bytes
BYTES_PER_CHAR = 6  # a character that UTF-8 cannot encode is written as \\ud800


class ForgedReply(Exception):
    """The bytes are not a reply to the current request."""


def encoded(text: str) -> bytes:
    r"""UTF-8 of any text. Half a surrogate pair, which UTF-8 cannot encode, is written as an escape.

    >>> encoded("a\ud800").decode()
    'a\\ud800'
    """
    return text.encode(errors="backslashreplace")


def request(nonce: bytes, code: str) -> bytes:
    """The bytes of a request."""
    body = encoded(code)
    return REQUEST.pack(nonce, len(body)) + body


def reply(nonce: bytes, failed: bool, output: str) -> bytes:
    """The bytes of a reply."""
    body = encoded(output)
    return REPLY.pack(nonce, failed, len(body)) + body


def read_request(channel: socket.socket) -> tuple[bytes, str] | None:
    """Nonce and code of the next request. None after the server has closed the channel."""
    header = _exactly(channel, REQUEST.size)
    if header is None:
        return None
    nonce, size = REQUEST.unpack(header)
    body = _exactly(channel, size)
    return None if body is None else (nonce, body.decode(errors="replace"))


async def read_reply(reader: StreamReader, nonce: bytes, max_chars: int) -> tuple[bool, str]:
    """Whether the cell failed, and its output: at most `max_chars` characters, always encodable.

    Raises:
        ForgedReply: The bytes are not a reply to the request with this nonce.
        IncompleteReadError: The channel was closed.
    """
    found, failed, size = REPLY.unpack(await reader.readexactly(REPLY.size))
    if found != nonce or size > BYTES_PER_CHAR * max_chars:
        raise ForgedReply
    return failed, (await reader.readexactly(size)).decode(errors="replace")[:max_chars]


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    found = b""
    while len(found) < size:
        part = channel.recv(size - len(found))
        if not part:
            return None
        found += part
    return found
