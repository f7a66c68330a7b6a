"""What every request to the API must pass: the key, and the limit of its body."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Callable

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DRAINED_BYTES = 16 << 20
# Else the server would read on for as long as somebody sends.
_CLOSE = {"Connection": "close"}


class Guard:
    """ASGI middleware around the API; `limit` is asked for the bytes that a path may take.

    A body is counted as it comes, so that one without a Content-Length is limited too. Some more of it is
    read before it is refused: a client that is still sending would else see a broken connection, not why.

    Args:
        app: what is guarded.
        key: the Bearer key.
        limit: bytes by path.
        idle: seconds that a body may pause.
    """

    def __init__(self, app: ASGIApp, *, key: str, limit: Callable[[str], int], idle: float) -> None:
        self._app = app
        self._digest = _digest(f"Bearer {key}".encode())
        self._limit = limit
        self._idle = idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it pass, or answer 401, 408 or 413."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # Digests are of one length: the comparison tells nothing about the key's.
        if not hmac.compare_digest(_digest(headers.get(b"authorization", b"")), self._digest):
            refusal = JSONResponse({"detail": "unknown key"}, 401, headers=_CLOSE | {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        too_large = f"the body is larger than {limit} bytes"
        if int(headers.get(b"content-length", b"0")) > limit:
            await self._drain(receive)
            await JSONResponse({"detail": too_large}, 413, headers=_CLOSE)(scope, receive, send)
            return
        seen = 0
        complete = False

        async def counted() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(self._idle):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body paused for more than {self._idle:g} s", _CLOSE) from None
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > limit:
                if not complete:
                    await self._drain(receive)
                raise HTTPException(413, too_large, _CLOSE)
            return message

        await self._app(scope, counted, send)

    async def _drain(self, receive: Receive) -> None:
        seen = 0
        with contextlib.suppress(TimeoutError):
            while seen < _DRAINED_BYTES:
                async with asyncio.timeout(self._idle):
                    message = await receive()
                if not message.get("more_body"):
                    return
                seen += len(message["body"])


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()
