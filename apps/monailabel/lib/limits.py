# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused before a request reaches any route: bodies above the limit, pages of other sites, and names that are
not the server's."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

__all__ = ["FORM", "RequestLimits"]

IN_MEMORY = 1_000_000
# of a form: its fields are kept in memory, and so is the beginning of each file
FORM = {"max_fields": 8, "max_files": 1, "max_part_size": IN_MEMORY}
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequestLimits:
    """ASGI middleware.

    - A body above `limit` bytes: 413, by its Content-Length, or when that many bytes have come. Only images may be
      that large (`_takes_images`), which go to the disk; any other body is kept in memory.
    - A request for a server of another name (its `Host`): 403. A page of a site whose name is made to point to this
      machine while it is open (DNS rebinding) counts as one of this server for the browser, whatever its `Origin`. An
      address in numbers is no name that anybody else could point here.
    - A request that a browser sends for a page of another site (its `Origin`): 403. The server has no log-in of its
      own by default, so any page that a reader has open could otherwise use it.

    Args:
        limit: bytes.
        origins: of other sites that may (MONAI_LABEL_CORS_ORIGINS).
        hosts: names of this server, beside localhost.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        limit: int,
        origins: Sequence[str],
        hosts: Sequence[str] = (),
    ) -> None:
        self.app, self.limit, self.origins = app, limit, frozenset(origins)
        self.hosts = frozenset(host.lower() for host in ("localhost", *hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self.limit if _takes_images(scope, headers) else min(self.limit, IN_MEMORY)
        refused = (
            self._misnamed(headers) or self._foreign(headers) or _too_large(headers.get("content-length", "0"), limit)
        )
        if refused is not None:
            reply = JSONResponse({"detail": refused.detail}, refused.status_code, headers={"Connection": "close"})
            await reply(scope, receive, send)
            return
        await self.app(scope, _counted(receive, limit), send)

    def _misnamed(self, headers: Headers) -> HTTPException | None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name in self.hosts or _is_address(name):
            return None
        return HTTPException(403, f"this server has no name {host[:100]!r}: see --conf hosts")

    def _foreign(self, headers: Headers) -> HTTPException | None:
        origin = headers.get("origin")
        if origin is None or origin in self.origins or urlsplit(origin).netloc == headers.get("host"):
            return None
        return HTTPException(403, f"requests of pages of {origin[:100]} are refused: see MONAI_LABEL_CORS_ORIGINS")


def _takes_images(scope: Scope, headers: Headers) -> bool:
    """Whether the body is a form of a route that takes images."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    route = (scope["method"] == "POST" and path.startswith("/infer/")) or (
        scope["method"] == "PUT" and path.rstrip("/") == "/datastore/image"
    )
    return route and headers.get("content-type", "").lower().startswith("multipart/form-data")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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
