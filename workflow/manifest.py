# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What ``run.json`` says of a run.

The fields are fixed by ``tests/workflow/test_manifest.py``. A resumed run keeps what its parts said under ``earlier``.
No DICOM UID is in it, as in the logs; ``config.json`` keeps what was given, since runs are resumed and compared by it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from monai.utils import optional_import

from .errors import root_cause
from .guard import given_overrides
from .privacy import redact

__all__ = ["Manifest", "described", "environment", "git_revision", "history", "notice_failure", "parameters",
           "peak_memory", "plain_numbers", "sha256_of"]  # fmt: skip

resource, HAS_RESOURCE = optional_import("resource")  # not on Windows
PACKAGES = ("monai", "torch", "numpy", "timm", "pytorch-ignite", "pydicom", "highdicom", "nibabel", "scikit-learn")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_revision(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks a file, and whether its files differ from it; None where none does (a packed
    bundle, also when it lies within somebody's repository)."""
    git = ["git", "-C", str(file.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=30)
        if tracked.returncode:
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=30)
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True,
                                 text=True, check=True, timeout=30)  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git, or no answer
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def environment() -> dict[str, Any]:
    """What runs where: the part of the manifest that does not change while a run lasts."""
    return {
        "command": sys.argv,
        "arguments": given_overrides(sys.argv),
        "machine": {"platform": platform.platform(), "cpu_count": os.cpu_count(), "cuda": torch.version.cuda},
        "versions": versions(),
        "git": git_revision(Path(__file__).resolve()),
    }


def peak_memory() -> dict[str, float | None]:
    """Largest MB in use so far: of this process, of the largest of its ended children (workers), on the GPU."""
    sizes: list[float | None] = [None, None]
    if HAS_RESOURCE:
        unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, else kilobytes
        processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        sizes = [round(resource.getrusage(who).ru_maxrss / unit, 1) for who in processes]
    cuda = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
    return {"process_mb": sizes[0], "largest_child_mb": sizes[1], "cuda_mb": cuda}


def sha256_of(path: Path) -> dict[str, str] | None:
    """Name and checksum of a weights file, None where there is none."""
    if not path.is_file():
        return None
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def history(folder: Path) -> list[dict[str, Any]]:
    """The parts of a run so far, each with the name that its config has from now on; the config itself is renamed."""
    manifest, config = folder / "run.json", folder / "config.json"
    if not manifest.is_file():
        return []
    last = json.loads(manifest.read_text(encoding="utf-8"))
    parts = last.pop("earlier", [])
    if last.get("result") == "started":
        last["result"] = "interrupted"  # killed: it could not say so itself
    if config.is_file():
        last["config"] = f"config_{len(parts) + 1}.json"
        os.replace(config, folder / last["config"])
    return [*parts, last]


def described(cause: str) -> dict[str, str]:
    """Class and message of an error, from what `workflow.errors.root_cause` says of it."""
    name, _, message = cause.partition(": ")
    return {"class": name, "message": redact(message)}


class Manifest:
    """The text of ``run.json`` while a run lasts. UIDs are never in it, wherever they come from.

    Args:
        folder: of the run; its config of an earlier part is renamed.
        started: seconds since the epoch. resume: what the run resumes from.
    """

    def __init__(self, folder: Path, started: float, resume: str | None) -> None:
        self._folder, self._started = folder, started
        self._fixed = {**environment(), "resume": resume, "config": "config.json"}
        self._earlier = history(folder)

    def text(
        self, result: str, error: Mapping[str, str] | None, data: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> str:
        content = {
            "result": result,
            "error": error,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self._started)),
            "duration_s": round(time.time() - self._started, 1),
            **self._fixed,
            "data": data,
            "peak_memory": peak_memory(),
            "metrics": metrics,
            "weights": None if result == "started" else sha256_of(self._folder / "model.pt"),
            "earlier": self._earlier,
        }
        return redact(json.dumps(content, indent=4, default=str)) + "\n"  # str: Fire reads "{'a','b'}" as a set


def notice_failure(folder: Path, fail: Callable[[str, dict[str, str]], None]) -> Callable[[], None]:
    """Have `fail` told the result and the error of a run that does not reach its end, before a traceback is printed:
    MONAI runs `finalize` only after a run that went well.

    Args:
        folder: of the run; who removes it wants to hear no more of it.

    Returns:
        What ends the watch.
    """
    process, previous = os.getpid(), sys.excepthook

    def note(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        try:
            if os.getpid() == process:
                interrupted = isinstance(error, KeyboardInterrupt)
                fail("interrupted" if interrupted else "failed", described(root_cause(error)))
        finally:
            previous(kind, error, traceback)

    def note_exit() -> None:  # an exit that is no error, or an error that a Python caller kept to itself
        if os.getpid() == process and folder.is_dir():
            fail("failed", {"class": "SystemExit", "message": "the process ended before the run did"})

    def forget() -> None:
        atexit.unregister(note_exit)
        sys.excepthook = previous if sys.excepthook is note else sys.excepthook

    sys.excepthook = note
    atexit.register(note_exit)
    return forget


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics as JSON takes them: single numbers alone, None for NaN and infinities."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            number = float(value)
            found[name] = number if number - number == 0 else None
    return found


def parameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings of an executed config: its top-level values but for expressions, components and sections."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        text = json.dumps(value, default=str)
        if name.startswith("_") or name in ("imports", "initialize", "run", "finalize", "handlers"):
            continue
        if isinstance(value, Sequence | Mapping) and any(mark in text for mark in ('"$', '"@', '"_target_"')):
            continue
        found[name] = value if isinstance(value, bool | int | float | str) else text
    return found
