# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One measurement in a process of its own, whose peak memory is therefore its own: see `common.in_bundle`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.common import peak_mb


def main(function: str, task: str, result: str) -> None:
    """Call ``module:function`` with the JSON of one file and leave what it returns, with ``peak_mb``, in another."""
    module, name = function.split(":")
    found = getattr(import_module(module), name)(json.loads(Path(task).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps({**found, "peak_mb": peak_mb()}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
