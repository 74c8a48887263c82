# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that ends before it is finished says so, and why, where it can: not after a kill -9."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable

from .errors import root_cause

__all__ = ["EarlyEnd"]


class EarlyEnd(logging.Handler):
    """Calls back when the process exits, unless it is closed before.

    MONAI skips a config's ``finalize`` where ``run`` fails, so that nothing in a config can note the failure.

    Args:
        callback: gets the reason: the last critical log message, else the exception that ended the process.
    """

    def __init__(self, callback: Callable[[str], None]) -> None:
        super().__init__(logging.CRITICAL)
        self.callback, self.said = callback, ""
        atexit.register(self._exit)

    def emit(self, record: logging.LogRecord) -> None:
        self.said = record.getMessage()

    def close(self) -> None:
        atexit.unregister(self._exit)
        super().close()

    def _exit(self) -> None:
        error = getattr(sys, "last_value", None)  # of an exception that nobody caught
        self.callback(self.said or (root_cause(error) if error else "ended before it was finished"))
