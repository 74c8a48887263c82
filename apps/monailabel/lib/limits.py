# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused before a request reaches any route: bodies above the limit, and pages of other sites."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

__all__ = ["RequestLimits"]

IN_MEMORY = 1_000_000
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequestLimits:
    """ASGI middleware.

    - A body above `limit` bytes: 413, by its Content-Length, or when that many bytes have come. Only uploads may be
      that large, which go to the disk; any other body is kept in memory.
    - A request that a browser sends for a page of another site (its `Origin`): 403. The server has no log-in of its
      own by default, so any page that a reader has open could otherwise use it.

    Args:
        limit: bytes.
        origins: of other sites that may (MONAI_LABEL_CORS_ORIGINS).
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limit: int, origins: Sequence[str]
    ) -> None:
        self.app, self.limit, self.origins = app, limit, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = headers.get("content-type", "").startswith("multipart/form-data")
        limit = self.limit if upload else min(self.limit, IN_MEMORY)
        refused = self._foreign(headers) or _too_large(headers.get("content-length", "0"), limit)
        if refused is not None:
            reply = JSONResponse({"detail": refused.detail}, refused.status_code, headers={"Connection": "close"})
            await reply(scope, receive, send)
            return
        await self.app(scope, _counted(receive, limit), send)

    def _foreign(self, headers: Headers) -> HTTPException | None:
        origin = headers.get("origin")
        if origin is None or origin in self.origins or urlsplit(origin).netloc == headers.get("host"):
            return None
        return HTTPException(403, f"requests of pages of {origin[:100]} are refused: see MONAI_LABEL_CORS_ORIGINS")


def _too_large(length: str, limit: int) -> HTTPException | None:
    if length.isdecimal() and int(length) <= limit:
        return None
    return HTTPException(413, f"expected at most {limit / 1e6:g} MB, the limit of this server")


def _counted(receive: Receive, limit: int) -> Receive:
    """A body may come in chunks, without its length: count it."""
    received = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        error = _too_large(str(received), limit)
        if error is not None:
            raise error
        return message

    return counted
