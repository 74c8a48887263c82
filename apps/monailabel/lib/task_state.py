# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a background task says of itself to a client: its state and last lines, without stack traces and without paths
of this machine. The server's log has all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["task_state"]

_TRACE = re.compile(r"Traceback \(most recent call last\)|File \".*\", line \d+|During handling of the above|"
                    r"The above exception was the direct cause|^\s*[\^~]+\s*$")  # fmt: skip
_CODE = re.compile(r"^\s{4,}\S")  # the line of code below a `File` line
_PATH = re.compile(r"(?<![\w.:/])(/[^\s'\":,;)\]]+/)")


def task_state(task: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The task as MONAI Label gives it, with readable `details`."""
    if task is None:
        return None
    shown = dict(task)
    if "details" in task:
        shown["details"] = _readable(list(task["details"]))
    return shown


def _readable(lines: Iterable[str]) -> list[str]:
    kept = [line for line in lines if not (_TRACE.search(line) or _CODE.match(line))]
    return [_PATH.sub(".../", line) for line in kept]
