# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A server that cannot start says why in one line: MONAI Label and uvicorn would print a stack trace with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["refusing"]


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """End the process with the message of an error. To be used before anything has been started."""
    try:
        yield
    except errors as error:
        sys.tracebacklimit = 0  # for those who print the stack of an exit
        raise SystemExit(f"error: {error}") from None
