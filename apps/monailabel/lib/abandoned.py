# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Long work of a request, given up when its client hangs up: nobody else waits for an answer that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from anyio import CancelScope, CapacityLimiter, to_thread
from starlette.requests import Request

from .errors import AppError

__all__ = ["Abandoned", "result_of", "while_asked"]

P = ParamSpec("P")
Result = TypeVar("Result")


class Abandoned(AppError):
    """The client hung up; no reply reaches it."""

    status = 499  # as proxies log it

    def __init__(self) -> None:
        super().__init__("the client hung up before the answer")


class _Client:
    """Who waits for the work of a request."""

    def __init__(self) -> None:
        self.gone = False
        self.queued: Future | None = None

    def leave(self) -> None:
        self.gone = True
        if self.queued is not None:
            self.queued.cancel()  # what runs already comes to its end


_CLIENT: ContextVar[_Client | None] = ContextVar("client", default=None)


async def while_asked(
    request: Request, limiter: CapacityLimiter, function: Callable[P, Result], *args: P.args
) -> Result:
    """The result of a function in a thread, which has what it queues by `result_of` taken back if the client goes.

    Args:
        request: its body must have been read.
        limiter: of the threads for this kind of request; who waits for one of them is let go at once.

    Raises:
        Abandoned: the client has gone.
    """
    client = _Client()
    token = _CLIENT.set(client)
    with CancelScope() as scope:
        watch = asyncio.create_task(_watch(request, client, scope))
        try:
            return await to_thread.run_sync(function, *args, limiter=limiter)
        finally:
            watch.cancel()
            _CLIENT.reset(token)
    raise Abandoned


def result_of(executor: Executor, function: Callable[P, Result], *args: P.args) -> Result:
    """The result of a function in an executor. Raises Abandoned if the client that it is for goes before its turn."""
    client = _CLIENT.get()
    if client is not None and client.gone:
        raise Abandoned
    future = executor.submit(function, *args)
    if client is not None:
        client.queued = future
        if client.gone:  # just now, and nobody has cancelled it
            future.cancel()
    try:
        return future.result()
    except CancelledError as error:
        raise Abandoned from error


async def _watch(request: Request, client: _Client, scope: CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    client.leave()
    scope.cancel()
