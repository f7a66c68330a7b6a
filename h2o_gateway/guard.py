"""What every request to the API must pass: the key, and the limit of its body."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """ASGI middleware around the API; `limit` is asked for the bytes that a path may take.

    A body is counted as it comes, so that one without a Content-Length is limited too. It is read to its
    end before it is refused: a client that is still sending would else see a broken connection, not why.

    Args:
        app: what is guarded.
        key: the Bearer key.
        limit: bytes by path.
    """

    def __init__(self, app: ASGIApp, *, key: str, limit: Callable[[str], int]) -> None:
        self._app = app
        self._digest = _digest(f"Bearer {key}".encode())
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it pass, or answer 401 or 413."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # Digests are of one length: the comparison tells nothing about the key's.
        if not hmac.compare_digest(_digest(headers.get(b"authorization", b"")), self._digest):
            refusal = JSONResponse({"detail": "unknown key"}, 401, headers={"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        too_large = f"the body is larger than {limit} bytes"
        if int(headers.get(b"content-length", b"0")) > limit:
            await _drain(receive)
            await JSONResponse({"detail": too_large}, 413)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                if message.get("more_body"):
                    await _drain(receive)
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, counted, send)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass
