# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that does not finish says why in its manifest and its log."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from pathlib import Path

import pytest

from workflow.run import RunFolder

UID = "1.2.840.113619.2.55.3.1234"


def ended(folder: Path, act) -> tuple[str, str]:
    """Result and log of a run in a process of its own that starts, acts and exits."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run = RunFolder(folder, "r")
            run.start()
            act(run)
            code = 0
        except ValueError as error:
            sys.last_value = error  # as the interpreter does with what nobody catches
        finally:
            atexit._run_exitfuncs()
            os._exit(code)
    os.waitpid(child, 0)
    result = json.loads((folder / "r" / "run.json").read_text(encoding="utf-8"))["result"]
    return result, (folder / "r" / "log.txt").read_text(encoding="utf-8")


def fail(run: RunFolder) -> None:
    raise ValueError(f"{UID}: no such series")


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda run: None, "failed: ended before it was finished"),
        (fail, "failed: ValueError: uid-"),
        (lambda run: logging.getLogger("a").critical("rank 1 ended"), "failed: rank 1 ended"),
        (lambda run: run.finish(), "completed"),
    ],
    ids=["silent", "raised", "said", "finished"],
)
def test_the_manifest_says_how_a_run_ended(tmp_path, act, expected):
    result, log = ended(tmp_path, act)
    assert result.startswith(expected)
    assert UID not in result + log
    assert log.count("the run failed after") == (expected != "completed")


def test_the_folder_of_a_run_that_was_removed_does_not_come_back(tmp_path):
    run = RunFolder(tmp_path, "r")
    run.start()
    (tmp_path / "r").rename(tmp_path / "gone")
    run._fail("anything")
    assert not (tmp_path / "r").exists()
