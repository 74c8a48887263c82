# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong, and the HTTP status that says so. The message is for the user: it names what was asked for, what was
expected and what was found, never a path outside the studies and never a stack trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from monailabel.interfaces.exception import MONAILabelError, MONAILabelException

__all__ = ["AppError", "Conflict", "NotFound", "TooLarge", "Unusable", "few", "quoted"]


class AppError(MONAILabelException):
    """Base of all errors that become a reply; `msg` is its text."""

    status: ClassVar[int] = 500

    def __init__(self, msg: str) -> None:
        super().__init__(MONAILabelError.APP_ERROR, msg)

    def __str__(self) -> str:
        return self.msg


class NotFound(AppError):
    """There is no such image, label, model, version, strategy or method."""

    status = 404


class Conflict(AppError):
    """It cannot be done now: no weights yet, too few labels, another task is running."""

    status = 409


class TooLarge(AppError):
    """An upload above the limit."""

    status = 413


class Unusable(AppError):
    """The image cannot be read as a CT series, or what was sent is not what was expected."""

    status = 422


def few(values: Sequence[Any], most: int = 5, show: Callable[[Any], str] = str) -> str:
    """The first values for a message, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(show, values[:most])) + more


def quoted(value: Any) -> str:
    """What somebody sent, cut where it is long."""
    return repr(value)[:60]
