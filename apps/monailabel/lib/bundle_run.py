# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A run of a bundle by its own configs, as the command that its README gives, in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .errors import AppError, Conflict
from .paths import without_paths

__all__ = ["RunFailed", "alone", "is_complete", "run_bundle"]

logger = logging.getLogger(__name__)

TRACEBACK = "Traceback (most recent call last):"
PROGRESS = re.compile(r"\d+%\||\[\d+/\d+\]|\dit/s|s/it")  # of a bar that is drawn again and again
EVERY = 10.0  # seconds between two lines of progress


class RunFailed(AppError):
    """A run of a bundle did not reach its end; the message is the run's own."""


def run_bundle(
    bundle: Path, configs: Sequence[str], overrides: Mapping[str, Any], folder: Path, name: str, hide: Iterable[Path]
) -> Path:
    """Run configs of a bundle; what it prints goes to the log line by line.

    Args:
        bundle: its folder. configs: names of files in its ``configs/``, each over those before it.
        overrides: ids of the config -> values; written to ``folder/name.json``, which is named last.
        folder: the run writes to ``folder/name``, what it printed is in ``folder/name.txt``.
        hide: folders whose paths are left out of messages.

    Returns:
        The folder of the run.

    Raises:
        RunFailed: with the last error of the run.
    """
    file = folder / f"{name}.json"
    placed = {"output_root": str(folder), "run_name": name, "bundle_root": str(bundle)}
    file.write_text(json.dumps({**overrides, **placed}, indent=2) + "\n", encoding="utf-8")
    files = [*(f"configs/{config}" for config in configs), str(file)]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    hide = [bundle, folder, *hide]
    logger.info("%s of %s starts", name, bundle.name)
    process = subprocess.Popen(command, cwd=bundle, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, encoding="utf-8", errors="replace")  # fmt: skip
    try:
        last = _follow(process, folder / f"{name}.txt", hide)
        process.wait()
    finally:
        if process.poll() is None:
            _end(process)
    run = folder / name
    if not is_complete(run):
        raise RunFailed(without_paths(f"{name} failed: {_reason(run, process.returncode, last)}", hide))
    return run


def is_complete(run: Path) -> bool:
    """Whether a run came to its end; series that it left out do not count against it."""
    return str(_manifest(run).get("result", "")).startswith("completed")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other training of this model runs, in whatever process.

    Raises:
        Conflict: if one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".training.lock", timeout=0):
            yield
    except Timeout as error:
        raise Conflict(f"another training of {folder.name} is running: wait for its end, or stop it") from error


def _follow(process: subprocess.Popen[str], path: Path, hide: Sequence[Path]) -> str:
    """Log each line, and keep all of them in a file; gives the last one that says something.

    A traceback is in that file alone: the bundle's last line says what was wrong.
    """
    last, drawn, within = "", 0.0, False
    with path.open("w", encoding="utf-8") as whole:
        for line in process.stdout:
            text = line.strip()
            if PROGRESS.search(text):
                if time.monotonic() - drawn < EVERY:
                    continue
                drawn = time.monotonic()
            elif text:
                last = text
            whole.write(f"{text}\n")
            within = (within or text.startswith(TRACEBACK)) and not text.startswith("error: ")
            if text and not within:
                logger.info("%s", without_paths(text, hide))
    return last


def _end(process: subprocess.Popen[str]) -> None:
    """The process and its workers."""
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    except psutil.NoSuchProcess:
        pass
    process.kill()
    process.wait()


def _reason(run: Path, code: int, last: str) -> str:
    error = _manifest(run).get("error")
    if code < 0:
        advice = ", as the system does when memory is short" if code == -9 else ""
        return f"it was ended by signal {-code}{advice}"
    if error:
        return str(error.get("message"))
    return last.removeprefix("error: ") or f"it ended with status {code}"


def _manifest(run: Path) -> dict[str, Any]:
    try:
        content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
