# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a background task says of itself to a client: its state and last lines, without stack traces and without paths
of this machine. The server's log has all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .paths import any_path_hidden

__all__ = ["task_state"]

_TRACE = re.compile(r"Traceback \(most recent call last\)|File \".*\", line \d+|During handling of the above|"
                    r"The above exception was the direct cause|^\s*[\^~]+\s*$")  # fmt: skip
_CODE = re.compile(r"^\s{4,}\S")  # the line of code below a `File` line


def task_state(task: Mapping[str, Any] | None, folders: Iterable[Path] = ()) -> dict[str, Any] | None:
    """The task as MONAI Label gives it, with readable `details`; `folders` are those of the server, which may have
    blanks in their names."""
    if task is None:
        return None
    shown = dict(task)
    if "details" in task:
        shown["details"] = _readable(list(task["details"]), list(folders))
    return shown


def _readable(lines: Iterable[str], folders: Iterable[Path]) -> list[str]:
    kept = [line for line in lines if not (_TRACE.search(line) or _CODE.match(line))]
    return [any_path_hidden(line, folders) for line in kept]
