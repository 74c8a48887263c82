# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Review of a config before it is run: ``python -m workflow.review configs/train.json ...``, in a bundle's folder.

A config is code: MONAI evaluates its ``$`` expressions and calls what its ``_target_`` name. This command reads JSON,
evaluates nothing, and lists each expression, target, import and macro outside `workflow.vocabulary` with its id. Exit
status 0 when there is none, 1 otherwise. It is itself code of the bundle whose folder it is run in: review a config
from elsewhere with your own copy.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .vocabulary import Finding, findings

__all__ = ["main", "review"]

logger = logging.getLogger(__name__)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a config; a name given twice would show a reader one value and MONAI another."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"given twice in one object: {', '.join(twice)}")
    return dict(pairs)


def review(path: str | Path) -> list[Finding]:
    """What a JSON file holds outside the vocabulary; a file that is no such JSON is a finding itself."""
    try:
        if Path(path).suffix.lower() != ".json":
            raise ValueError("only JSON is reviewed")
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
        return list(findings(content))
    except (OSError, ValueError, RecursionError) as error:
        return [Finding("", "", f"not readable as a config: {type(error).__name__}: {error}")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Log the findings of each file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workflow.review", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="all JSON files that the run is given")
    names = parser.parse_args(arguments).configs
    total = 0
    for name in names:
        found = review(name)
        total += len(found)
        for id, text, reason in found:
            logger.warning("%s", f"{name}: {id}: {text}: {reason}" if id else f"{name}: {reason}")
    logger.info("%d finding(s) in %d file(s); Python code beside them is not reviewed", total, len(names))
    return 1 if total else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    sys.exit(main())
