# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes MONAI Label's FastAPI application ours: only the routes of `lib.routes`, and every error a clear reply.

MONAI Label's own routes take any path of the machine as an image, run long work in the event loop, answer unknown names
with 500 and a traceback, and let every page of the browser in (CORS "*"). So all of them are taken out, and those that
are needed come back one by one.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from monailabel.config import settings
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, RedirectResponse

from .errors import AppError
from .inference import predict
from .limits import RequestLimits
from .review import build_router
from .routes import build_routes

if TYPE_CHECKING:
    from main import InjuryApp

__all__ = ["install"]

logger = logging.getLogger(__name__)

STOCK = ("/openapi.json", "/favicon.ico")  # of MONAI Label's own, by their paths
STATUS = {MONAILabelError.INVALID_INPUT: 400, MONAILabelError.APP_INIT_ERROR: 404}


def install(server: FastAPI, app: InjuryApp) -> None:
    """Give the running FastAPI application the routes of the app; called once it is started."""
    routes = server.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", None) in STOCK]
    server.include_router(build_router(app.setup, app.datastore(), app.versions, predict))
    server.add_api_route("/", lambda: RedirectResponse("/review/"), include_in_schema=False)
    server.include_router(build_routes(app))
    server.openapi_schema = None
    server.add_exception_handler(MONAILabelException, _explained)
    server.add_exception_handler(RequestValidationError, _not_echoed)
    server.add_exception_handler(Exception, _unexpected)
    origins = [str(origin).rstrip("/") for origin in settings.MONAI_LABEL_CORS_ORIGINS]
    server.user_middleware[:] = [each for each in server.user_middleware if each.cls is not CORSMiddleware]
    server.middleware_stack = None  # it is built anew with the next request
    hosts = (*app.setup.hosts, _host_of_the_command_line())
    server.add_middleware(RequestLimits, limit=app.setup.upload_limit, origins=origins, hosts=hosts)
    if origins:
        every = {"allow_credentials": True, "allow_methods": ["*"], "allow_headers": ["*"]}
        server.add_middleware(CORSMiddleware, allow_origins=origins, **every)


def _explained(request: Request, error: Exception) -> JSONResponse:
    """Our errors, and MONAI Label's with the reason in words."""
    if isinstance(error, AppError):
        return JSONResponse({"detail": error.msg}, error.status)
    if isinstance(error, MONAILabelException):
        missing = type(error).__name__ in ("ImageNotFoundException", "LabelNotFoundException")
        status = 404 if missing else STATUS.get(error.error)
        if status is not None:
            return JSONResponse({"detail": error.msg}, status)
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _unexpected(request, error)


def _not_echoed(_request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong with the parameters, without what was sent: that may be long, or a patient's."""
    return JSONResponse(
        {"detail": [{key: each[key] for key in ("loc", "msg", "type")} for each in error.errors()]}, 422
    )


def _host_of_the_command_line() -> str:
    """What `--host` says: MONAI Label hands it to uvicorn alone."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-i", "--host", default="localhost")
    try:
        return parser.parse_known_args(sys.argv[1:])[0].host
    except argparse.ArgumentError:
        return "localhost"


def _unexpected(_request: Request, _error: Exception) -> JSONResponse:
    """What nobody has thought of; the log has all of it."""
    return JSONResponse({"detail": "the server failed at this; its log says why"}, 500)
